"""The best rank-k approximation of B A, without forming it.

With orthonormal bases of B and A^T, B A = Q_B core Q_A^T and the SVD of the small core gives
that of B A. k depends on the values, so there is no fake and no torch.library entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._backend import implementation, op

__all__ = ["truncate"]


@op
def truncate(
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    rank: int | None = None,
    energy: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """Factors (A [k, n], B [m, k]) of every pair (A [R, n], B [m, R]), and the energy kept.

    k is the smallest rank that keeps the share `energy` of ||B A||_F^2, and at most `rank`.
    Balanced: with B A = U S V^T cut to k, B = U sqrt(S) and A = sqrt(S) V^T. Raises FlatCut for a
    pair whose cut falls between equal singular values: there are many best approximations then.
    """
    for a, b in pairs:
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply as B A")
    module = implementation("truncate", backend, [x for pair in pairs for x in pair])
    return module.truncate(pairs, rank, energy, out_dtype)
