"""From what a method makes of modules to what is written of them: cuts, steps after the method, the
output's dtype, and the powers of two that were taken out of the factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra import powers
from ..algebra.full_precision import full_precision
from ..algebra.lowrank import compress
from ..errors import FlatCut
from ..methods.base import Cut, Dense, Factors, Merged
from . import precision
from .work import Work

__all__ = ["Result", "compressed", "finished", "in_range"]


@dataclass(frozen=True, eq=False)
class Result:
    """A merged module as the sink takes it, and for its report: what the method says of it, its
    rank, the energy kept and that before."""

    tensors: tuple[Tensor, ...]
    made: Factors | Dense
    rank: int
    kept: float = 1.0
    energy: float = 0.0


Calibrate = Callable[[Sequence[Factors]], Sequence[Factors]]


def finished(
    work: Work, stacks: Sequence[Stack], merged: Merged, calibrate: Calibrate | None = None
) -> list[Result]:
    """Dense results as they are, or cut to factors where the sink or a step wants these; the
    truncation of factors, the steps after it, and ΔW where the sink wants that.

    Factors of more rows than ΔW has rank, R > min(m, n), are brought to min(m, n) of them: ΔW is
    formed in float64 and taken apart by ops.truncate, which then cuts nothing off. calibrate: what
    is done to factors before they are cut.
    """
    cut = work.cut
    dense = [x for x in merged if isinstance(x, Dense)]
    factors = [x for x in merged if isinstance(x, Factors)]
    if dense and work.deltas and not cut and not work.post and not calibrate:
        return [Result((x.delta,), x, min(x.delta.shape)) for x in dense]
    kept, energy = [1.0] * len(merged), [0.0] * len(merged)
    if dense:
        factors, kept, energy = compressed(work, stacks, dense)
    if calibrate:
        factors = list(calibrate(factors))
    whole = [k for k, x in enumerate(factors) if cut and not dense and x.kept is None]
    if work.post or whole:
        # No decomposition takes what is not finite.
        _check_finite(stacks, [(x.a, x.b) for x in factors], work.settings.backend)
    if cut and not dense:
        factors = _truncate(stacks, factors, whole, cut, work)
        kept = [1.0 if x.kept is None else x.kept for x in factors]
        energy = [x.energy for x in factors]
    elif not dense and not work.deltas:
        factors = _narrowed(stacks, factors, work)
    if work.restores_norms and not (dense and calibrate):  # calibrated after the cut
        factors = [_restored(*row) for row in zip(stacks, factors, kept)]
    for step in work.post:
        factors = step.run(stacks, factors, work.inner)
    dtype = work.settings.dtype
    tensors: list[tuple[Tensor, ...]] = (
        [(_product(x.a, x.b),) for x in factors]
        if work.deltas
        else [(x.a.to(dtype), x.b.to(dtype)) for x in factors]
    )
    ranks = [x.a.shape[0] for x in factors]
    return [Result(*row) for row in zip(tensors, factors, ranks, kept, energy)]


def in_range(
    result: Result, stack: Stack, given: tuple[int, int], of_scale: int, work: Work
) -> Result:
    """The result in float32 with its powers of two, in the output's dtype."""
    power_a, power_b = stack.powers
    power = power_a + power_b + of_scale
    if work.deltas:
        (delta,) = result.tensors
        tensors: tuple[Tensor, ...] = (powers.scaled(stack.name, delta, power),)
    else:
        a, b = result.tensors
        sizes = power_a, power_b + of_scale
        tensors = powers.fitted(stack.name, a, b, sizes, work.settings.dtype)
    return replace(
        result,
        tensors=tensors,
        made=result.made.times(*given),
        energy=math.ldexp(result.energy, 2 * power),
    )


def compressed(
    work: Work, stacks: Sequence[Stack], dense: Sequence[Dense]
) -> tuple[list[Factors], list[float], list[float]]:
    """Dense results cut to factors, the energy that each keeps, and that before."""
    cut = work.cut or work.usual
    cuts = [_compressed(s.name, x.delta, cut) for s, x in zip(stacks, dense)]
    factors = [Factors(c[0], c[1], *x.reports) for x, c in zip(dense, cuts)]
    return factors, [c[2] for c in cuts], [c[3] for c in cuts]


def _compressed(name: str, delta: Tensor, cut: Cut) -> tuple[Tensor, Tensor, float, float]:
    try:
        return compress(delta, cut.rank, cut.energy)
    except FlatCut as error:
        raise error.of(name) from None


def _truncate(
    stacks: Sequence[Stack], merged: Sequence[Factors], chosen: Sequence[int], cut: Cut, work: Work
) -> list[Factors]:
    """The chosen cut, by their factors."""
    pairs = [(merged[k].a, merged[k].b) for k in chosen]
    try:
        smaller, shares = ops.truncate(
            pairs,
            rank=cut.rank,
            energy=cut.energy,
            out_dtype=work.cut_dtype,
            backend=work.settings.backend,
        )
    except FlatCut as error:
        raise error.of(stacks[chosen[error.at]].name, work.method.method.name) from None
    found = list(merged)
    for k, (a, b), share, given in zip(chosen, smaller, shares, pairs):
        found[k] = replace(merged[k], a=a, b=b, kept=share, energy=_energy(*given))
    return found


def _restored(stack: Stack, made: Factors, kept: float) -> Factors:
    """With the norm from before the cut, which left this share of its square; one adapter's update
    as it is."""
    if not 0 < kept < 1 or len(stack.adapters) == 1:
        return made
    return replace(made, b=made.b * kept**-0.5)


def _narrowed(stacks: Sequence[Stack], merged: list[Factors], work: Work) -> list[Factors]:
    """The factors with min(m, n) rows where they have more; the others as they are."""
    wide = [k for k, f in enumerate(merged) if len(f.a) > min(f.a.shape[1], len(f.b))]
    if not wide:
        return merged
    pairs = [(merged[k].a, merged[k].b) for k in wide]
    _check_finite([stacks[k] for k in wide], pairs, work.settings.backend)
    dtype = torch.float32 if work.post else work.settings.dtype
    narrow, _ = ops.truncate(pairs, out_dtype=dtype, backend=work.settings.backend)
    found = list(merged)
    for k, (a, b) in zip(wide, narrow):
        found[k] = replace(merged[k], a=a, b=b)
    return found


@full_precision()
def _energy(a: Tensor, b: Tensor) -> float:
    """||B A||_F^2 from the two Grams."""
    return float(((a @ a.T).double() * (b.T @ b).double()).sum())


def _check_finite(
    stacks: Sequence[Stack], results: Sequence[tuple[Tensor, Tensor]], backend: str
) -> None:
    """Of results in float32."""
    for s, whole in zip(stacks, precision.fits(results, backend)):
        if not whole:
            raise powers.refusal(s.name, torch.float32, "large")


@full_precision()
def _product(a: Tensor, b: Tensor) -> Tensor:
    return b.float() @ a.float()
