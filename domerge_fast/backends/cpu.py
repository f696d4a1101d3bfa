"""The ops as C++ kernels: vectorised, threaded over problems, each problem's state in cache.

float32 arithmetic on float32, bfloat16 and float16 blocks (float64 ones are rounded to float32).
Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ..algebra.side import CODES, Side, squares, table
from . import torch as library
from .layout import addresses, dense, matrices, together
from .torch import orthogonalize_factors

__all__ = [
    "all_finite",
    "apply",
    "apply_decouple",
    "block_gram",
    "block_products",
    "entry_counts",
    "entry_merge",
    "entry_sums",
    "gram",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
]

SIGNS = {"none": 0, "total": 1, "frequency": 2}
MEANS = {"sum": 0, "count": 1, "weight": 2}
"""The numbers by which csrc/cpu/kernels.h knows them."""

MAX_DESCENT_RANK = 1024
"""Above it the library's blocked GEMM takes over: up to here the kernel was measured faster."""


def gram(problems: Sequence[Side], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """X X^T [R, R] of every problem, products and sums in `dtype` (float32 or float64)."""
    given, _alive = _described(problems)
    out, at = _results([(p.rank, p.rank) for p in problems], dtype)
    _C.gram(given, at, dtype == torch.float64, torch.get_num_threads())
    return out


def block_gram(problems: Sequence[Side]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
    given, _alive = _described(problems)
    out, at = _results([(squares(p.ranks),) for p in problems], torch.float64)
    _C.block_gram(given, at, torch.get_num_threads())
    return out


def block_products(x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Sums of x_ij y_ij over the block of every two adapters: [P, T, T] in float64."""
    left, right = matrices(x), matrices(y)
    out = torch.empty(len(x), len(ranks), len(ranks), dtype=torch.float64)
    threads = torch.get_num_threads()
    _C.block_products(addresses(left), addresses(right), list(ranks), out.data_ptr(), threads)
    return out


def orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[tuple[int, ...]],
    penalty: str = "squared",
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
) -> tuple[list[Tensor], Tensor]:
    """C [R, R] of every problem and the descent's statistics [P, 5] (see descent.STATS)."""
    small = [i for i, r in enumerate(ranks) if sum(r) <= MAX_DESCENT_RANK]
    if len(small) == len(grams):
        return _orthogonalize(grams, ranks, penalty, gamma, steps, tol)
    results: list[Tensor] = list(grams)
    stats = torch.zeros(len(grams), 5, dtype=torch.float64)
    large = sorted({*range(len(grams))} - {*small})
    for run, chosen in ((_orthogonalize, small), (library.orthogonalize, large)):
        part = [grams[i] for i in chosen], [ranks[i] for i in chosen]
        found, stats[chosen] = run(*part, penalty, gamma, steps, tol)
        for i, c in zip(chosen, found):
            results[i] = c
    return results, stats


def _orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[tuple[int, ...]],
    penalty: str,
    gamma: float,
    steps: int,
    tol: float,
) -> tuple[list[Tensor], Tensor]:
    inputs = matrices(grams)
    sizes = [sum(r) for r in ranks]
    results, at = _results([(size, size) for size in sizes], torch.float32)
    stats = torch.zeros(len(grams), 5, dtype=torch.float64)
    _C.orthogonalize(
        addresses(inputs),
        [rank for r in ranks for rank in r],
        [len(r) for r in ranks],
        at,
        stats.data_ptr(),
        penalty == "frobenius",
        gamma,
        steps,
        tol,
        torch.get_num_threads(),
    )
    return results, stats


def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Side], out_dtype: torch.dtype
) -> list[Tensor]:
    """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
    given, _alive = _described(problems)
    cs = matrices(coefficients)
    rows = [p.rank if c is None else c.shape[0] for c, p in zip(cs, problems)]
    shapes = [(p.d, k) if p.in_columns else (k, p.d) for k, p in zip(rows, problems)]
    out, at = _results(shapes, out_dtype)
    _C.apply(given, addresses(cs), rows, at, CODES[out_dtype], torch.get_num_threads())
    return [x.T if p.in_columns else x for x, p in zip(out, problems)]


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
    given, _alive = _described(problems, rows_only=True)
    cs = matrices(coefficients)
    packed = [k.contiguous() for k in blocks]
    whole = [h.contiguous() for h in full or ()]
    out, at = _results([(p.rank, p.d) for p in problems], out_dtype)
    norms, at_norms = _results([(len(p.ranks),) for p in problems], torch.float64)
    _C.apply_decouple(
        given,
        addresses(cs),
        addresses(packed),
        [w for omega in omegas for w in omega],
        scale,
        addresses(whole),
        at,
        CODES[out_dtype],
        at_norms,
        torch.get_num_threads(),
    )
    return out, norms


def truncate(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rank: int | None,
    energy: float | None,
    out_dtype: torch.dtype,
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """The best approximation of every B A: R x R by the library, the rest by kernels."""
    sides = [(Side((a,), (1.0,)), Side((b.T,), (1.0,))) for a, b in pairs]
    return library.truncate_by(gram, apply, sides, rank, energy, out_dtype)


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor (float32, bfloat16 or float16) holds neither NaN nor Inf.

    A tensor that is no dense piece of memory is copied first; a transposed one is not.
    """
    pieces = [dense(x) for x in tensors]
    codes = [CODES[x.dtype] for x in pieces]
    counts = [x.numel() for x in pieces]
    return _C.all_finite(addresses(pieces), counts, codes, torch.get_num_threads())


