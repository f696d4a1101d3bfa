"""Iso-CTS: directions common to all adapters and directions of each, all made equally strong.

    U_c, S_c, V_c: the first k of the D singular triplets of sum_i w_i τ_i
    U_i, S_i, V_i: the first (D - k) / T of (I - U_c U_c^T) τ_i, for every adapter
    ΔW = λ mean(S) orth([U_1 .. U_T U_c]) orth([V_1 .. V_T V_c])^T

k is int(common D), moved to the nearest one for which T divides D - k. D is the number of singular
values of the sum that are not rounding noise, at most R; the authors' is min(m, n), which low-rank
updates would fill up with null vectors. As in `iso_c`, the mean is over the directions that there
are. Cost: two reads of the factors, 2 R^2 (m + n) flops twice, four eigenproblems and an SVD of
R x R. Returns the exact result, of rank R at most. Source: arXiv 2502.04959.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.cuts import check_cuts
from ...options import option
from . import space

__all__ = ["METHOD"]


@dataclass(frozen=True)
class IsoCtsOptions:
    common: float = option(0.8, "share of the directions that is common to all", low=0.0)


def core(x: space.Coordinates, options: IsoCtsOptions) -> tuple[Tensor, Tensor]:
    total = space.svd(x.b, x.a, x.norms.sum(1))
    count = (total[1] > 0).sum(1).double()
    adapters = len(x.ranks)
    own = ((count - (options.common * count).floor()) / adapters).round()
    own = own.clamp_min(0).minimum((count / adapters).floor())
    common = _first(total, count - adapters * own)
    parts = []
    for (b, a), size in zip(x.tasks(), x.norms.T):
        rest = b - (b @ common[0]) @ common[0].mT
        parts.append(_first(space.svd(rest, a, size), own))
    u, s, v = (torch.cat(part, -1) for part in zip(*parts, common))
    return space.level(s) * space.polar(u), space.polar(v).mT


def _first(triplets: tuple[Tensor, Tensor, Tensor], count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first count [P] of singular triplets, the others zero. Raises FlatCut."""
    u, s, v = triplets
    check_cuts(s, count)
    kept = torch.arange(s.shape[1], device=s.device) < count[:, None]
    return u * kept[:, None], s * kept, v * kept[:, None]


METHOD = space.method(
    "iso_cts",
    "common and own directions of the adapters, equally strong",
    IsoCtsOptions,
    core,
    source="arXiv 2502.04959",
)
