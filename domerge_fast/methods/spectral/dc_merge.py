"""DC-Merge: smoothed updates merged entry by entry between singular vectors of all of them.

    w_i τ_i = U_i S_i V_i^T,  P = orth([U_1 .. U_T]),  Q = orth([V_1 .. V_T])
    M_i = P^T U_i smooth(S_i) V_i^T Q  [R, R],  the `entries` r_i largest kept, the others zero
    M = mean of the entries that have the sign of sum_i M_i, zero off the diagonal r_i x r_i blocks
    ΔW = λ P M Q^T

orth is that of `tsvm`. `smoothing` keeps the sum of an adapter's singular values: "mean" makes
them equal, "linear" lets them fall evenly from min(ρ, σ_1 / σ_r) to 1 (ρ is `ratio`), "none" leaves
them. The authors take the better of the first two, and 5 for ρ.

The authors keep the 0.001 R^2 largest entries, at least one: r of each for eight adapters of rank
16, which is our default for any number and rank. Entries as large as the smallest one kept are
kept too; a sum that is rounding noise of what it is the sum of elects no sign, as zero does. One
adapter keeps its directions. Cost: two reads of the factors, 2 R^2 (m + n) flops twice, four
eigenproblems and T products of R x R. Returns the exact result, of rank R at most.
Source: arXiv 2603.06242 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...options import option
from . import space

__all__ = ["METHOD"]

EQUAL = 1e-9
"""Of the smallest entry kept, within what others count as equal to it."""


@dataclass(frozen=True)
class DcMergeOptions:
    smoothing: str = option(
        "mean", "what an adapter's singular values become", ("mean", "linear", "none")
    )
    ratio: float = option(5.0, "largest over smallest after linear smoothing, at most", low=1.0)
    entries: float = option(
        1.0, "largest entries of an update that are kept, in multiples of its rank", low=0.0
    )


def core(x: space.Coordinates, options: DcMergeOptions) -> tuple[Tensor, Tensor]:
    parts = [space.svd(b, a, size) for (b, a), size in zip(x.tasks(), x.norms.T)]
    left, right = (space.polar(torch.cat([p[k] for p in parts], -1)) for k in (0, 2))
    widths = [s.shape[1] for _, s, _ in parts]
    kept = []
    for u, s, v in parts:
        inside = (left.mT @ (u * smooth(s, options)[:, None])) @ (v.mT @ right)
        kept.append(blocks(largest(inside, round(options.entries * s.shape[1])), widths))
    merged = elected(torch.stack(kept)).split_with_sizes([w * w for w in widths], 1)
    columns = zip(left.split_with_sizes(widths, 2), merged, widths)
    return torch.cat([c @ m.unflatten(1, (w, w)) for c, m, w in columns], 2), right.mT


def smooth(s: Tensor, options: DcMergeOptions) -> Tensor:
    """Singular values [P, r] after smoothing: those that are zero stay so."""
    if options.smoothing == "none":
        return s
    present = s > 0
    count = present.sum(1, keepdim=True).clamp_min(1)
    shape = torch.ones_like(s)
    if options.smoothing == "linear":
        last = s.gather(1, count - 1)
        ratio = torch.where(last > 0, s[:, :1] / last, 1.0).clamp_max(options.ratio)
        place = torch.arange(s.shape[1], device=s.device) / (count - 1).clamp_min(1)
        shape = ratio + (1 - ratio) * place
    shape = shape * present
    return s.sum(1, keepdim=True) * shape / shape.sum(1, keepdim=True).clamp_min(1)


def largest(x: Tensor, count: int) -> Tensor:
    """x [P, R, R] without all but its `count` largest entries and those equal to the smallest."""
    if not count:
        return torch.zeros_like(x)
    sizes = x.abs().flatten(1)
    least = sizes.topk(min(count, sizes.shape[1])).values[:, -1]
    return torch.where(x.abs() >= (1 - EQUAL) * least[:, None, None], x, 0.0)


def blocks(x: Tensor, widths: Sequence[int]) -> Tensor:
    """The diagonal blocks of x [P, R, R], flat: [P, sum_i widths_i^2]."""
    rows = zip(x.split_with_sizes(list(widths), 1), range(len(widths)))
    return torch.cat([row.split_with_sizes(list(widths), 2)[k].flatten(1) for row, k in rows], 1)


def elected(values: Tensor) -> Tensor:
    """The mean over T of those values [T, P, q] that have the sign of their sum."""
    total = values.sum(0)
    noise = space.NOISE * values.abs().sum(0)
    sign = torch.where(total.abs() > noise, total.sign(), 0.0)
    agreeing = (values.sign() == sign) & (sign != 0)
    return (values * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


METHOD = space.method(
    "dc_merge",
    "smoothed updates merged entry by entry between all singular vectors",
    DcMergeOptions,
    core,
    source="arXiv 2603.06242",
)
