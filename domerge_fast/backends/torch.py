"""The ops in factor space in plain PyTorch: any device, and the fallback of every other backend."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ..problem import Problem
from . import descent

ZERO_COLUMN = 1e-6
"""A column of B_i A_i below this share of ||B_i|| ||a|| is rounding noise: its direction is 0."""

BATCH_BYTES = 64 << 20
"""What one batch of problems may hold in each of its buffers."""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the caller has allowed for training."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


@full_precision()
def gram(problems: Sequence[Problem], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """X X^T [R, R] of every problem, products and sums in `dtype`."""
    stacks = (p.stack(dtype) for p in problems)
    return [x @ x.T for x in stacks]


def block_gram(problems: Sequence[Problem]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
    return [
        torch.cat([(s * s * (b.double() @ b.double().T)).flatten() for b, s in _parts(p)])
        for p in problems
    ]


def _parts(problem: Problem) -> zip[tuple[Tensor, float]]:
    return zip(problem.blocks, problem.scales)


@full_precision()
def block_products(x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Sums of x_ij y_ij over the block of every two adapters: [P, T, T] in float64."""
    owner = torch.repeat_interleave(torch.tensor(ranks, device=x[0].device))
    member = torch.nn.functional.one_hot(owner, len(ranks)).double()
    return member.T @ (torch.stack(list(x)).double() * torch.stack(list(y)).double()) @ member


def orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[tuple[int, ...]],
    penalty: str = "squared",
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
) -> tuple[list[Tensor], Tensor]:
    """C [R, R] of every problem and the descent's statistics [P, 5] (see descent.STATS)."""
    results: list[Tensor] = list(grams)
    device = grams[0].device if grams else None
    stats = torch.zeros(len(grams), len(descent.STATS), dtype=torch.float64, device=device)
    for batch in _batches([tuple(r) for r in ranks], [g.nbytes for g in grams]):
        stacked = torch.stack([grams[i] for i in batch])
        c, batch_stats = descent.in_gram_form(
            stacked, tuple(ranks[batch[0]]), penalty, gamma, steps, tol
        )
        stats[batch] = batch_stats
        for i, matrix in zip(batch, c):
            results[i] = matrix.clone()
    return results, stats


