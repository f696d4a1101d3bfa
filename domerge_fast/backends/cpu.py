"""The ops as C++ kernels: vectorised, threaded over problems, each problem's state in cache.

float32 arithmetic on float32, bfloat16 and float16 blocks (float64 ones are rounded to float32).
Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..algebra.described import bits
from ..algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ..algebra.side import CODES, Side, squares, table
from ..storage.buffers import packed
from . import long_products
from . import torch as by_torch
from .descent_rates import CPU, MAX_DESCENT_RANK, Rates
from .factor_descent import FACTOR_STATS, HALF_SHARE, LEAST_SHARE, in_factor_form, takes_half
from .layout import addresses, dense, matrices, placed, repeated, row_major
from .singly import Singly, each, joined

__all__ = [
    "BATCHES",
    "SEES_FINITE",
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
]

BATCHES = True
"""Ops take sides of several modules."""

SEES_FINITE = True
"""`apply` and `apply_decouple` tell which of their results they saw to be finite."""

SIGNS = {"none": 0, "total": 1, "frequency": 2}
MEANS = {"sum": 0, "count": 1, "weight": 2}
"""The numbers by which csrc/cpu/kernels.h knows them."""

SIZED = {**CODES, torch.float64: len(CODES)}
"""The dtypes whose size can be told, by the numbers of csrc/common/problem.h."""

library = Singly(by_torch)


def gram(problems: Sequence[Side], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """X X^T [R, R] of every problem, products and sums in `dtype` (float32 or float64)."""
    given, _alive = _described(problems)
    out, at = _results([(p.rank, p.rank) for p in problems], dtype, problems)
    _C.gram(given, at, dtype == torch.float64, torch.get_num_threads())
    return out


def block_gram(problems: Sequence[Side]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
    given, _alive = _described(problems)
    out, at = _results([(squares(p.ranks),) for p in problems], torch.float64, problems)
    _C.block_gram(given, at, torch.get_num_threads())
    return out


def block_products(
    x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor, ranks: Sequence[int]
) -> Tensor:
    """Sums of x_ij y_ij over the block of every two adapters: [P, T, T] in float64."""
    left, right = (matrices([z] if isinstance(z, Tensor) else z) for z in (x, y))
    places = addresses(left), addresses(right)
    out = torch.empty(len(places[0]), len(ranks), len(ranks), dtype=torch.float64)
    _C.block_products(*places, list(ranks), out.data_ptr(), torch.get_num_threads())
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
    small = [sum(r) <= MAX_DESCENT_RANK for r in ranks]
    if all(small):
        return _orthogonalize(grams, ranks, penalty, gamma, steps, tol)
    results: list[Tensor] = list(grams)
    stats: list[Tensor] = list(grams)
    for run, is_small in ((_orthogonalize, True), (library.orthogonalize, False)):
        chosen = [i for i, x in enumerate(small) if x == is_small]
        if chosen:
            part = [grams[i] for i in chosen], [ranks[i] for i in chosen]
            found, rows = run(*part, penalty, gamma, steps, tol)
            counts = [len(x) if x.dim() == 3 else 1 for x in found]
            for i, c, own in zip(chosen, found, rows.split(counts)):
                results[i], stats[i] = c, own
    return results, torch.cat(stats)


def _orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[tuple[int, ...]],
    penalty: str,
    gamma: float,
    steps: int,
    tol: float,
) -> tuple[list[Tensor], Tensor]:
    inputs = matrices(grams)
    shapes = [g.shape for g in grams]
    counts = [shape[0] if len(shape) == 3 else None for shape in shapes]
    results, at = placed([shape[-2:] for shape in shapes], torch.float32, counts=counts)
    modules = [1 if count is None else count for count in counts]
    stats = torch.zeros(len(at), 5, dtype=torch.float64)
    _C.orthogonalize(
        addresses(inputs),
        repeated(zip([_numbers(tuple(r)) for r in ranks], modules)),
        repeated(zip([_numbers((len(r),)) for r in ranks], modules)),
        at,
        stats.data_ptr(),
        penalty == "frobenius",
        gamma,
        steps,
        tol,
        torch.get_num_threads(),
    )
    return results, stats


def orthogonalize_factors(
    problems: Sequence[Side], gamma: float = 1.0, steps: int = 50, tol: float = 1e-3
) -> tuple[list[Tensor], Tensor]:
    """Xhat [R, d] in float32, and statistics [P, 6] (factor_descent.FACTOR_STATS).

    Sums are float32; products of factors rounded to bfloat16 where `tol` allows and that is
    faster, else of float32, or of float64 by the library, where the pairs of two adapters are too
    small a share of all.
    """
    counts, problems = [p.count for p in problems], each(problems)
    results: list[Tensor] = [torch.empty(0)] * len(problems)
    stats = torch.zeros(len(problems), len(FACTOR_STATS), dtype=torch.float64)
    rest = list(range(len(problems)))
    halved = [i for i in rest if _takes_half(problems[i].rank, problems[i].d, tol)]
    rest = sorted({*rest} - {*halved})
    rest += _on_factors(problems, halved, True, (gamma, steps, tol), results, stats)
    rest = _on_factors(problems, rest, False, (gamma, steps, tol), results, stats)
    for i in rest:
        wide_x = problems[i].stack(torch.float64)
        x_hat, stats[i] = in_factor_form(wide_x, problems[i].ranks, gamma, steps, tol)
        results[i] = x_hat.float().contiguous()
    return joined(results, counts), stats


def _takes_half(rank: int, d: int, tol: float) -> bool:
    """Whether products on the factors are tried in bfloat16."""
    return _C.half_products() and takes_half(rank, d, tol)


def descent_rates(rank: int, d: int, tol: float) -> Rates:
    """Those that choose the form of a descent."""
    return CPU[_C.isa()].of(rank, _takes_half(rank, d, tol))


def _on_factors(
    problems: Sequence[Side],
    chosen: Sequence[int],
    half: bool,
    rule: tuple[float, int, float],
    results: list[Tensor],
    stats: Tensor,
) -> list[int]:
    """Sets the results and statistics of the problems chosen; returns those that these products
    are not enough for."""
    if not chosen:
        return []
    sides = [problems[i] for i in chosen]
    given, _alive = _described(sides, rows_only=True)
    found, at = _results([(p.rank, p.d) for p in sides], torch.float32, sides, kept=True)
    table = torch.zeros(len(sides), len(FACTOR_STATS) + 1, dtype=torch.float64)
    _C.orthogonalize_factors(given, at, table.data_ptr(), half, *rule, torch.get_num_threads())
    least = HALF_SHARE if half else LEAST_SHARE
    enough = (table[:, -1] >= least).tolist()
    for i, x, row, is_enough in zip(chosen, found, table, enough):
        if is_enough:
            results[i], stats[i] = x, row[:-1]
    return [i for i, is_enough in zip(chosen, enough) if not is_enough]


def apply(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    out_dtype: torch.dtype,
    finite: list[Tensor] | None = None,
) -> list[Tensor]:
    """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
    if any(map(long_products.is_long, coefficients, problems)):
        return long_products.apart(apply, coefficients, problems, out_dtype)
    given, _alive = _described(problems)
    cs = matrices(coefficients)
    rows = [p.rank if c is None else c.shape[-2] for c, p in zip(cs, problems)]
    turned = [p.in_columns for p in problems]
    shapes = [(p.d, k) if t else (k, p.d) for k, p, t in zip(rows, problems, turned)]
    out, at = _results(shapes, out_dtype, problems, turned, kept=True)
    counts = repeated([(_numbers((k,)), p.modules) for k, p in zip(rows, problems)])
    code, threads = CODES[out_dtype], torch.get_num_threads()
    seen = torch.empty(len(at), dtype=torch.bool)
    _C.apply(given, addresses(cs, problems), counts, at, code, seen.data_ptr(), threads)
    _note(finite, out, seen, problems)
    return out


