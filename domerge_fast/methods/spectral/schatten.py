"""Schatten norms of products of factors, from their Grams: no SVD, no dense matrix.

    ||B A||_Sq = (sum_k σ_k^q)^(1/q),  ||B A||_Sq^q = tr(G^(q/2)),  G = (B^T B) (A A^T)

for even q: the σ_k^2 are the eigenvalues of G. q = 2 is the Frobenius norm; a large q counts the
strongest directions alone, as the spectral norm does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...algebra.side import Side

__all__ = ["of_adapters", "of_matrix", "of_products", "of_triplets", "packed", "schatten"]

ORTHOGONAL = 1e-10
"""Of the largest squared length, what inner products of orthogonal vectors stay below."""

TINY = 1e-300


def schatten(gram_b: Tensor, gram_a: Tensor, order: int) -> Tensor:
    """||B A||_Sq [P] in float64 from B^T B and A A^T [P, k, k], for an even order q.

    Divided by the trace first, G has no eigenvalue above 1. Cost: log2(q) products of k x k, in
    the dtype of the Grams; none for q = 2.
    """
    if order == 2:
        return (gram_b * gram_a).sum((1, 2), dtype=torch.float64).clamp_min(0).sqrt()
    product = gram_b @ gram_a
    trace = _trace(product).clamp_min(0)
    product *= torch.where(trace > 0, 1 / trace, 0.0)[:, None, None].to(product)
    sums = _trace_of_power(product, order // 2).clamp_min(0)
    return trace.sqrt() * sums ** (1 / order)


def of_matrix(x: Tensor, order: int) -> float:
    """||x||_Sq of one dense matrix [m, n], for an even order q: as `schatten` of x and 1."""
    if order == 2:
        return float(torch.linalg.vector_norm(x, dtype=torch.float64))
    square = (x @ x.T if len(x) <= x.shape[1] else x.T @ x)[None]
    trace = _trace(square)
    square *= torch.where(trace > 0, 1 / trace, 0.0)[:, None, None].to(square)
    sums = _trace_of_power(square, order // 2).clamp_min(0)
    return float(trace.sqrt() * sums ** (1 / order))


def of_adapters(grams_a: Tensor, grams_b: Tensor, ranks: Sequence[int], order: int) -> Tensor:
    """||B_i A_i||_Sq [P, T] of adapters of these ranks, from the diagonal blocks [r_i, r_i] of
    both Grams of P modules, [P, sum r_i^2]: one after the other, as `ops.block_gram` has them."""
    a, b = (x.split([r * r for r in ranks], 1) for x in (grams_a, grams_b))
    found = a[0].new_empty(len(ranks), len(grams_a), dtype=torch.float64)
    for r in {*ranks}:
        at = [i for i, rank in enumerate(ranks) if rank == r]
        x, y = (torch.cat([side[i] for i in at]).unflatten(1, (r, r)) for side in (a, b))
        found[at] = schatten(y, x, order).view(len(at), -1)
    return found.T


def packed(gram: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """The diagonal blocks [r_i, r_i] of a Gram [..., R, R], one after the other."""
    rows = gram.split(ranks, -2)
    blocks = [x.split(ranks, -1)[k].flatten(-2) for k, x in enumerate(rows)]
    return torch.cat(blocks, -1)


def of_triplets(left: Tensor, right: Tensor, order: int) -> Tensor:
    """||left right||_Sq [P] of left [P, K_B, k] and right [P, k, K_A].

    Where the columns of left and the rows of right are orthogonal, as in singular triplets, the
    products of their lengths are the singular values: no power of a matrix is taken.
    """
    columns, rows = left.mT @ left, right @ right.mT
    squares = [x.diagonal(dim1=1, dim2=2) for x in (columns, rows)]
    off = [
        (x - torch.diag_embed(d)).abs().amax((1, 2)) / d.amax(1).clamp_min(TINY)
        for x, d in zip((columns, rows), squares)
    ]
    plain = (torch.maximum(*off) < ORTHOGONAL).tolist()
    rest = [p for p, apart in enumerate(plain) if not apart]
    values = (squares[0] * squares[1]).clamp_min(0)
    top = values.amax(1, keepdim=True).clamp_min(TINY)
    found = (top * ((values / top) ** (order // 2)).sum(1, keepdim=True) ** (2 / order)).sqrt()[
        :, 0
    ]
    if rest:
        found[rest] = schatten(columns[rest], rows[rest], order)
    return found


def of_products(pairs: Sequence[tuple[Tensor, Tensor]], order: int, backend: str) -> list[float]:
    """||B A||_Sq of factors A [k, n] and B [m, k]."""
    sides = [Side((a,), (1.0,)) for a, _ in pairs] + [Side((b.T,), (1.0,)) for _, b in pairs]
    grams = ops.gram(sides, dtype=torch.float64, backend=backend)
    return [float(schatten(b[None], a[None], order)) for a, b in zip(grams, grams[len(pairs) :])]


def _trace_of_power(x: Tensor, power: int) -> Tensor:
    """tr(X^power) [P] of X [P, k, k], the last product never formed."""
    if power == 1:
        return _trace(x)
    half = _power(x, power // 2)
    rest = half if power % 2 == 0 else half @ x
    return (half * rest.mT).sum((1, 2), dtype=torch.float64)


def _power(x: Tensor, power: int) -> Tensor:
    if power == 1:
        return x
    half = _power(x, power // 2)
    return half @ half if power % 2 == 0 else half @ half @ x


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
