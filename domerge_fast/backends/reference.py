"""The oracle of the ops: what each says, dense, in float64, sharing nothing with the fast backends.

The descent is that of `paper.py`, which has the whole of DO-Merging.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.cuts import check_cut
from ..algebra.side import Side
from .paper import ZERO_COLUMN, descend, loss
from .reference_entries import entry_counts, entry_merge, entry_sums

__all__ = [
    "apply",
    "apply_decouple",
    "block_gram",
    "block_largest",
    "block_products",
    "entry_counts",
    "entry_merge",
    "entry_sums",
    "gram",
    "largest",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
]


def gram(problems: Sequence[Side], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """X X^T [R, R], entry by entry products in float64."""
    return [_square(x).to(dtype) for x in map(_stack, problems)]


def block_gram(problems: Sequence[Side]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T, packed [sum r_i^2]."""
    return [torch.cat([_square(x).flatten() for x in _blocks(p)]) for p in problems]


def _square(x: Tensor) -> Tensor:
    """X X^T, whose upper triangle is the lower one: no library rounds them alike by duty."""
    lower = (x @ x.T).tril()
    return lower + lower.tril(-1).T


def block_products(
    x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor, ranks: Sequence[int]
) -> Tensor:
    """Sums of x_ij y_ij over the block of every two adapters: [P, T, T] in float64."""

    def sums(product: Tensor) -> Tensor:
        rows = product.split(list(ranks))
        return torch.stack([torch.stack([b.sum() for b in r.split(list(ranks), 1)]) for r in rows])

    left, right = ([m for z in side for m in (z if z.dim() == 3 else [z])] for side in (x, y))
    return torch.stack([sums(a.double() * b.double()) for a, b in zip(left, right)])


def _blocks(problem: Side) -> list[Tensor]:
    return [s * b.double() for b, s in zip(problem.blocks, problem.scales)]


def _stack(problem: Side) -> Tensor:
    return torch.cat(_blocks(problem))


def orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[tuple[int, ...]],
    penalty: str = "squared",
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
) -> tuple[list[Tensor], Tensor]:
    """C [R, R] from a descent on a stand-in X = sqrt(G) [R, R], which has the same Gram."""
    results: list[Tensor] = []
    stats = []
    for g, r in zip(grams, ranks):
        x = _square_root(g.double()).T
        x_hat, s = descend(x.split(list(r)), penalty, gamma, steps, tol)
        unit = g.double().diagonal().sqrt().reciprocal().nan_to_num(posinf=0.0)
        inverse = torch.linalg.pinv(unit[:, None] * x, hermitian=True) * unit
        eye = torch.eye(len(g), dtype=torch.float64, device=g.device)
        results.append(eye + (torch.cat(x_hat) - x) @ inverse)
        stats.append(s)
    return results, _table(stats, grams[0].device if grams else None, 5)


def orthogonalize_factors(
    problems: Sequence[Side], gamma: float = 1.0, steps: int = 50, tol: float = 1e-3
) -> tuple[list[Tensor], Tensor]:
    """Xhat [R, d] for the squared penalty, and statistics [P, 6] (factor_descent.FACTOR_STATS)."""
    results, stats = [], []
    for p in problems:
        x = _blocks(p)
        x_hat, found = descend(x, "squared", gamma, steps, tol)
        before, after = (float(loss(y, x, "squared", 0.0)) for y in (x, x_hat))
        found[3] = after / before if before else 0.0
        stats.append([*found, _scaled(x, x_hat)])
        results.append(torch.cat(x_hat))
    return results, _table(stats, problems[0].device if problems else None, 6)


def _scaled(x: Sequence[Tensor], x_hat: Sequence[Tensor]) -> float:
    """Of ||Xhat - X||^2, the share that lies along the X_i."""
    along = moved = 0.0
    for xi, yi in zip(x, x_hat):
        change, square = yi - xi, float(xi.square().sum())
        along += float((change * xi).sum()) ** 2 / square if square else 0.0
        moved += float(change.square().sum())
    return along / moved if moved else 0.0