def apply_decouple(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    blocks: Sequence[Tensor],
    omegas: Sequence[Sequence[float]],
    scale: float,
    out_dtype: torch.dtype,
    full: Sequence[Tensor] | None = None,
    finite: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """A' [R, n] and the adapters' norms ||B_i A_i||_F [T] in float64, of every problem."""
    given, _alive = _described(problems, rows_only=True)
    cs = matrices(coefficients)
    rows = [k if k.stride(-1) == 1 else k.contiguous() for k in blocks]
    whole = [row_major(h) for h in full or ()]
    out, at = _results([(p.rank, p.d) for p in problems], out_dtype, problems, kept=True)
    shapes = [(len(p.ranks),) for p in problems]
    norms, at_norms = _results(shapes, torch.float64, problems)
    seen = torch.empty(len(at), dtype=torch.bool)
    _C.apply_decouple(
        given,
        addresses(cs, problems),
        addresses(rows, dims=1),
        repeated([(bits(omega), p.modules) for omega, p in zip(omegas, problems)]),
        scale,
        addresses(whole),
        at,
        CODES[out_dtype],
        at_norms,
        seen.data_ptr(),
        torch.get_num_threads(),
    )
    _note(finite, out, seen, problems)
    return out, norms


def _note(
    finite: list[Tensor] | None, results: list[Tensor], seen: Tensor, problems: Sequence[Side]
) -> None:
    """Adds the results that are finite; seen: whether that of every module is."""
    if finite is None:
        return
    if bool(seen.all()):
        finite += results
        return
    of_results = seen.split([p.modules for p in problems])
    finite += [x for x, own in zip(results, of_results) if bool(own.all())]


def truncate(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rank: int | None,
    energy: float | None,
    out_dtype: torch.dtype,
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """The best approximation of every B A: R x R by the library, the rest by kernels."""
    sides = [(Side((a,), (1.0,)), Side((b.T,), (1.0,))) for a, b in pairs]
    return library.truncate_by(gram, apply, sides, rank, energy, out_dtype)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """max |x| of every tensor, [N] in float64; NaN and Inf where there are such.

    A tensor that is no dense piece of memory is copied first; a transposed one is not.
    """
    pieces = [dense(x) for x in tensors]
    codes = [SIZED[x.dtype] for x in pieces]
    counts = [x.numel() for x in pieces]
    out = torch.empty(len(pieces), dtype=torch.float64)
    places = [x.data_ptr() for x in pieces]
    _C.largest(places, counts, codes, out.data_ptr(), torch.get_num_threads())
    return out


def block_largest(problems: Sequence[Side]) -> Tensor:
    """`largest` of every block, one after the other."""
    if any(p.described is None for p in problems):  # some would be copied, or rounded
        return largest([block for p in problems for block in p.blocks])
    given, _alive = _described(problems)
    count = sum([p.modules * len(p.ranks) for p in problems])
    out = torch.empty(count, dtype=torch.float64)
    _C.block_largest(given, out.data_ptr(), torch.get_num_threads())
    return out


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


@functools.lru_cache(maxsize=1 << 14)
def _numbers(values: tuple[int, ...]) -> bytes:
    """`packed`, of a few that are asked for again and again."""
    return packed(values)


def _described(problems: Sequence[Side], rows_only: bool = False) -> tuple[_C.Problems, list[Side]]:
    """The kernels' table of problems, and the sides to keep alive while it is used."""
    given = table(problems, rows_only)
    return _C.Problems(given.addresses, given.heads, given.rows), given.sides


def _results(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    problems: Sequence[Side],
    turned: Sequence[bool] | None = None,
    kept: bool = False,
) -> tuple[list[Tensor], memoryview]:
    """Memory for results of every problem, and its addresses; see `placed`."""
    counts = [p.count for p in problems]
    return placed(shapes, dtype, counts=counts, turned=turned, kept=kept)
