"""The ops in factor space in plain PyTorch: any device, and the fallback of every other backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..algebra.cuts import cut
from ..algebra.full_precision import full_precision
from ..algebra.powers import magnitude
from ..algebra.roots import ZERO_COLUMN, column_norms, root
from ..algebra.side import Side, owners
from ..algebra.truncation import NOISE, truncated
from . import descent
from .descent_rates import TORCH, Rates
from .factor_descent import FACTOR_STATS, in_factor_form
from .torch_entries import entry_counts, entry_merge, entry_sums

__all__ = [
    "apply",
    "apply_decouple",
    "block_gram",
    "block_largest",
    "block_products",
    "descent_rates",
    "entry_counts",
    "entry_merge",
    "entry_sums",
    "gram",
    "largest",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
    "truncate_by",
]

BATCH_BYTES = 64 << 20
"""What one batch of problems may hold in each of its buffers."""


def gram(problems: Sequence[Side], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """X X^T [R, R] of every problem, products and sums in `dtype`."""
    wide = [full_precision(p.device, dtype) for p in problems]
    return [_square(p.stack(w)).to(dtype) for p, w in zip(problems, wide)]


def _square(x: Tensor) -> Tensor:
    """X X^T, symmetric to the bit: libraries may round (i, j) and (j, i) differently."""
    product = x @ x.T
    return product.tril() + product.tril(-1).T


def block_gram(problems: Sequence[Side]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
    return [
        torch.cat([(s * s * _square(b.double())).flatten() for b, s in _parts(p)]) for p in problems
    ]


def _parts(problem: Side) -> zip[tuple[Tensor, float]]:
    return zip(problem.blocks, problem.scales)


def block_products(
    x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor, ranks: Sequence[int]
) -> Tensor:
    """Sums of x_ij y_ij over the block of every two adapters: [P, T, T] in float64."""
    owner = owners(ranks, x[0].device)
    member = torch.nn.functional.one_hot(owner, len(ranks)).double()
    if isinstance(x, Tensor) or x[0].dim() == 2:
        x, y = ([m if isinstance(m, Tensor) else torch.stack(list(m))] for m in (x, y))
    return torch.cat([member.T @ (a.double() * b.double()) @ member for a, b in zip(x, y)])


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
        stacked = stacked.to(full_precision(stacked.device, stacked.dtype))
        c, batch_stats = descent.in_gram_form(
            stacked, tuple(ranks[batch[0]]), penalty, gamma, steps, tol
        )
        stats[batch] = batch_stats
        for i, matrix in zip(batch, c):
            results[i] = matrix.to(grams[i].dtype, copy=True)
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
    problems: Sequence[Side], gamma: float = 1.0, steps: int = 50, tol: float = 1e-3
) -> tuple[list[Tensor], Tensor]:
    """Xhat [R, d] in float32, and statistics [P, 6] (factor_descent.FACTOR_STATS).

    In float32, or in float64 where that does not suffice (factor_descent.LEAST_SHARE); on a GPU
    with products of bfloat16 numbers where `tol` allows.
    """
    results = [
        in_factor_form(p.stack(full_precision(p.device)), p.ranks, gamma, steps, tol)
        for p in problems
    ]
    none = torch.zeros(0, len(FACTOR_STATS), dtype=torch.float64)
    stats = torch.stack([s for _, s in results]) if results else none
    return [x.float().contiguous() for x, _ in results], stats


def descent_rates(rank: int, d: int, tol: float) -> Rates:
    """Those that choose the form of a descent: the same for all shapes."""
    return TORCH


def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Side], out_dtype: torch.dtype
) -> list[Tensor]:
    """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
    results = []
    for c, p in zip(coefficients, problems):
        x = p.stack(full_precision(p.device))
        if c is not None:
            c = c.to(x.dtype)
            x = (x.T @ c.T).T if p.in_columns else c @ x
        results.append(x.to(out_dtype))
    return results


