"""The directions of DO-Merging, merged by another method.

    D_i = B_i (A_i diag(1 / mag_i)),  mag_i[c] = ||column c of B_i A_i||, 0 where that is noise
    D = merge(D_1 .. D_T) with weights ω_i, brought to ||sum_i ω_i D_i||_F module by module
    ΔW = λ D diag(sum_i |ω_i| mag_i)

The norm makes λ mean what it means in `do`, whatever the method averages or drops; it is 0 where
the weighted sum is. Where the inner method truncates (`svd`), ΔW is truncated, not D. The columns
of a D_i of rank 1 differ in sign alone: rounding decides which of its entries `ties` keeps. Cost:
factors [R, m + n] in float32, r_i^2 (m + n) flops an adapter, 2 R^2 (m + n) for the norms, and the
inner method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.full_precision import full_precision
from ...algebra.roots import column_norms, root
from ...algebra.side import Side
from ..base import Merge, Settings
from ..groups import Groups
from ..made import Dense, Factors, Made
from ..running import prepared
from ..side_report import SideReports
from ..weighted.combination import of_stacks

__all__ = ["Apart", "apart", "prepare"]


@dataclass(frozen=True, eq=False)
class Apart:
    """A module's D_i as a stack with weights ω_i, sum_i |ω_i| mag_i [n], ||B_i A_i||_F, and what
    its sides' descents report."""

    stack: Stack
    magnitudes: Tensor
    norms: Sequence[Sequence[float]]
    reports: tuple[SideReports | None, SideReports | None]


TakeApart = Callable[
    [Sequence[Stack], Sequence[Tensor | None], Sequence[Tensor | None]], list[Apart]
]
"""(stacks, grams_a, grams_b) -> every stack's directions and magnitudes."""


def apart(
    stack: Stack, a: Tensor, bt: Tensor, reports: tuple[SideReports | None, SideReports | None]
) -> Apart:
    """Of the factors A [R, n] and B^T [R, m] that take the place of the stack's."""
    ranks, dtype = list(stack.a.ranks), full_precision(a.device)
    rows, columns = a.split_with_sizes(ranks), bt.split_with_sizes(ranks)
    roots = (root(c.double() @ c.double().T) for c in columns)
    sizes = torch.stack([column_norms(r, block.to(dtype)) for r, block in zip(roots, rows)])
    magnitudes = sizes.float()
    inverse = torch.where(magnitudes > 0, 1 / magnitudes, 0.0)
    ones = (1.0,) * len(ranks)
    directions = Stack(
        stack.names,
        stack.adapters,
        Side(tuple(r * c for r, c in zip(rows, inverse)), ones),
        Side(columns, ones),
        stack.omegas,
    )
    shares = torch.tensor(stack.omegas).abs().to(sizes)
    norms = magnitudes.double().norm(dim=1).tolist()
    return Apart(directions, (shares @ sizes).float(), [norms], reports)


def prepare(groups: Groups[Sequence[Stack]], take_apart: TakeApart, settings: Settings) -> Merge:
    """The merge by `settings.inner`. groups: the directions of the whole model."""
    assert settings.inner
    plain = Settings(1.0, torch.float32, settings.backend, rank=settings.rank)
    inner = prepared(settings.inner, groups, plain)

    def merge(
        stacks: Sequence[Stack],
        grams_a: Sequence[Tensor | None],
        grams_b: Sequence[Tensor | None],
        options: object,
        settings: Settings,
    ) -> Made:
        parts = take_apart(stacks, grams_a, grams_b)
        given = [x.stack for x in parts]
        merged = inner(given, plain)
        norms = zip(_sums(given, settings.backend), _norms(merged, settings.backend))
        gains = [settings.scale * wanted / norm if norm else 0.0 for wanted, norm in norms]
        return [_together(x, m, gain) for x, m, gain in zip(parts, merged, gains)]

    return merge


def _sums(stacks: Sequence[Stack], backend: str) -> list[float]:
    """||sum_i ω_i D_i||_F of every stack."""
    found = []
    for s, inner in zip(stacks, of_stacks(stacks, backend)):
        weights = torch.tensor(s.weights, dtype=inner.dtype)
        found.append(float((weights @ inner @ weights).clamp_min(0).sqrt()))
    return found


def _norms(merged: Made, backend: str) -> list[float]:
    """||ΔW||_F of merges."""
    factors = [x for x in merged if isinstance(x, Factors)]
    sides = [Side((x.a,), (1.0,)) for x in factors]
    sides += [Side((x.b.T,), (1.0,)) for x in factors]
    grams = ops.gram(sides, dtype=torch.float64, backend=backend)
    pairs = zip(grams, grams[len(factors) :])
    products = iter([float((a * b).sum().clamp_min(0).sqrt()) for a, b in pairs])
    return [float(x.delta.norm()) if isinstance(x, Dense) else next(products) for x in merged]


def _together(apart: Apart, merged: Factors | Dense, scale: float) -> Factors | Dense:
    """The merged directions with the merged magnitudes on their columns."""
    magnitudes = scale * apart.magnitudes
    if isinstance(merged, Dense):
        return Dense(merged.delta * magnitudes, *apart.reports, apart.norms)
    return Factors(merged.a * magnitudes, merged.b, *apart.reports, apart.norms)
