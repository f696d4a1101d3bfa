"""The best rank-k approximation of a product of factors, from their Grams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuts import cut
from .roots import root

__all__ = ["NOISE", "Part", "truncated"]

NOISE = 2.0**-26
"""Singular values below this share of ||B||_F ||A||_F are rounding noise of the float64 Grams."""

CANCELS = 2.0**-8
"""Where ||B A||_F is a smaller share of ||B||_F ||A||_F, float32 products would lose its digits."""


SMALL = 2.0**-10
"""Of ||B|| ||A||, above which singular values are the roots of eigenvalues, right within 1e-9."""


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

    With A A^T = L L^T there is an orthonormal Q with A = L Q^T, and with V S^2 V^T = L^T B^T B L
    C_A = S^(-3/2) V^T L^T B^T B and C_B = S^(-1/2) V^T L^T. Squares hold half the digits: where a
    kept singular value is below `SMALL` of ||B|| ||A||, they are those of an SVD (`_by_svd`).
    at: which of the products these are, for FlatCut.
    """
    balance, live = _balance(gram_a, gram_b)
    pairs = live[..., None] & live[:, None]
    gram_a = balance[..., None] * gram_a * balance[:, None] * pairs
    gram_b = gram_b / balance[..., None] / balance[:, None] * pairs
    upper = _upper(gram_a)
    squares, vectors = torch.linalg.eigh(upper @ gram_b @ upper.mT)
    s, v = squares.flip(1).clamp_min(0).sqrt(), vectors.flip(2)
    sizes = upper.norm(dim=(1, 2)) * _trace(gram_b).sqrt()
    floors = SMALL * (_largest(gram_a) * _largest(gram_b)).sqrt().cpu()
    for k, values in enumerate(s.cpu()):
        count, kept = cut(values, rank, energy, at[k])
        if values[count - 1] > floors[k]:
            c_b = v[k, :, :count].T @ upper[k]
            c_a = c_b @ gram_b[k] / s[k, :count, None] ** 1.5
            c_b = c_b / s[k, :count, None].sqrt()
            share = float(s[k].norm() / sizes[k])
        else:
            c_a, c_b, kept, share = _by_svd(upper[k], gram_b[k], rank, energy, at[k])
        row = balance[k] * live[k]
        yield Part(c_a * row, c_b / balance[k] * live[k], kept, share < CANCELS)


def _by_svd(
    upper_a: Tensor, gram_b: Tensor, rank: int | None, energy: float | None, at: int
) -> tuple[Tensor, Tensor, float, float]:
    """C_A, C_B, the share of ||B A||_F^2 that is kept, and ||B A||_F over ||B||_F ||A||_F.

    With A A^T = L_A L_A^T and B^T B = L_B L_B^T there are orthonormal Q_A, Q_B such that
    B A = Q_B (L_B^T L_A) Q_A^T, and the core's SVD U S V^T gives C_A = S^(-1/2) U^T L_B^T and
    C_B = S^(-1/2) V^T L_A^T: neither Q nor an inverse is needed.
    """
    upper_b = _upper(gram_b[None])[0]
    u, s, vh = torch.linalg.svd(upper_b @ upper_a.T)
    size = upper_a.norm() * upper_b.norm()
    inverse = torch.where(s > NOISE * size, s.rsqrt(), 0.0)[:, None]
    count, kept = cut(s.cpu(), rank, energy, at)
    c_a, c_b = (
        inverse[:count] * (u[:, :count].T @ upper_b),
        inverse[:count] * (vh[:count] @ upper_a),
    )
    return c_a, c_b, kept, float(s.norm() / size) if size > 0 else 1.0


def _largest(gram: Tensor) -> Tensor:
    """At least the largest eigenvalue, [P]."""
    return torch.linalg.matrix_norm(gram, ord=torch.inf)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).sum(1)


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
