"""Sums over the blocks of products of Gram matrices: all inner products between adapters.

<ΔW_i, ΔW_j>_F = tr(A_i^T B_i^T B_j A_j) is the sum of G_A o G_B over block (i, j).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._backend import implementation, op

__all__ = ["block_products"]


@op
def block_products(
    x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """[P, T, T] in float64: entry (i, j) of problem p sums x_p y_p, entry by entry, over the block
    of rows of adapter i and columns of adapter j.

    x, y: P matrices [R, R] each. ranks: r_i of the adapters of all of them, summing to R.
    """
    size = (sum(ranks), sum(ranks))
    for m in (*x, *y):
        if m.shape != size:
            raise ValueError(f"a matrix of {tuple(m.shape)} does not fit the ranks {tuple(ranks)}")
    return implementation(backend, x).block_products(x, y, ranks)