def _table(stats: list[list[float]], device: torch.device | None, columns: int) -> Tensor:
    return torch.tensor(stats, dtype=torch.float64, device=device).view(-1, columns)


def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Side], out_dtype: torch.dtype
) -> list[Tensor]:
    """C X [K, d]."""
    products = []
    for c, p in zip(coefficients, problems):
        product = _stack(p) if c is None else c.double() @ _stack(p)
        product = product.to(out_dtype)
        products.append(product.T.contiguous().T if p.in_columns else product)
    return products


def apply_decouple(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    blocks: Sequence[Tensor],
    omegas: Sequence[Sequence[float]],
    scale: float,
    out_dtype: torch.dtype,
    full: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """A' [R, n] such that B A' is the merge of the decoupled B_i A_i, and every ||B_i A_i||_F.

    A square root of each Gram stands in for B_i: the same column norms.
    """
    results, norms = [], []
    for k, (c, p) in enumerate(zip(coefficients, problems)):
        stacked = _stack(p) if c is None else c.double() @ _stack(p)
        parts = stacked.split(list(p.ranks))
        squares = blocks[k].double().split([r * r for r in p.ranks])
        roots = [_square_root(g.view(r, r)) for g, r in zip(squares, p.ranks)]
        merged = torch.zeros_like(stacked[0])
        size, directions, sizes = torch.zeros_like(merged), [], []
        for s, x, w in zip(roots, parts, omegas[k]):
            norm = (s @ x).norm(dim=0)
            norm[norm <= ZERO_COLUMN * s.norm() * x.norm(dim=0)] = 0
            merged += abs(w) * norm
            size += abs(w) * (norm > 0)
            directions.append(torch.where(norm > 0, w * x / norm, 0.0))
            sizes.append(norm.norm())
        direction = torch.cat(directions)
        if full is not None:
            lengths = (_square_root(full[k].double()) @ direction).norm(dim=0)
            direction = torch.where(lengths > ZERO_COLUMN * size, direction / lengths, 0.0)
        results.append((scale * direction * merged).to(out_dtype))
        norms.append(torch.stack(sizes))
    return results, norms


def _square_root(gram: Tensor) -> Tensor:
    """S with S^T S = gram: that of the correlations, times the rows' sizes, which keeps the digits
    of rows that are far smaller than others."""
    sizes = gram.diagonal().clamp_min(0).sqrt()
    unit = sizes.reciprocal().nan_to_num(posinf=0.0)
    values, vectors = torch.linalg.eigh(unit[:, None] * gram * unit)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T * sizes


def truncate(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rank: int | None,
    energy: float | None,
    out_dtype: torch.dtype,
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """The dense SVD of B A, cut."""
    results, kept = [], []
    for at, (a, b) in enumerate(pairs):
        u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        total = float(s.square().sum())
        k = len(s)
        if energy is not None and total > 0:
            shares = [float(s[:i].square().sum()) / total for i in range(1, len(s) + 1)]
            k = next(i for i, share in enumerate(shares, 1) if share >= energy * (1 - 1e-12))
        elif energy is not None:
            k = 1
        k = min(k, rank or k, min(a.shape[0], len(s)))
        check_cut(s, k, at)
        half = s[:k].sqrt()
        results.append(((half[:, None] * vh[:k]).to(out_dtype), (u[:, :k] * half).to(out_dtype)))
        kept.append(float(s[:k].square().sum()) / total if total > 0 else 1.0)
    return results, kept


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """max |x| of every tensor, [N] in float64."""
    nothing = torch.zeros(1, dtype=torch.float64)
    sizes = [torch.cat([nothing.to(x.device), x.flatten().double().abs()]).max() for x in tensors]
    return torch.stack(sizes) if sizes else nothing[:0]


def block_largest(problems: Sequence[Side]) -> Tensor:
    """`largest` of every block, one after the other."""
    return largest([block for p in problems for block in p.blocks])
