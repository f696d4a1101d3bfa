"""Elementwise ops on updates τ_i = s_i B_i A_i that are made tile by tile. See ../../entries.py.

τ is summed by fma, row of A after row of A, not by tl.dot, which has an order of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....algebra.entry_rules import LOW_BITS, Election
from ..entries import MEANS, SIGNS, Updates
from .tiles import ELEMENTS

__all__ = ["entry_counts", "entry_merge", "entry_sums"]

ROWS = 32
COLUMNS = 64
PARTS = tl.constexpr(16)  # in which a row is summed: its columns, one chunk after the other
ROWS_IN_PARTS = 64
UNROLLED = tl.constexpr(16)  # loads on their way while others are summed
SIGN_NONE, SIGN_FREQUENCY = tl.constexpr(SIGNS["none"]), tl.constexpr(SIGNS["frequency"])
MEAN_SUM, MEAN_WEIGHT = tl.constexpr(MEANS["sum"]), tl.constexpr(MEANS["weight"])


@triton.jit
def _number(at):
    """A float64 in a table of int64, as float32."""
    return tl.load(at).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _factor(blocks, problem, i, ELEMENT: tl.constexpr):
    """Where adapter i's block begins, and the steps to its next row and column."""
    block = blocks + 4 * (tl.load(problem + 3) + i)
    pitch, in_columns = tl.load(block + 1), tl.load(problem + 5)
    address = tl.load(block).to(tl.pointer_type(ELEMENT))
    return address, tl.where(in_columns != 0, 1, pitch), tl.where(in_columns != 0, pitch, 1)


@triton.jit
def _update(blocks, problems, updates, i, rows, columns, ELEMENT: tl.constexpr):
    """τ_i[rows, columns] in float32, 0 beyond its edges."""
    a, a_down, a_across = _factor(blocks, problems, i, ELEMENT)
    b, b_down, b_across = _factor(blocks, problems + 6, i, ELEMENT)
    a_at, b_at = a + columns * a_across, b + rows * b_across
    in_a, in_b = columns < tl.load(problems + 2), rows < tl.load(problems + 8)
    x = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(tl.load(updates + 3 * i + 1)):
        across = tl.load(a_at + k * a_down, mask=in_a, other=0.0).to(tl.float32)
        down = tl.load(b_at + k * b_down, mask=in_b, other=0.0).to(tl.float32)
        x = tl.fma(
            tl.broadcast_to(down[:, None], x.shape), tl.broadcast_to(across[None, :], x.shape), x
        )
    return _number(updates + 3 * i + 2) * x


