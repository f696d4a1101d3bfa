"""||B A||_F of products of factors, from the Grams of both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...algebra.host import gather
from ...algebra.side import Side
from .base import alike

__all__ = ["norms"]

NOISE = 1e-6
"""B A below this share of sum_k ||b_k|| ||a_k||, over its parts of rank 1, is rounding noise (half
the digits of float64, as its norm is found from Grams)."""


def norms(a: Sequence[Side], b: Sequence[Side], backend: str) -> list[list[float]]:
    """||B_i A_i||_F of every block of every module, 0 where it is rounding noise."""
    grams_a = gather(ops.block_gram(a, backend=backend))
    grams_b = gather(ops.block_gram(b, backend=backend))
    found: list[list[float]] = [[]] * len(a)
    for members in alike(side.ranks for side in a):
        ranks = a[members[0]].ranks
        products = torch.stack([grams_a[k] * grams_b[k] for k in members])
        parts = products.split_with_sizes([r * r for r in ranks], 1)
        rows = torch.stack([_norm(x.unflatten(1, (r, r))) for x, r in zip(parts, ranks)], 1)
        for k, row in zip(members, rows.tolist()):
            found[k] = row
    return found


def _norm(products: Tensor) -> Tensor:
    """||B A||_F [P] from the entrywise products of A A^T and B^T B, [P, r, r]."""
    norm = products.sum((1, 2)).clamp_min(0).sqrt()
    apart = products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().sum(1)
    return torch.where(norm > NOISE * apart, norm, 0.0)
