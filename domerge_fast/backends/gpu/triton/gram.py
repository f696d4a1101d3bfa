"""G = X X^T [R, R] in float32, of every problem.

A program adds up one tile of the lower triangle over a stretch of columns. 16-bit values are
multiplied as they are (their products are exact in float32), float32 ones as three TF32 products.
A second kernel adds the stretches in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tables import Table
from .tiles import ELEMENTS, find_rows, load_tile

__all__ = ["SIZES", "gram"]

SIZES = (16, 32, 64, 128)
COLUMNS = {16: 256, 32: 128, 64: 64, 128: 64}
"""Columns that are multiplied at a time, of 16-bit values; half as many of float32."""

WARPS = {16: 2, 32: 4, 64: 4, 128: 8}
STRIP = 16
"""Rows of a tile whose parts one program adds."""


@triton.jit
def _add_up(
    blocks,
    owner,
    problem,
    tile,
    DIAGONAL: tl.constexpr,
    IN_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """X_i X_j^T [SIZE, SIZE] over the tile's columns, unscaled."""
    first_row, rank = tl.load(problem), tl.load(problem + 1)
    begin, end = tl.load(tile + 3), tl.load(tile + 4)
    rows = tl.load(tile + 1) * SIZE + tl.arange(0, SIZE)
    others = tl.load(tile + 2) * SIZE + tl.arange(0, SIZE)
    x_at, x_pitch, _ = find_rows(blocks, owner, first_row, rank, rows, IN_COLUMNS, ELEMENT, VECTOR)
    y_at, y_pitch, _ = find_rows(
        blocks, owner, first_row, rank, others, IN_COLUMNS, ELEMENT, VECTOR
    )
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        x = load_tile(x_at, x_pitch, columns, end, IN_COLUMNS, VECTOR)
        y = x if DIAGONAL else load_tile(y_at, y_pitch, columns, end, IN_COLUMNS, VECTOR)
        total = tl.dot(x, tl.trans(y), total, input_precision="tf32x3")
    return total


@triton.jit
def _write(blocks, owner, first_row, rank, rows, others, total, out):
    """G at and below the diagonal, scaled, and its mirror image."""
    _, _, scales = find_rows(blocks, owner, first_row, rank, rows, False, tl.float32, 1)
    _, _, scales_others = find_rows(blocks, owner, first_row, rank, others, False, tl.float32, 1)
    total = total * scales[:, None] * scales_others[None, :]
    row, other = rows[:, None], others[None, :]
    lower = (row < rank) & (other <= row)
    tl.store(out + row * rank + other, total, mask=lower)
    tl.store(out + other * rank + row, total, mask=lower)


@triton.jit
def gram_kernel(
    blocks,
    owner,
    problems,
    tiles,
    parts,
    out,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = tiles + 7 * tl.program_id(0)
    i, j, part = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 5)
    problem = problems + 6 * tl.load(tile)
    first_row, rank, in_columns = tl.load(problem), tl.load(problem + 1), tl.load(problem + 5) != 0
    # fmt: off
    if in_columns & (i == j):
        total = _add_up(
            blocks, owner, problem, tile, True, True, SIZE, COLUMNS, ELEMENT, VECTOR)
    elif in_columns:
        total = _add_up(
            blocks, owner, problem, tile, False, True, SIZE, COLUMNS, ELEMENT, VECTOR)
    elif i == j:
        total = _add_up(
            blocks, owner, problem, tile, True, False, SIZE, COLUMNS, ELEMENT, VECTOR)
    else:
        total = _add_up(
            blocks, owner, problem, tile, False, False, SIZE, COLUMNS, ELEMENT, VECTOR)
    # fmt: on
    place = tl.arange(0, SIZE)
    if part < 0:
        rows, others = i * SIZE + place, j * SIZE + place
        _write(blocks, owner, first_row, rank, rows, others, total, out + tl.load(tile + 6))
    else:
        at = part * SIZE * SIZE + place[:, None] * SIZE + place[None, :]
        tl.store(parts + at, total)


@triton.jit
def sum_kernel(blocks, owner, problems, sums, parts, out, SIZE: tl.constexpr, STRIP: tl.constexpr):
    one = sums + 6 * tl.program_id(0)
    problem = problems + 6 * tl.load(one)
    first_row, rank = tl.load(problem), tl.load(problem + 1)
    i, j, part, count = tl.load(one + 1), tl.load(one + 2), tl.load(one + 3), tl.load(one + 4)
    strip = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    place = tl.arange(0, SIZE)
    at = parts + part * SIZE * SIZE + strip[:, None] * SIZE + place[None, :]
    total = tl.zeros((STRIP, SIZE), tl.float32)
    for k in range(count):
        total += tl.load(at + k * SIZE * SIZE)
    rows, others = i * SIZE + strip, j * SIZE + place
    _write(blocks, owner, first_row, rank, rows, others, total, out + tl.load(one + 5))


def gram(table: Table, size: int, tiles: Tensor, sums: Tensor, parts: Tensor, out: Tensor) -> None:
    """See Kernels.gram."""
    gram_kernel[(len(tiles),)](
        table.blocks,
        table.owner,
        table.problems,
        tiles,
        parts,
        out,
        SIZE=size,
        COLUMNS=COLUMNS[size] * 2 // table.dtype.itemsize,
        ELEMENT=ELEMENTS[table.dtype],
        VECTOR=table.even,
        num_warps=WARPS[size],
    )
    if len(sums):
        sum_kernel[(len(sums), size // STRIP)](
            table.blocks, table.owner, table.problems, sums, parts, out, SIZE=size, STRIP=STRIP
        )