@triton.jit
def _uniform(draw, number, rows, first_column, COLUMNS: tl.constexpr):
    """The numbers in [0, 1) of entries [rows, COLUMNS]; first_column: a multiple of four."""
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), tl.uint32)
    group = first_column // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + group.to(tl.uint32)[None, :],
        zero + rows.to(tl.uint32)[:, None],
        zero + number.to(tl.uint32),
        zero + tl.load(draw + 2).to(tl.uint32),
        tl.load(draw).to(tl.uint32),
        tl.load(draw + 1).to(tl.uint32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (rows.shape[0], COLUMNS))
    return (words >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def _kept(tau, trim, draw, rows, first_column, COLUMNS: tl.constexpr):
    size, keep = tl.abs(tau), _number(trim + 2)
    kept = (size >= _number(trim)) & (size <= _number(trim + 1))
    if keep < 1.0:
        kept = kept & (_uniform(draw, tl.load(trim + 5), rows, first_column, COLUMNS) < keep)
    return kept


@triton.jit
def entry_counts_kernel(
    blocks,
    problems,
    updates,
    prefixes,
    out,
    BEHIND: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    i = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    tau = _update(blocks, problems, updates, i, rows, columns, ELEMENT)
    counted = (rows < tl.load(problems + 8))[:, None] & (columns < tl.load(problems + 2))[None, :]
    bits = tau.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bins = bits >> LOW
    if BEHIND:
        counted = counted & (bins == tl.load(prefixes + i))
        bins = bits & ((1 << LOW) - 1)
        out += i.to(tl.int64) << LOW
    else:
        out += i.to(tl.int64) << (31 - LOW)
    tl.atomic_add(out + bins, tl.full(bins.shape, 1, tl.int64), mask=counted, sem="relaxed")


@triton.jit
def row_sums_kernel(
    blocks,
    problems,
    updates,
    trims,
    draw,
    out,
    ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    i = tl.program_id(1)
    m, n = tl.load(problems + 8), tl.load(problems + 2)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    all_of = tl.zeros((ROWS, PARTS), tl.float64)
    kept_of = tl.zeros((ROWS, PARTS), tl.float64)
    for first in range(0, n, PARTS):
        tau = _update(blocks, problems, updates, i, rows, first + part, ELEMENT)
        kept = _kept(tau, trims + 6 * i, draw, rows, first, PARTS)
        size = tl.abs(tau).to(tl.float64)
        all_of += size
        kept_of += tl.where(kept, size, 0.0)
    total = tl.zeros((ROWS,), tl.float64)
    kept_total = tl.zeros((ROWS,), tl.float64)
    for k in range(PARTS):
        # One number and zeros: exact in any order.
        total += tl.sum(tl.where(part[None, :] == k, all_of, 0.0), 1)
        kept_total += tl.sum(tl.where(part[None, :] == k, kept_of, 0.0), 1)
    at = out + 2 * i * m + rows
    tl.store(at, total, mask=rows < m)
    tl.store(at + m, kept_total, mask=rows < m)


@triton.jit(do_not_specialize=["m"])
def total_kernel(rows, m, out):
    line = rows + tl.program_id(0).to(tl.int64) * m
    total = tl.zeros((1,), tl.float64)
    for first in range(0, m, UNROLLED):
        for k in tl.static_range(UNROLLED):
            place = first + k + tl.arange(0, 1)
            total += tl.load(line + place, mask=place < m, other=0.0)
    tl.store(out + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=["adapters"])
def entry_merge_kernel(
    blocks,
    problems,
    updates,
    adapters,
    trims,
    draw,
    weights,
    scale,
    out,
    SIGN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Both signs are merged until all have voted, so that each τ_i is made once."""
    m, n = tl.load(problems + 8), tl.load(problems + 2)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    votes = tl.zeros((ROWS, COLUMNS), tl.float32)
    plus, plus_divisor = votes, votes
    minus, minus_divisor = votes, votes
    for i in range(adapters):
        tau = _update(blocks, problems, updates, i, rows, columns, ELEMENT)
        trim = trims + 6 * i
        kept = _kept(tau, trim, draw, rows, first, COLUMNS)
        value = _number(trim + 3) * tau
        if tl.load(trim + 4) != 0:
            value = tl.div_rn(value, tl.full(value.shape, 0.0, tl.float32) + _number(trim + 2))
        value = tl.where(kept, value, 0.0)
        weight = tl.full(value.shape, 0.0, tl.float32) + tl.load(weights + i).to(tl.float32)
        share = weight if MEAN == MEAN_WEIGHT else tl.full(value.shape, 1.0, tl.float32)
        if SIGN == SIGN_NONE:
            plus = tl.fma(weight, value, plus)
            plus_divisor += share
        else:
            vote = weight * value if WEIGHTED else value
            if SIGN == SIGN_FREQUENCY:
                votes += tl.where(vote > 0, 1.0, tl.where(vote < 0, -1.0, 0.0))
            elif WEIGHTED:
                votes = tl.fma(weight, value, votes)
            else:
                votes += value
            plus = tl.where(vote > 0, tl.fma(weight, value, plus), plus)
            plus_divisor += tl.where(vote > 0, share, 0.0)
            minus = tl.where(vote < 0, tl.fma(weight, value, minus), minus)
            minus_divisor += tl.where(vote < 0, share, 0.0)
    merged = tl.where(votes >= 0, plus, minus)
    if MEAN != MEAN_SUM:
        divisor = tl.where(votes >= 0, plus_divisor, minus_divisor)
        merged = tl.div_rn(merged, tl.where(divisor == 0, 1.0, divisor))
    at = out + rows[:, None] * n + columns[None, :]
    tl.store(at, scale * merged, mask=(rows < m)[:, None] & (columns < n)[None, :])


def entry_counts(updates: Updates, prefixes: Tensor | None, out: Tensor) -> None:
    """See EntryKernels.entry_counts."""
    table = updates.table
    grid = (*_tiles(updates), len(updates.rows))
    entry_counts_kernel[grid](
        table.blocks,
        table.problems,
        updates.rows,
        prefixes,
        out,
        BEHIND=prefixes is not None,
        LOW=LOW_BITS,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ELEMENT=ELEMENTS[table.dtype],
    )


def entry_sums(updates: Updates, trims: Tensor, draw: Tensor, rows: Tensor, out: Tensor) -> None:
    """See EntryKernels.entry_sums."""
    table = updates.table
    row_sums_kernel[(triton.cdiv(updates.m, ROWS_IN_PARTS), len(updates.rows))](
        table.blocks,
        table.problems,
        updates.rows,
        trims,
        draw,
        rows,
        ROWS=ROWS_IN_PARTS,
        ELEMENT=ELEMENTS[table.dtype],
    )
    total_kernel[(len(rows),)](rows, updates.m, out, num_warps=1)


def entry_merge(
    updates: Updates,
    trims: Tensor,
    draw: Tensor,
    weights: Tensor,
    election: Election,
    scale: float,
    out: Tensor,
) -> None:
    """See EntryKernels.entry_merge."""
    table = updates.table
    entry_merge_kernel[_tiles(updates)](
        table.blocks,
        table.problems,
        updates.rows,
        len(updates.rows),
        trims,
        draw,
        weights,
        scale,
        out,
        SIGN=SIGNS[election.sign],
        WEIGHTED=election.weighted,
        MEAN=MEANS[election.mean],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ELEMENT=ELEMENTS[table.dtype],
    )


def _tiles(updates: Updates) -> tuple[int, int]:
    return triton.cdiv(updates.m, ROWS), triton.cdiv(updates.n, COLUMNS)
