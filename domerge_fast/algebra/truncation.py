"""The best rank-k approximation of a product of factors, from their Grams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuts import cut
from .roots import root

NOISE = 2.0**-26
"""Singular values below this share of ||B||_F ||A||_F are rounding noise of the float64 Grams."""

CANCELS = 2.0**-8
"""Where ||B A||_F is a smaller share of ||B||_F ||A||_F, float32 products would lose its digits."""


@dataclass(frozen=True, eq=False)
class Part:
    """C_A [k, R] and C_B [k, R] with A_k = C_A A and B_k^T = C_B B^T, in float64; the share of
    ||B A||_F^2 that they keep; and whether their products with the factors need float64."""

    a: Tensor
    b: Tensor
    kept: float
    cancels: bool


def truncated(
    gram_a: Tensor, gram_b: Tensor, rank: int | None, energy: float | None, at: Sequence[int]
) -> Iterator[Part]:
    """Of products with the Grams A A^T and B^T B, [P, R, R] in float64, that are cut to a rank, or
    to the smallest one that keeps this share of ||B A||_F^2.

    With A A^T = L_A L_A^T and B^T B = L_B L_B^T there are orthonormal Q_A, Q_B such that
    B A = Q_B (L_B^T L_A) Q_A^T, and the core's SVD U S V^T gives C_A = S^(-1/2) U^T L_B^T and
    C_B = S^(-1/2) V^T L_A^T: neither Q nor an inverse is needed. at: which of the products these
    are, for FlatCut.
    """
    balance, live = _balance(gram_a, gram_b)
    pairs = live[..., None] & live[:, None]
    upper_a = _upper(balance[..., None] * gram_a * balance[:, None] * pairs)
    upper_b = _upper(gram_b / balance[..., None] / balance[:, None] * pairs)
    u, s, vh = torch.linalg.svd(upper_b @ upper_a.mT)
    sizes = upper_a.norm(dim=(1, 2)) * upper_b.norm(dim=(1, 2))
    inverse = torch.where(s > NOISE * sizes[:, None], s.rsqrt(), 0.0)[..., None]
    shares = torch.where(sizes > 0, s.norm(dim=1) / sizes, 1.0).tolist()
    for k, (values, share) in enumerate(zip(s.cpu(), shares)):
        count, kept = cut(values, rank, energy, at[k])
        c_a = inverse[k, :count] * (u[k, :, :count].T @ upper_b[k]) * balance[k] * live[k]
        c_b = inverse[k, :count] * (vh[k, :count] @ upper_a[k]) / balance[k] * live[k]
        yield Part(c_a, c_b, kept, share < CANCELS)


def _balance(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """What brings row k of A and column k of B to one norm, [P, R]: neither side alone may decide
    which part of B A is rounding noise. And which rows meet no column of zeros, [P, R]: the others
    have no part in B A, whatever their size."""
    rows, columns = (g.diagonal(dim1=1, dim2=2) for g in (gram_a, gram_b))
    live = (rows > 0) & (columns > 0)
    return torch.where(live, (columns / rows) ** 0.25, 1.0), live


def _upper(gram: Tensor) -> Tensor:
    """L^T with L L^T = gram [P, R, R] in float64; any root where the gram is singular."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    singular = failed > 0
    if singular.any():
        lower[singular] = root(gram[singular]).mT
    return lower.mT
