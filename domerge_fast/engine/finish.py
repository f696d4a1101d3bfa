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
from ..algebra.side import Side
from ..errors import FlatCut
from ..methods.base import Cut
from ..methods.made import Dense, Factors, Made
from . import precision
from .work import Work

__all__ = ["Calibrate", "Result", "beside_unit", "compressed", "cut_dense", "finished", "in_range"]


@dataclass(frozen=True, eq=False)
class Result:
    """The merged modules of a stack as the sink takes them, and for their reports: what the method
    says of them, their rank, and by module the energy kept and that before, () where nothing was
    cut."""

    tensors: tuple[Tensor, ...]
    made: Factors | Dense
    rank: int
    kept: Sequence[float] = ()
    energy: Sequence[float] = ()

    @property
    def finite(self) -> Sequence[Tensor]:
        """Tensors that were seen to be finite as they were made."""
        return self.made.finite if isinstance(self.made, Factors) else ()

    def each(self) -> list[Result]:
        """Those of the modules, one by one."""
        if self.made.count is None:
            return [self]
        rows = enumerate(zip(zip(*(x.unbind() for x in self.tensors)), self.made.each()))
        return [
            Result(tensors, made, self.rank, self.kept[k : k + 1], self.energy[k : k + 1])
            for k, (tensors, made) in rows
        ]


Calibrate = Callable[[Sequence[Factors]], Sequence[Factors]]


def finished(
    work: Work, stacks: Sequence[Stack], merged: Made, calibrate: Calibrate | None = None
) -> list[Result]:
    """Dense results as they are, or cut to factors where the sink or a step wants these; the
    truncation of factors, the steps after it, and ΔW where the sink wants that.

    Factors of more rows than ΔW has rank, R > min(m, n), are brought to min(m, n) of them: ΔW
    itself, which is smaller than they are, beside a unit matrix. calibrate: what is done to factors
    before they are cut.
    """
    cut = work.cut
    dense = [x for x in merged if isinstance(x, Dense)]
    factors = [x for x in merged if isinstance(x, Factors)]
    if dense and work.deltas and not cut and not work.post and not calibrate:
        return [Result((x.delta,), x, min(x.delta.shape)) for x in dense]
    if dense:
        factors = _as_factors(work, stacks, dense)
    cuts = [(x.kept, x.energy) for x in factors]
    if calibrate:
        factors = list(calibrate(factors))
    whole = [k for k, x in enumerate(factors) if cut and not dense and not x.kept]
    if work.post or whole:
        # No decomposition takes what is not finite.
        _check_finite(stacks, [(x.a, x.b) for x in factors], work.settings.backend)
    if cut and not dense:
        factors = _truncate(stacks, factors, whole, cut, work)
        cuts = [(x.kept, x.energy) for x in factors]
    elif not dense and not work.deltas:
        factors = _narrowed(stacks, factors, work)
    if work.restores_norms and not (dense and calibrate):  # calibrated after the cut
        factors = [_restored(s, x, kept) for s, x, (kept, _) in zip(stacks, factors, cuts)]
    for step in work.post:
        factors = step.run(stacks, factors, work.inner)
    dtype = work.settings.dtype
    tensors: list[tuple[Tensor, ...]] = (
        [(_product(x.a, x.b),) for x in factors]
        if work.deltas
        else [
            (x.a, x.b) if s.name in work.matrices else (_as(x.a, dtype), _as(x.b, dtype))
            for s, x in zip(stacks, factors)
        ]
    )
    ranks = [
        min(*x.a.shape, x.b.shape[0]) if s.name in work.matrices else x.a.shape[-2]
        for s, x in zip(stacks, factors)
    ]
    rows = zip(tensors, factors, ranks, cuts)
    return [Result(own, x, rank, *cut) for own, x, rank, cut in rows]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


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
        energy=[math.ldexp(x, 2 * power) for x in result.energy],
    )