def _batches(kinds: Sequence[Hashable], sizes: Sequence[int]) -> list[list[int]]:
    """Positions of the same kind, in batches of at most BATCH_BYTES (or one)."""
    alike: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(i)
    batches = []
    for members in alike.values():
        count = max(1, BATCH_BYTES // max(1, sizes[members[0]]))
        batches += [members[k : k + count] for k in range(0, len(members), count)]
    return batches


def orthogonalize_factors(
    problems: Sequence[Problem], gamma: float = 1.0, steps: int = 50, tol: float = 1e-3
) -> tuple[list[Tensor], Tensor]:
    """Xhat [R, d] in float32 (squared penalty) where R > d, and statistics [P, 5].

    In float64: the overlap is a difference of sums that the largest adapter dominates.
    """
    results = [
        descent.in_factor_form(p.stack(torch.float64), p.ranks, gamma, steps, tol) for p in problems
    ]
    stats = torch.stack([s for _, s in results]) if results else torch.zeros(0, 5).double()
    return [x.float().contiguous() for x, _ in results], stats


@full_precision()
def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Problem], out_dtype: torch.dtype
) -> list[Tensor]:
    """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
    results = []
    for c, p in zip(coefficients, problems):
        x = p.stack(torch.float32)
        if c is not None:
            c = c.float()
            x = (x.T @ c.T).T if p.in_columns else c @ x
        results.append(x.to(out_dtype))
    return results


@full_precision()
def apply_decouple(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Problem],
    blocks: Sequence[Tensor],
    omegas: Sequence[Sequence[float]],
    scale: float,
    out_dtype: torch.dtype,
    full: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """A' [R, n] and the adapters' norms ||B_i A_i||_F [T] in float64, of every problem."""
    results = []
    for k, (c, p) in enumerate(zip(coefficients, problems)):
        a = p.stack(torch.float32)
        a = a if c is None else c.float() @ a
        whole = None if full is None else full[k]
        results.append(_decouple(a, p.ranks, blocks[k], omegas[k], scale, out_dtype, whole))
    return [a for a, _ in results], [norms for _, norms in results]


def _decouple(
    a: Tensor,
    ranks: tuple[int, ...],
    packed: Tensor,
    omega: Sequence[float],
    scale: float,
    out_dtype: torch.dtype,
    full: Tensor | None,
) -> tuple[Tensor, Tensor]:
    owner = torch.repeat_interleave(torch.tensor(ranks, device=a.device))
    grams = [k.view(r, r) for k, r in zip(packed.split([r * r for r in ranks]), ranks)]
    magnitudes = torch.stack([_norms(root(g), x) for g, x in zip(grams, a.split(list(ranks)))])
    present = magnitudes > 0  # [T, n]
    inverse = torch.where(present, 1 / magnitudes, 0.0)
    signed = torch.tensor(omega, dtype=a.dtype, device=a.device)[:, None]
    merged = (signed.abs() * magnitudes).sum(0)  # [n]
    if full is not None:
        # In units of ||B_i||, so that adapters of very different sizes fit into one product.
        sizes = torch.stack([g.trace() for g in grams]).clamp_min(0).sqrt()
        balance = torch.where(sizes > 0, 1 / sizes, 0.0)[owner]
        directions = a * (signed * sizes.to(a.dtype)[:, None] * inverse)[owner]
        square_root = root(balance[:, None] * full * balance).to(a.dtype)
        norms = torch.linalg.vector_norm(square_root @ directions, dim=0)
        floor = ZERO_COLUMN * (signed.abs() * present).sum(0)
        merged = torch.where(norms > floor, merged / norms, 0.0)
    result = a * (scale * signed * merged * inverse)[owner]
    return result.to(out_dtype).contiguous(), magnitudes.square().sum(1, dtype=torch.float64).sqrt()


def _norms(square_root: Tensor, a: Tensor) -> Tensor:
    """||S a_c|| of every column, 0 where it is rounding noise."""
    norms = torch.linalg.vector_norm(square_root.to(a.dtype) @ a, dim=0)
    floor = ZERO_COLUMN * square_root.norm().to(a.dtype) * torch.linalg.vector_norm(a, dim=0)
    return torch.where(norms > floor, norms, 0.0)


def root(gram: Tensor) -> Tensor:
    """S with S^T S = gram [r, r], for a positive semidefinite gram in float64."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def truncate(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rank: int | None,
    energy: float | None,
    out_dtype: torch.dtype,
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """The best approximation of every B A (A [R, n], B [m, R]) of rank k, and the energy it keeps.

    k is the smallest rank that keeps the share `energy` of ||B A||_F^2, at most `rank`. The
    result is balanced: with B A = U S V^T cut to k, B = U sqrt(S) and A = sqrt(S) V^T.
    """
    results: list[tuple[Tensor, Tensor]] = list(pairs)
    kept = [1.0] * len(pairs)
    shapes = [(a.shape, b.shape) for a, b in pairs]
    sizes = [8 * (a.numel() + b.numel()) for a, b in pairs]
    for batch in _batches(shapes, sizes):
        a = torch.stack([pairs[i][0] for i in batch]).double()
        b = torch.stack([pairs[i][1] for i in batch]).double()
        balance = _balance(a, b)
        left = _Orthonormal(b * balance[:, None])
        right = _Orthonormal((a / balance[..., None]).mT)
        u, s, vh = torch.linalg.svd(left.core @ right.core.mT, full_matrices=False)
        for k, (i, values) in enumerate(zip(batch, s.cpu())):
            count, kept[i] = cut(values, rank, energy)
            half = s[k, :count].sqrt()
            results[i] = (
                right.expand(k, vh[k, :count].T * half).T.to(out_dtype).contiguous(),
                left.expand(k, u[k, :, :count] * half).to(out_dtype).contiguous(),
            )
    return results, kept


def _balance(a: Tensor, b: Tensor) -> Tensor:
    """What brings row k of A and column k of B to one norm, [P, R]: neither side alone may decide
    which part of B A is rounding noise."""
    rows = torch.linalg.vector_norm(a, dim=2)
    columns = torch.linalg.vector_norm(b, dim=1)
    return torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), 1.0)


def cut(singular_values: Tensor, rank: int | None, energy: float | None) -> tuple[int, float]:
    """How many singular values to keep (at least one), and their share of the energy."""
    cumulative = singular_values.double().square().cumsum(0)
    total = float(cumulative[-1])
    k = len(singular_values)
    if energy is not None:
        k = 1 + int((cumulative < energy * total * (1 - 1e-12)).sum())
    if rank is not None:
        k = min(k, rank)
    k = min(k, len(singular_values))
    return k, float(cumulative[k - 1]) / total if total > 0 else 1.0


class _Orthonormal:
    """X [P, d, R] in float64 as Q core, Q with orthonormal columns; Q is not formed if R <= d.

    X = Q sqrt(L) W^T from the eigenvalues of X^T X = W L W^T. In float64 the squaring loses
    singular values below 1e-8 of the largest, less than the float32 factors hold.
    """

    def __init__(self, x: Tensor) -> None:
        self.q = None
        self.x = x
        if x.shape[2] > x.shape[1]:
            self.q, self.core = torch.linalg.qr(x)
            return
        values, vectors = torch.linalg.eigh(x.mT @ x)
        support = values > values[:, -1:].clamp_min(0) * 1e-14
        half = values.where(support, 0.0).sqrt()
        self.core = half[..., None] * vectors.mT
        self.back = vectors * torch.where(support, 1 / half, 0.0)[:, None]

    def expand(self, k: int, y: Tensor) -> Tensor:
        """Q y [d, columns] of the k-th X."""
        if self.q is not None:
            return self.q[k] @ y
        return self.x[k] @ (self.back[k] @ y)


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor holds neither NaN nor Inf."""
    return [bool(torch.isfinite(x).all()) for x in tensors]
