"""A candidate as one prepared merge and its coefficients, whatever its modules are merged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import OptionError
from ...recipe import AUTO
from ..densities import DENSITY, methods_of, with_methods
from ..kinds.alike import Alike
from ..kinds.rotated import Cores
from ..prepared import TILES, Prepared
from .space import Candidate

__all__ = ["check_together", "combined", "folded", "with_density"]

SCALED = "modules have factors on λ of their own, which no recipe repeats"


def check_together(several: Mapping[str, Prepared], mixed: bool, scaled: bool) -> None:
    """OptionError unless these prepared merges are of the same adapters and modules, and can be
    put together. mixed: whether one merge may have modules by several. scaled: whether
    factors on updates are searched."""
    if not several:
        raise OptionError("prepared", "there is none", "give one, or {name: one}")
    first = next(iter(several.values()))
    for name, prepared in several.items():
        if prepared.adapters != first.adapters or prepared.modules != first.modules:
            problem = f"{name!r} is of other adapters or modules than {next(iter(several))!r}"
            raise OptionError("prepared", problem, "prepare the same adapters")
        made = prepared.kind == TILES
        if mixed and (prepared.recipe.method == AUTO or _of_the_whole_model(prepared)):
            problem = f"{name!r} is chosen, or calibrated, for the whole model"
            remedy = "name its method, and leave 'svc' out, or groups at 'task'"
            raise OptionError("prepared", problem, remedy)
        if made and (mixed or (scaled and _is_by_ratio(prepared))):
            method = prepared.recipe.method
            problem = f"{method!r} is made anew for each merge, and cannot be a part of one"
            remedy = f"prepare 'core' with inner={method!r}, or leave groups at 'task'"
            raise OptionError("prepared", problem, remedy)


def _is_by_ratio(prepared: Prepared) -> bool:
    """Whether twice the coefficients are the same merge."""
    return prepared.method.by_ratio or _of_the_whole_model(prepared)


def _of_the_whole_model(prepared: Prepared) -> bool:
    """Whether a module's merge depends on the others."""
    return any(isinstance(x, Cores) and x.calibrated for x in prepared.alike)


def folded(several: Mapping[str, Prepared], candidate: Candidate) -> tuple[Tensor, Tensor]:
    """Coefficients [modules, T] with the candidate's scales in them, and what is left of these,
    [modules]: of methods that take shares, which no factor changes."""
    by_ratio = {name: _is_by_ratio(p) for name, p in several.items()}
    shares = torch.tensor([by_ratio[m] for m in candidate.methods])
    left = torch.where(shares, candidate.scales, 1.0)
    within = torch.where(shares, 1.0, candidate.scales)
    return candidate.weights * within[:, None], left


def with_density(prepared: Prepared) -> bool:
    """Whether it keeps a share of the entries of updates."""
    return DENSITY in prepared.recipe.options


def combined(several: Mapping[str, Prepared], candidate: Candidate) -> tuple[Prepared, Tensor]:
    """The prepared merge that has every module as the candidate has it, and coefficients."""
    kappa, left = folded(several, candidate)
    used = list(dict.fromkeys(candidate.methods))
    densities = candidate.densities
    if densities is not None:
        several = {
            n: several[n].at_density(densities) if with_density(several[n]) else several[n]
            for n in used
        }
    first = several[used[0]]
    if len(used) == 1:
        return _scaled(first, left), kappa
    of_module = dict(zip(candidate.modules, candidate.methods))
    scale_of = dict(zip(candidate.modules, left.tolist()))
    alike = [
        found
        for name in used
        for x in several[name].alike
        if (found := _part(x, [k for k, n in enumerate(x.names) if of_module[n] == name], scale_of))
    ]
    methods = {m: methods_of(several[m].recipe, candidate.modules) for m in used}
    asked = {n: methods[m][n] for n, m in of_module.items()}
    return (
        dataclasses.replace(
            first,
            recipe=with_methods(first.recipe, asked),
            densities=None if densities is None else tuple(densities.tolist()),
            alike=tuple(alike),
            bases={n: several[m].bases[n] for n, m in of_module.items()},
            norms={n: several[m].norms[n] for n, m in of_module.items()},
            remarks=(*first.remarks, *([] if bool((left == 1).all()) else [SCALED])),
        ),
        kappa,
    )


def _scaled(prepared: Prepared, factors: Tensor) -> Prepared:
    """With its λ times a factor for each module [modules]."""
    if bool((factors == 1).all()):
        return prepared
    of = dict(zip(prepared.modules, factors.tolist()))
    alike = [_part(x, range(len(x.names)), of) for x in prepared.alike]
    alone = bool((factors == factors[0]).all())
    same = factors[0].item() if alone else 1.0
    return dataclasses.replace(
        prepared,
        alike=tuple(x for x in alike if x),
        scale=same * prepared.scale,
        scales={count: same * scale for count, scale in prepared.scales.items()},
        remarks=prepared.remarks if alone else (*prepared.remarks, SCALED),
    )


def _part(x: Alike, at: Sequence[int], scale_of: Mapping[str, float]) -> Alike | None:
    """Some of the modules that are alike, with their λ times factors."""
    if not at:
        return None
    part = x.part(at)
    factors = torch.tensor([scale_of[name] for name in part.names]).to(x.scale.device)
    return dataclasses.replace(part, scale=part.scale * factors)