def apply_decouple(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    blocks: Sequence[Tensor],
    omegas: Sequence[Sequence[float]],
    scale: float,
    out_dtype: torch.dtype,
    full: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """A' [R, n] and the adapters' norms ||B_i A_i||_F [T] in float64, of every problem."""
    grams = [
        [k.view(r, r) for k, r in zip(packed.split([r * r for r in p.ranks]), p.ranks)]
        for packed, p in zip(blocks, problems)
    ]
    every = iter(_roots([k for own in grams for k in own]))
    roots = [[next(every) for _ in own] for own in grams]
    inner = None if full is None else _inner(grams, full)
    results = []
    for k, (c, p) in enumerate(zip(coefficients, problems)):
        a = p.stack(full_precision(p.device))
        a = a if c is None else c.to(a.dtype) @ a
        of_all = None if inner is None else inner[k]
        result, norms = _decouple(a, roots[k], omegas[k], scale, of_all)
        results.append((result.to(out_dtype).contiguous(), norms))
    return [a for a, _ in results], [norms for _, norms in results]


def _roots(grams: Sequence[Tensor]) -> list[Tensor]:
    """`root` of every matrix, of those of a size in one decomposition."""
    found = list(grams)
    for batch in _batches([len(g) for g in grams], [g.nbytes for g in grams]):
        for i, own in zip(batch, root(torch.stack([grams[i] for i in batch]))):
            found[i] = own
    return found


def _inner(grams: Sequence[Sequence[Tensor]], full: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """||B_i|| [T] of every problem, and S [R, R] with S^T S = B^T B in units of them: adapters of
    very different sizes fit into one product."""
    sizes = [torch.stack([k.trace() for k in own]).clamp_min(0).sqrt() for own in grams]
    balanced = []
    for own, size, whole in zip(grams, sizes, full):
        inverse = torch.where(size > 0, 1 / size, 0.0)[_owner(own)]
        balanced.append(inverse[:, None] * whole * inverse)
    return list(zip(sizes, _roots(balanced)))


def _owner(blocks: Sequence[Tensor]) -> Tensor:
    """Whose every row of the stacked blocks is: [R]."""
    return owners([len(x) for x in blocks], blocks[0].device)


def _decouple(
    a: Tensor,
    roots: Sequence[Tensor],
    omega: Sequence[float],
    scale: float,
    inner: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """A' [R, n] of C A, and the adapters' norms. inner: see _inner."""
    owner = _owner(roots)
    parts = a.split([len(s) for s in roots])
    magnitudes = torch.stack([column_norms(s, x) for s, x in zip(roots, parts)])
    present = magnitudes > 0  # [T, n]
    inverse = torch.where(present, 1 / magnitudes, 0.0)
    signed = torch.tensor(omega, dtype=a.dtype, device=a.device)[:, None]
    merged = (signed.abs() * magnitudes).sum(0)  # [n]
    if inner is not None:
        sizes, square_root = (x.to(a.dtype) for x in inner)
        directions = a * (signed * sizes[:, None] * inverse)[owner]
        norms = torch.linalg.vector_norm(square_root @ directions, dim=0)
        floor = ZERO_COLUMN * (signed.abs() * present).sum(0)
        merged = torch.where(norms > floor, merged / norms, 0.0)
    result = a * (scale * signed * merged * inverse)[owner]
    return result, magnitudes.square().sum(1, dtype=torch.float64).sqrt()


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
    sides = [(Side((a,), (1.0,)), Side((b.T,), (1.0,))) for a, b in pairs]
    return truncate_by(gram, apply, sides, rank, energy, out_dtype)


Gram = Callable[[Sequence[Side], torch.dtype], list[Tensor]]
Apply = Callable[[Sequence[Tensor | None], Sequence[Side], torch.dtype], list[Tensor]]


def truncate_by(
    gram: Gram,
    apply: Apply,
    sides: Sequence[tuple[Side, Side]],
    rank: int | None,
    energy: float | None,
    out_dtype: torch.dtype,
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """`truncate` of the A and B sides of modules, with a backend's own gram and apply.

    Two reads of the factors, for float64 Grams and for the result's float32 products; what lies
    between is R x R and in float64. Where R > m or R > n, B A is formed: it is then smaller than
    its factors.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    kept = [1.0] * len(sides)
    for i, (a, b) in enumerate(sides):
        if a.rank > min(a.d, b.d):
            a_k, b_k, kept[i] = _truncate_dense(a, b, rank, energy, i)
            results[i] = a_k.to(out_dtype).contiguous(), b_k.to(out_dtype).contiguous()
    small = [i for i in range(len(sides)) if i not in results]
    problems = [side for i in small for side in sides[i]]
    grams = gram(problems, torch.float64)
    coefficients = list(grams)
    for batch in _batches([len(g) for g in grams[::2]], [2 * g.nbytes for g in grams[::2]]):
        gram_a, gram_b = (torch.stack([grams[2 * p + side] for p in batch]) for side in (0, 1))
        at = [small[p] for p in batch]
        for p, part in zip(batch, truncated(gram_a, gram_b, rank, energy, at)):
            dtype = torch.float64 if part.cancels else torch.float32
            coefficients[2 * p : 2 * p + 2] = part.a.to(dtype), part.b.to(dtype)
            kept[small[p]] = part.kept
    factors = _products(apply, coefficients, problems, out_dtype)
    for i, a_k, bt_k in zip(small, factors[::2], factors[1::2]):
        results[i] = a_k.contiguous(), bt_k.T.contiguous()
    return [results[i] for i in range(len(sides))], kept


def _products(
    apply: Apply, coefficients: Sequence[Tensor], problems: Sequence[Side], dtype: torch.dtype
) -> list[Tensor]:
    """C X of every problem, in float64 where C is."""
    results = {
        i: (c @ p.stack(torch.float64)).to(dtype)
        for i, (c, p) in enumerate(zip(coefficients, problems))
        if c.dtype == torch.float64
    }
    rest = [i for i in range(len(problems)) if i not in results]
    found = apply([coefficients[i] for i in rest], [problems[i] for i in rest], dtype)
    results.update(zip(rest, found))
    return [results[i] for i in range(len(problems))]


def _truncate_dense(
    a: Side, b: Side, rank: int | None, energy: float | None, at: int
) -> tuple[Tensor, Tensor, float]:
    """A_k [k, n] and B_k [m, k] in float64, and the energy kept, from B A [m, n]."""
    delta = b.stack(torch.float64).T @ a.stack(torch.float64)
    tall = delta if len(delta) >= delta.shape[1] else delta.T
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    s = values.flip(0).clamp_min(0).sqrt()
    count, share = cut(s.cpu(), rank, energy, at)
    half, v = s[:count].sqrt(), vectors.flip(1)[:, :count]
    noise = NOISE * s[0]
    left = tall @ v * torch.where(s[:count] > noise, 1 / half, 0.0)
    right = (v * half).T
    return (right, left, share) if tall is delta else (left.T, right.T, share)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """max |x| of every tensor, [N] in float64; NaN and Inf where there are such."""
    device = tensors[0].device if tensors else None
    found = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    for k, x in enumerate(tensors):
        if x.numel():
            found[k] = magnitude(x)
    return found


def block_largest(problems: Sequence[Side]) -> Tensor:
    """`largest` of every block, one after the other."""
    return largest([block for p in problems for block in p.blocks])
