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
from ..algebra.side import Side
from . import torch as library
from .layout import DTYPES, addresses, arrange, dense, matrices
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
    table, _alive = _describe(problems)
    out = [torch.empty(p.rank, p.rank, dtype=dtype) for p in problems]
    _C.gram(table, addresses(out), dtype == torch.float64, torch.get_num_threads())
    return out


def block_gram(problems: Sequence[Side]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
    table, _alive = _describe(problems)
    out = [torch.empty(sum(r * r for r in p.ranks), dtype=torch.float64) for p in problems]
    _C.block_gram(table, addresses(out), torch.get_num_threads())
    return out


def block_products(x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Sums of x_ij y_ij over the block of every two adapters: [P, T, T] in float64."""
    left = [m.float().contiguous() for m in x]
    right = [m.float().contiguous() for m in y]
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
    stats = torch.zeros(len(grams), 5, dtype=torch.float64)
    results: list[Tensor] = list(grams)
    small = [i for i, g in enumerate(grams) if g.shape[0] <= MAX_DESCENT_RANK]
    large = [i for i, g in enumerate(grams) if g.shape[0] > MAX_DESCENT_RANK]
    if large:
        chosen = [grams[i] for i in large]
        found, stats[large] = library.orthogonalize(
            chosen, [ranks[i] for i in large], penalty, gamma, steps, tol
        )
        for i, c in zip(large, found):
            results[i] = c
    inputs = [grams[i].float().contiguous() for i in small]
    outputs = [torch.empty_like(g) for g in inputs]
    rows = torch.zeros(len(small), 5, dtype=torch.float64)
    _C.orthogonalize(
        addresses(inputs),
        [r for i in small for r in ranks[i]],
        [len(ranks[i]) for i in small],
        addresses(outputs),
        rows.data_ptr(),
        penalty == "frobenius",
        gamma,
        steps,
        tol,
        torch.get_num_threads(),
    )
    stats[small] = rows
    for i, c in zip(small, outputs):
        results[i] = c
    return results, stats


def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Side], out_dtype: torch.dtype
) -> list[Tensor]:
    """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
    table, _alive = _describe(problems)
    cs = matrices(coefficients)
    rows = [p.rank if c is None else c.shape[0] for c, p in zip(cs, problems)]
    out = [
        torch.empty(p.d, k, dtype=out_dtype).T
        if p.in_columns
        else torch.empty(k, p.d, dtype=out_dtype)
        for k, p in zip(rows, problems)
    ]
    code, threads = DTYPES[out_dtype], torch.get_num_threads()
    _C.apply(table, addresses(cs), rows, addresses(out), code, threads)
    return out


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
    table, _alive = _describe(problems, rows_only=True)
    cs = matrices(coefficients)
    packed = [k.contiguous() for k in blocks]
    whole = [h.contiguous() for h in full or ()]
    out = [torch.empty(p.rank, p.d, dtype=out_dtype) for p in problems]
    norms = [torch.empty(len(p.blocks), dtype=torch.float64) for p in problems]
    _C.apply_decouple(
        table,
        addresses(cs),
        addresses(packed),
        [w for omega in omegas for w in omega],
        scale,
        addresses(whole),
        addresses(out),
        DTYPES[out_dtype],
        addresses(norms),
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
    codes = [DTYPES[x.dtype] for x in pieces]
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


def _sides(a: Side, b: Side) -> tuple[tuple[_C.Problems, _C.Problems], list[Tensor]]:
    """The kernels' tables of A and of B, and the tensors to keep alive."""
    table_a, alive_a = _describe([a], rows_only=True)
    table_b, alive_b = _describe([b])
    return (table_a, table_b), alive_a + alive_b


def _rules(
    trims: Sequence[Trim], draw: Draw
) -> tuple[list[float], list[bool], int, int, list[int]]:
    numbers = [x for t in trims for x in (t.low, t.high, t.keep, t.spread, t.gain)]
    return numbers, [t.rescale for t in trims], draw.seed, draw.module, list(draw.adapters)


def _describe(
    problems: Sequence[Side], rows_only: bool = False
) -> tuple[_C.Problems, list[Tensor]]:
    """The kernels' table of problems, and the tensors to keep alive while it is used."""
    alive: list[Tensor] = []
    pitches: list[int] = []
    columns = [p.in_columns and not rows_only for p in problems]
    for p, in_columns in zip(problems, columns):
        arranged, steps = arrange(p, in_columns)
        alive += arranged
        pitches += steps
    table = _C.Problems(
        addresses(alive),
        [r for p in problems for r in p.ranks],
        pitches,
        [DTYPES[block.dtype] for block in alive],
        [scale for p in problems for scale in p.scales],
        [len(p.blocks) for p in problems],
        [p.d for p in problems],
        columns,
    )
    return table, alive