def _as_factors(work: Work, stacks: Sequence[Stack], dense: Sequence[Dense]) -> list[Factors]:
    """Dense results cut to factors, but for those that stay matrices: beside the unit matrix."""
    cut = [k for k, s in enumerate(stacks) if s.name not in work.matrices]
    found = dict(zip(cut, compressed(work, [stacks[k] for k in cut], [dense[k] for k in cut])))
    for k, x in enumerate(dense):
        if k not in found:
            unit = torch.eye(x.delta.shape[1], device=x.delta.device)
            found[k] = Factors(unit, x.delta, *x.reports)
    return [found[k] for k in range(len(dense))]


def compressed(work: Work, stacks: Sequence[Stack], dense: Sequence[Dense]) -> list[Factors]:
    """Dense results cut to factors."""
    cut = work.cut or work.usual
    return [cut_dense(s.name, x, cut) for s, x in zip(stacks, dense)]


def cut_dense(name: str, dense: Dense, cut: Cut) -> Factors:
    """A module's ΔW cut to factors."""
    try:
        a, b, kept, energy = compress(dense.delta, cut.rank, cut.energy)
    except FlatCut as error:
        raise error.of(name) from None
    return Factors(a, b, *dense.reports, kept=[kept], energy=[energy])


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
        found[k] = replace(merged[k], a=a, b=b, kept=[share], energy=[_energy(*given)])
    return found


def _restored(stack: Stack, made: Factors, kept: Sequence[float]) -> Factors:
    """With the norms from before the cut, which left these shares of their squares; one adapter's
    update as it is."""
    if not kept or len(stack.adapters) == 1:
        return made
    gains = torch.tensor([x**-0.5 if 0 < x < 1 else 1.0 for x in kept]).to(made.b)
    return replace(made, b=made.b * (gains if made.b.dim() == 2 else gains[:, None, None]))


def _narrowed(stacks: Sequence[Stack], merged: list[Factors], work: Work) -> list[Factors]:
    """The factors with min(m, n) rows where they have more; the others as they are."""
    shapes = [(s.name, f.a.shape[-2:], f.b.shape[-2]) for s, f in zip(stacks, merged)]
    most = [rank if name in work.matrices else min(n, m) for name, (rank, n), m in shapes]
    wide = [k for k, (_, (rank, _), _) in enumerate(shapes) if rank > most[k]]
    if not wide:
        return merged
    given = [(merged[k].a, merged[k].b) for k in wide]
    _check_finite([stacks[k] for k in wide], given, work.settings.backend)
    dtype = torch.float32 if work.post else work.settings.dtype
    # float16 has no room for ΔW before it is brought to size.
    formed = dtype if dtype == torch.bfloat16 else torch.float32
    found = list(merged)
    for k, (a, b) in zip(wide, given):
        backend = work.settings.backend
        (delta,) = ops.apply([b.float()], [Side((a,), (1.0,))], formed, backend=backend)
        a, b = beside_unit(delta, backend)
        found[k] = replace(merged[k], a=_as(a, dtype), b=_as(b, dtype))
    return found


def beside_unit(delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """A [k, n] and B [m, k] of ΔW in float32 or bfloat16, k = min(m, n): one is ΔW over a power of
    two, the other that power of the unit matrix, so that their largest entries are alike."""
    (size,) = ops.largest([delta], backend=backend).tolist()
    power = 2.0 ** round(math.frexp(size)[1] / 2) if size else 1.0
    m, n = delta.shape
    unit = power * torch.eye(min(m, n), device=delta.device)
    return (delta / power, unit) if m <= n else (unit, delta / power)


def _energy(a: Tensor, b: Tensor) -> float:
    """||B A||_F^2 from the two Grams."""
    dtype = full_precision(a.device)
    a, b = a.to(dtype), b.to(dtype)
    return float(((a @ a.T).double() * (b.T @ b).double()).sum())


def _check_finite(
    stacks: Sequence[Stack], results: Sequence[tuple[Tensor, Tensor]], backend: str
) -> None:
    """Of results in float32."""
    for s, whole in zip(stacks, precision.fits(results, backend)):
        if not all(whole):
            raise powers.refusal(s.name, torch.float32, "large")


def _product(a: Tensor, b: Tensor) -> Tensor:
    dtype = full_precision(a.device)
    return (b.to(dtype) @ a.to(dtype)).float()
