"""Directions of an input that hold little, or much, of its energy xᵀ C x / tr C, in float64.

Wherever a choice is left, as among directions without any energy, it is random by a seed: what an
eigensolver returns of equal eigenvalues depends on the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "NOTHING",
    "inside",
    "largest",
    "less",
    "moved",
    "off",
    "orthonormal",
    "seen",
    "smallest",
    "spanned",
]

NOISE = 1e-6
"""Of the largest eigenvalue: what rounding leaves of a smaller one in sums in float32. Eigenvalues
that differ less are equal."""
NOTHING = 1e-6
"""Of the norm of A: what rounding leaves where nothing is left."""
WHOLE = 1024
"""Up to this n all eigenvalues are computed, 9 n³ flops or so."""
SPARE = 8
"""Directions that are iterated on besides those that are wanted."""
STEPS = 8
"""Of block subspace iteration, 2 n² flops a vector each."""
BLOCK = 128
"""Of the largest, how many are looked for first; twice as many until they are enough."""


def _random(rank: int, n: int, generator: torch.Generator) -> Tensor:
    """Normal numbers [rank, n], drawn on the CPU."""
    return torch.randn(rank, n, generator=generator, dtype=torch.float64)


def orthonormal(x: Tensor) -> Tensor:
    """The rows [r, n] by Gram and Schmidt's process: the same whatever basis they were made in."""
    q, r = torch.linalg.qr(x.T)
    return (q * r.diagonal().sign()).T


def seen(a: Tensor, c: Tensor) -> float:
    """tr(Q C Qᵀ) / tr(C) over r / n, Q an orthonormal basis of the rows of A [r, n]: the energy of
    C that A lets through, where random rows have 1."""
    rows = orthonormal(a.double())
    held = ((rows @ c.double()) * rows).sum() / c.diagonal().double().sum()
    return float(held * c.shape[0] / len(rows))


def smallest(c: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns [n, r or more], in float64: the r eigenvectors of C [n, n] with the
    smallest eigenvalues, with those that are equal to the last, as all of 0 where C has not full
    rank; up to WHOLE. Of a larger C r directions that hold hardly more."""
    if len(c) > WHOLE:
        return _iterated(c.double(), rank, generator)
    values, vectors = torch.linalg.eigh(c.double())
    return vectors[:, values <= values[rank - 1] + NOISE * values[-1]]


def _iterated(c: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """By block inverse iteration: n³/3 flops for a Cholesky factor, then 2 n² a vector and step."""
    n = len(c)
    shift = NOISE * float(_subspace(c, SPARE, generator)[0][-1])
    factor = torch.linalg.cholesky(c + shift * torch.eye(n, dtype=c.dtype, device=c.device))
    block = _random(rank + SPARE, n, generator).to(c.device).T
    before = float("inf")
    for _ in range(40):
        block = torch.linalg.qr(torch.cholesky_solve(block, factor))[0]
        values, vectors = torch.linalg.eigh(block.T @ c @ block)
        energy = float(values[:rank].sum())
        if before - energy <= 1e-3 * abs(energy) + shift:
            break
        before = energy
    return block @ vectors[:, :rank]


def largest(
    c: Tensor, energy: float | None, count: int | None, generator: torch.Generator
) -> Tensor:
    """Orthonormal columns [n, k], in float64: the fewest eigenvectors of C [n, n] that hold this
    share of its trace, or so many, with those that are equal to the last."""
    c = c.double()
    n, size = len(c), max(2 * (count or 0), BLOCK)
    while True:
        whole = n <= WHOLE or 3 * size >= n
        values, vectors = torch.linalg.eigh(c) if whole else _subspace(c, size, generator)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        held = values.cumsum(0) / c.diagonal().sum()
        last = count or int((held < (energy or 0.0) - NOISE).sum()) + 1
        # The later half of a block that was iterated on are not eigenvectors yet.
        good = len(values) if whole else len(values) // 2
        if last <= good or whole:
            last = min(last, good)
            return vectors[:, :good][:, values[:good] >= values[last - 1] - NOISE * values[0]]
        size *= 2


def _subspace(c: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, ascending, and their eigenvectors [n, size], by STEPS of block
    subspace iteration."""
    block = _random(size, len(c), generator).to(c.device).T
    for _ in range(STEPS):
        block = torch.linalg.qr(c @ block)[0]
    values, vectors = torch.linalg.eigh(block.T @ c @ block)
    return values, block @ vectors


def inside(basis: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows [r, n], in float64, in the span of a basis [n, k], k ≥ r."""
    start = _random(rank, len(basis), generator).to(basis.device)
    return orthonormal((start @ basis) @ basis.T)


def off(basis: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows [r, n], in float64, that are orthogonal to the orthonormal columns of
    a basis [n, k], k ≤ n - r."""
    start = _random(rank, len(basis), generator).to(basis.device)
    rows = orthonormal(start - (start @ basis) @ basis.T)
    return orthonormal(rows - (rows @ basis) @ basis.T)


def less(a: Tensor, basis: Tensor) -> Tensor:
    """A (I - V V^T) of A [r, n] in float64, with the orthonormal columns of V [n, k]."""
    found = a - (a @ basis) @ basis.T
    return found - (found @ basis) @ basis.T


def moved(gram: Tensor, a: Tensor, c: Tensor) -> float:
    """tr(τ C τ^T) n / (||τ||^2 tr C) of τ = B A, in float64, from B^T B [r, r] and A [r, n]: how
    far an update moves outputs on the inputs of C, 1 being as far as on inputs without any
    preferred direction. 0 of an update that is zero."""
    size = float((gram * (a @ a.T)).sum() * c.diagonal().sum())
    return float((gram * (a @ c @ a.T)).sum()) * len(c) / size if size > 0 else 0.0


def spanned(vectors: Tensor) -> Tensor:
    """Orthonormal columns [n, k] that span the rows [any, n]."""
    _, values, basis = torch.linalg.svd(vectors.double(), full_matrices=False)
    return basis[values > NOISE * values[0]].T
