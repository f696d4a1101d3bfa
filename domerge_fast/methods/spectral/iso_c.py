"""Iso-C: the summed update with all its singular values made equal.

    sum_i w_i τ_i = U S V^T,  ΔW = λ mean(S) U V^T

The mean and U V^T are taken over the singular values that are not rounding noise, at most R of
them. The authors average over all min(m, n) and multiply null vectors in, which is arbitrary for
low-rank updates: their level is smaller by (how many are not noise) / min(m, n). One adapter is
made isotropic too. Cost: two reads of the factors, 2 R^2 (m + n) flops twice, two eigenproblems
and an SVD of R x R. Returns the exact result, of rank R at most. Source: arXiv 2502.04959.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import space

__all__ = ["METHOD"]


@dataclass(frozen=True)
class IsoCOptions:
    """`iso_c` has no options of its own."""


def core(x: space.Coordinates, options: IsoCOptions) -> tuple[Tensor, Tensor]:
    u, s, v = space.svd(x.b, x.a, x.norms.sum(1))
    return space.level(s) * u, v.mT


METHOD = space.method(
    "iso_c",
    "the sum with all its singular values made equal",
    IsoCOptions,
    core,
    source="arXiv 2502.04959",
)
