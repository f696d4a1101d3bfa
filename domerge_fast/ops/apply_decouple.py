"""A' with B A' = the merge of the adapters' directions and magnitudes, in one pass over A.

Per column c, with a_i the rows of adapter i in C A and K_i = B_i^T B_i:

    mag_i = sqrt(a_i^T K_i a_i)              = ||column c of B_i A_i||
    mag   = sum_i |omega_i| mag_i
    A'_i  = scale omega_i a_i mag / mag_i    (0 where mag_i = 0)

With H = B^T B given, the merged direction D = sum_i omega_i B_i a_i / mag_i is first brought to
unit length ("renormalize"). Source: arXiv 2505.15875, steps 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side, squares
from ._backend import implementation, noting, op

__all__ = ["apply_decouple"]


@op
def apply_decouple(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    blocks: Sequence[Tensor],
    omegas: Sequence[Sequence[float]],
    scale: float,
    out_dtype: torch.dtype,
    *,
    full: Sequence[Tensor] | None = None,
    backend: str = "auto",
    finite: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """A' [R, n] of every problem, and ||B_i A_i||_F of its adapters [T] in float64; with P before
    all shapes for a side of P modules, which have the same omegas.

    coefficients: C [R, R] or None. blocks: the K_i of the B side, packed [sum r_i^2] in float64
    (`block_gram`). omegas: one weight an adapter. full: B^T B [R, R] in float64 of every problem
    to renormalize the merged direction, or None. finite: as for `apply`.
    """
    rows = zip(problems, blocks, omegas, strict=True)
    for ranks, size, count in {(p.ranks, k.shape[-1], len(w)) for p, k, w in rows}:
        if size != squares(ranks) or count != len(ranks):
            raise ValueError(f"blocks or omegas do not fit the ranks {ranks}")
    module = implementation("apply_decouple", backend, problems, coefficients, blocks, full)
    a, norms = module.apply_decouple(
        coefficients,
        problems,
        blocks,
        omegas,
        scale,
        out_dtype,
        full or None,
        **noting(module, finite),
    )
    return a, norms
