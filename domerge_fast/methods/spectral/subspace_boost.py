"""Subspace boosting of the sum: its weak singular values raised to a strong one.

    sum_i w_i τ_i = U S V^T,  ΔW = λ U diag(max(S, S_k)) V^T

S_k is the first singular value with S_1 + .. + S_k >= beta (S_1 + S_2 + ..). Only singular values
that are not rounding noise are raised, at most R of them; the authors raise all min(m, n), which
would add null vectors. The first of so few often holds more than the authors' beta of 0.01: then
all become equal. One adapter is boosted too. Cost: two reads of the factors, 2 R^2 (m + n) flops
twice, two eigenproblems and an SVD of R x R. Returns the exact result, of rank R at most.
Source: arXiv 2506.16506.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...options import option
from . import space

__all__ = ["METHOD", "SubspaceBoostOptions"]


@dataclass(frozen=True)
class SubspaceBoostOptions:
    beta: float = option(0.01, "share of the spectrum that is strong", low=0.0)


def core(x: space.Coordinates, options: SubspaceBoostOptions) -> tuple[Tensor, Tensor]:
    u, s, v = space.svd(x.b, x.a, x.norms.sum(1))
    weaker = s.cumsum(1) < options.beta * s.sum(1, keepdim=True)
    k = weaker.sum(1, keepdim=True).clamp_max(s.shape[1] - 1)
    return u * s.maximum(s.gather(1, k))[:, None], v.mT


METHOD = space.method(
    "subspace_boost",
    "the sum with its weak singular values raised to a strong one",
    SubspaceBoostOptions,
    core,
    source="arXiv 2506.16506",
)
