"""Where candidates are put for an evaluator: into a live model, or merged in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError
from ..coefficients import Addresses
from ..densities import Density
from ..kinds.alike import Alike, Inner
from ..live import Attached, attached
from ..part import Bases
from ..prepared import Prepared, check_stays
from .mixing import combined, folded, with_density
from .space import Candidate

__all__ = ["Models"]


class Models:
    """What an evaluator is given: the live model with a candidate in it, or a merge in memory
    where there is no live model. A context manager: the model is as it was when the block ends."""

    def __init__(self, several: Mapping[str, Prepared], live: Any) -> None:
        """several: what candidates are made of. OptionError for what cannot be live."""
        if isinstance(live, Attached):
            problem = "is a merge on a model"
            raise OptionError("live", problem, "detach it, and give the model")
        for prepared in several.values() if live is not None else ():
            check_stays(prepared, "live", ", or leave live out")
        self._several, self._live = several, live
        self._attached: dict[str, Attached] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Models:
        if self._live is not None:
            with contextlib.ExitStack() as undo:
                for k, (method, prepared) in enumerate(self._several.items()):
                    made = attached(_Factored(prepared), self._live, f"search_{k}", False, None)
                    self._attached[method] = undo.enter_context(made)
                _activate([*self._attached.values()])
                self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def put(self, candidate: Candidate) -> Any:
        """What the evaluator gets for a candidate."""
        if self._live is None:
            prepared, kappa = combined(self._several, candidate)
            return prepared.merge(kappa)
        for method, live in self._attached.items():
            shares = candidate.densities if with_density(self._several[method]) else None
            live.set(self._factored(candidate, method), "module", shares)
        return self._live

    def put_all(self, candidates: Sequence[Candidate]) -> Any:
        """The live model, of which every batch is as many equal shares, one after the other."""
        for method, live in self._attached.items():
            rows = [self._factored(candidate, method) for candidate in candidates]
            given = [x.densities for x in candidates if x.densities is not None]
            given = given if with_density(self._several[method]) else []
            shares = torch.stack(given) if given else None
            live.candidates(torch.stack(rows), level="module", density=shares)
        return self._live

    def _factored(self, candidate: Candidate, method: str) -> Tensor:
        """Coefficients of one prepared merge with factors on its λ, [modules, T + 1]: 0 where
        another one has the module, or all coefficients are 0."""
        kappa, left = folded(self._several, candidate)
        own = torch.tensor([m == method for m in candidate.methods]) & kappa.any(1)
        return torch.cat(
            [torch.where(own[:, None], kappa, 1.0), torch.where(own, left, 0.0)[:, None]], 1
        )


class _Factored:
    """A prepared merge that takes a factor on λ behind every module's coefficients."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.alike: Sequence[Alike] = prepared.alike
        self.bases: Mapping[str, Bases] = prepared.bases
        of = prepared.addresses
        self.addresses = Addresses(of.modules, of.adapters + 1, of.rank)
        places = {name: k for k, name in enumerate(of.modules)}
        self._rows = [torch.tensor([places[n] for n in x.names]) for x in prepared.alike]

    def shares(self, density: Density) -> Tensor:
        return self._prepared.shares(density)

    def inner(self, kappa: Tensor, densities: Tensor | None = None) -> list[Inner]:
        """Of [.., modules, T + 1]."""
        found = self._prepared.inner(kappa[..., :-1], densities)
        factors = kappa[..., -1].to(torch.float64)
        return [_times(x, factors[..., rows]) for x, rows in zip(found, self._rows)]


def _times(inner: Inner, factors: Tensor) -> Inner:
    """With factors [.., P] on λ."""
    if inner.gains is not None:
        factors = factors.to(inner.gains.device)
        return dataclasses.replace(inner, gains=inner.gains * factors[..., None])
    assert inner.left is not None
    factors = factors.to(inner.left.device)
    return dataclasses.replace(inner, left=inner.left * factors[..., None, None])


def _activate(several: Sequence[Attached]) -> None:
    """Let the adapters of several merges add up: each was alone active when it came."""
    if len(several) < 2:
        return
    names = [x.adapter for x in several]
    for layer in several[0].injected.layers.values():
        layer.set_adapter(names)
        for name in names:
            for part in (layer.lora_A, layer.lora_B):
                part[name].weight.requires_grad_(False)