def entry_counts(a: Side, b: Side, prefixes: Sequence[int] | None = None) -> Tensor:
    """Counts of the upper 16 bits of |τ_i|, or of the lower 15 behind a prefix: [T, bins]."""
    (table_a, table_b), _alive = _sides(a, b)
    bins = 1 << (HIGH_BITS if prefixes is None else LOW_BITS)
    counts = torch.zeros(len(a.blocks), bins, dtype=torch.int64)
    threads = torch.get_num_threads()
    _C.entry_counts(table_a, table_b, list(prefixes or ()), counts.data_ptr(), threads)
    return counts


def entry_sums(a: Side, b: Side, trims: Sequence[Trim], draw: Draw) -> Tensor:
    """sum |τ_i| over all entries and over those that are kept: [T, 2] in float64."""
    (table_a, table_b), _alive = _sides(a, b)
    sums = torch.zeros(len(a.blocks), 2, dtype=torch.float64)
    threads = torch.get_num_threads()
    _C.entry_sums(table_a, table_b, *_rules(trims, draw), sums.data_ptr(), threads)
    return sums


def entry_merge(
    a: Side,
    b: Side,
    trims: Sequence[Trim],
    weights: Sequence[float],
    election: Election,
    draw: Draw,
    scale: float,
) -> Tensor:
    """The merged ΔW [m, n] in float32."""
    (table_a, table_b), _alive = _sides(a, b)
    merged = torch.empty(b.d, a.d)
    _C.entry_merge(
        table_a,
        table_b,
        *_rules(trims, draw),
        list(weights),
        SIGNS[election.sign],
        election.weighted,
        MEANS[election.mean],
        scale,
        merged.data_ptr(),
        torch.get_num_threads(),
    )
    return merged


def _sides(a: Side, b: Side) -> tuple[tuple[_C.Problems, _C.Problems], list[Side]]:
    """The kernels' tables of A and of B, and the sides to keep alive."""
    table_a, alive_a = _described([a], rows_only=True)
    table_b, alive_b = _described([b])
    return (table_a, table_b), alive_a + alive_b


def _rules(
    trims: Sequence[Trim], draw: Draw
) -> tuple[list[float], list[bool], int, int, list[int]]:
    numbers = [x for t in trims for x in (t.low, t.high, t.keep, t.spread, t.gain)]
    return numbers, [t.rescale for t in trims], draw.seed, draw.module, list(draw.adapters)


def _described(problems: Sequence[Side], rows_only: bool = False) -> tuple[_C.Problems, list[Side]]:
    """The kernels' table of problems, and the sides to keep alive while it is used."""
    given = table(problems, rows_only)
    return _C.Problems(given.addresses, given.heads, given.rows), given.sides


def _results(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> tuple[list[Tensor], list[int]]:
    """Memory for results, and its addresses."""
    results, places = together(shapes, dtype)
    first = results[0].data_ptr() if results else 0
    return results, [first + at * dtype.itemsize for at in places]
