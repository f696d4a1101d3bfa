"""RobustMerge: prune the factors, make up for it rank by rank, and add A to A and B to B.

    A'_i, B'_i: the largest entries of A_i and of B_i, `density` of each, the others zero
    p_i[k] = sum |A_i[k]| / sum |A'_i[k]|, raised to at least its own 80th percentile over k
    ΔW = 4 λ (sum_i w_i s_i B'_i diag(p_i / sum_j p_j)) (sum_i A'_i)

4 is the authors' factor of 2 on either side. A weight or a negative sign is on B_i: ΔW has cross
terms B_i A_j by design, and an A_i takes part with weight 1 even where its own update is zero. A
row of A_i of which nothing is kept, whose p the authors' code divides by zero, has p = 1 before it
is raised. Row k of an adapter meets row k of the others, so the result depends on how an update is
split into factors, not on the update alone, and every adapter must have the same rank r in a
module. A module that one adapter alone has is left as it is, w_i τ_i: there is nothing to be robust
against. Cost: one read of the factors, and the selection of a quantile of each. Returns the exact
result, of rank r. Source: arXiv 2502.17159 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.plan import Stack
from ..errors import DomergeError
from . import applying
from .base import Method, Settings
from .entrywise import elementwise
from .made import Factors

__all__ = ["METHOD"]

GAIN = 2.0
"""The authors' factor on the sum of the A's, and on that of the B's."""

LEVEL = 0.8
"""p is raised to its value at this share of the ranks, in ascending order."""


@dataclass(frozen=True)
class RobustOptions:
    density: float = elementwise.density(0.2)


def merge(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: RobustOptions,
    settings: Settings,
) -> list[Factors]:
    for s in stacks:
        _check_ranks(s)
    return [
        _merge(s, options.density, settings)
        if len(s.adapters) > 1
        else applying.stacked([s], settings)[0]
        for s in stacks
    ]


def _check_ranks(stack: Stack) -> None:
    first, *others = zip(stack.adapters, stack.a.ranks)
    for i, rank in others:
        if rank != first[1]:
            raise DomergeError(
                f"adapter number {i + 1}, module {stack.name!r}: robust adds factors of one rank, "
                f"and {rank} is not the {first[1]} of adapter number {first[0] + 1}; bring them to "
                "one rank first, each alone (method 'svd' with rank), or use another method"
            )


def _merge(stack: Stack, density: float, settings: Settings) -> Factors:
    parts = [_Pruned.of(a, bt.T, density) for a, bt in zip(stack.a.blocks, stack.b.blocks)]
    total = torch.stack([part.p for part in parts]).sum(0)
    merged_b = torch.zeros_like(parts[0].b)
    for part, w, s in zip(parts, stack.weights, stack.b.scales):
        merged_b += GAIN * settings.scale * w * s * part.p / total * part.b
    merged_a = GAIN * torch.stack([part.a for part in parts]).sum(0)
    return Factors(merged_a.to(settings.dtype), merged_b.to(settings.dtype))


@dataclass(frozen=True, eq=False)
class _Pruned:
    """A' [r, n], B' [m, r] and p [r] of one adapter, in float32."""

    a: Tensor
    b: Tensor
    p: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, density: float) -> _Pruned:
        a, b = a.float(), b.float()
        kept = _largest(a, density)
        left = kept.abs().sum(1)
        p = torch.where(left > 0, a.abs().sum(1) / left, 1.0)
        return cls(kept, _largest(b, density), p.maximum(p.sort().values[int(LEVEL * len(p))]))


def _largest(x: Tensor, density: float) -> Tensor:
    """x without what is smaller than its largest entries; ties with the least of them are kept."""
    sizes = x.abs()
    least = _smallest(sizes.flatten(), max(1, int(x.numel() * (1 - density))))
    return x * (sizes >= least)


def _smallest(sizes: Tensor, k: int) -> Tensor:
    """The k-th smallest of numbers that are not negative: as integers, their bits are in the same
    order, and the upper half of them leaves few to select from."""
    upper = sizes.view(torch.int32) >> 16
    counts = torch.bincount(upper).cumsum(0)
    at = torch.searchsorted(counts, k)
    before = int(counts[at - 1]) if at else 0
    return sizes[upper == at].kthvalue(k - before).values


METHOD = Method(
    "robust",
    "RobustMerge: pruned factors, made up for rank by rank and added",
    RobustOptions,
    merge,
    rank=lambda ranks, options: max(ranks),
    own_scale=True,
    cost="one read of the factors, a quantile of each",
    source="arXiv 2502.17159",
    needs="equal ranks",
)
