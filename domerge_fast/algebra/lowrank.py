"""The best rank-k factors of a dense ΔW, nearly, by a randomized block Krylov method.

A random [n, k + 10] matrix is taken through ΔW and, with a QR each time, twice more through
ΔW ΔW^T; ΔW is then projected on all that was found, and the small projection gets an exact SVD.
What is kept is measured, not estimated: ||ΔW||_F^2 is summed in float64. Cost: eight products of
2 m n (k + 10) flops. Source: Musco and Musco, arXiv 1504.05477.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cuts import check_cut, cut
from .full_precision import full_precision

__all__ = ["compress"]

OVERSAMPLING = 10
POWERS = 2
FIRST_RANK = 32
"""Where the search for a rank that keeps the wanted energy starts; it doubles from there."""


def compress(
    delta: Tensor, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, float, float]:
    """A [k, n] and B [m, k] in float32 with B A near delta [m, n], the energy kept, ||delta||^2.

    k is the smallest rank found to keep the share `energy` of the squared norm, at most `rank`.
    Balanced: with B A = U S V^T, B = U sqrt(S) and A = sqrt(S) V^T. The same delta gives the same
    factors on the same number of threads. Exact where the rank of delta is k + OVERSAMPLING at
    most. NaN where delta has values that are not finite. Raises FlatCut where the cut falls between
    equal singular values.
    """
    total = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    if not math.isfinite(total):
        m, n = delta.shape
        return delta.new_full((1, n), math.nan), delta.new_full((m, 1), math.nan), math.nan, total
    delta = delta.to(full_precision(delta.device, delta.dtype))
    least = min(delta.shape)
    count = min(FIRST_RANK if rank is None else rank, least)
    while True:
        u, s, vh = _leading(delta, min(count + OVERSAMPLING, least))
        squares = s.double().square()
        found = float(squares[:count].sum())
        reached = energy is None or found >= energy * total * (1 - 1e-6)
        if rank is not None or reached or count == least:
            break
        count = min(2 * count, least)
    k = count
    if energy is not None:
        k, _ = cut(s[:count].cpu(), count, min(1.0, energy * total / found) if found else 1.0)
    check_cut(s.cpu(), k)
    root = s[:k].sqrt()
    kept = min(1.0, float(squares[:k].sum()) / total) if total > 0 else 1.0
    a, b = root[:, None] * vh[:k], u[:, :k] * root
    return a.float(), b.float(), kept, total


def _leading(delta: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, count], S and V^T [count, n]: nearly the leading singular triplets."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], count, generator=generator).to(delta)
    block = torch.linalg.qr(delta @ start).Q
    blocks = [block]
    for _ in range(POWERS):
        block = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ block).Q).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return (basis @ u)[:, :count], s[:count], vh[:count]
