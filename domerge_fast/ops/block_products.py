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
    x: Sequence[Tensor] | Tensor,
    y: Sequence[Tensor] | Tensor,
    ranks: Sequence[int],
    *,
    backend: str = "auto",
) -> Tensor:
    """[P, T, T] in float64: entry (i, j) of problem p sums x_p y_p, entry by entry, over the block
    of rows of adapter i and columns of adapter j.

    x, y: P matrices [R, R] each, as one tensor, or in a list, of which each may be several
    [.., R, R]. ranks: r_i of the adapters of all of them, summing to R.
    """
    size = (sum(ranks), sum(ranks))
    things = [m for side in (x, y) for m in ([side] if isinstance(side, Tensor) else side)]
    for shape in {m.shape[-2:] for m in things} - {size}:
        raise ValueError(f"a matrix of {tuple(shape)} does not fit the ranks {tuple(ranks)}")
    return implementation("block_products", backend, things).block_products(x, y, ranks)
