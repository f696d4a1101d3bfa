"""C X [K, d], or X itself, scaled and cast, of every problem.

A program makes one tile of the result, in float32: the sum over R is cut into chunks, C's columns
are scaled as they are read, and X is used as it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tables import Table
from .tiles import ELEMENTS, cast, find_rows, load_tile

__all__ = ["CHUNK", "COLUMNS", "SIZES", "apply", "multiply"]

SIZES = (16, 32, 64, 128)
COLUMNS = {16: 256, 32: 128, 64: 128, 128: 128}
WARPS = {16: 4, 32: 4, 64: 4, 128: 8}
CHUNK = 32
"""Rows of X that are multiplied at a time."""


@triton.jit
def product(c, x, total):
    """total + C X in float32. 16-bit values are exact in TF32, so that C needs only two parts."""
    if x.dtype == tl.float32:
        return tl.dot(c, x, total, input_precision="tf32x3")
    else:
        high = (c.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        x = x.to(tl.float32)
        total = tl.dot(c - high, x, total, input_precision="tf32")
        return tl.dot(high, x, total, input_precision="tf32")


@triton.jit
def multiply(
    blocks,
    owner,
    problem,
    address,
    count,
    rows,
    columns,
    IN_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(C X)[rows, columns] in float32, or X[rows, columns] where the address of C is 0."""
    first_row, rank, d = tl.load(problem), tl.load(problem + 1), tl.load(problem + 2)
    if address == 0:
        at, pitch, scale = find_rows(
            blocks, owner, first_row, rank, rows, IN_COLUMNS, ELEMENT, VECTOR
        )
        x = load_tile(at, pitch, columns, d, IN_COLUMNS, VECTOR)
        total = x.to(tl.float32) * scale[:, None]
    else:
        total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        c_at = address.to(tl.pointer_type(tl.float32)) + rows[:, None] * rank
        for first in range(0, rank, CHUNK):
            inner = first + tl.arange(0, CHUNK)
            at, pitch, scale = find_rows(
                blocks, owner, first_row, rank, inner, IN_COLUMNS, ELEMENT, VECTOR
            )
            live = (rows < count)[:, None] & (inner < rank)[None, :]
            c = tl.load(c_at + inner[None, :], mask=live, other=0.0) * scale[None, :]
            x = load_tile(at, pitch, columns, d, IN_COLUMNS, VECTOR)
            total = product(c, x, total)
    return total


@triton.jit
def apply_kernel(
    blocks,
    owner,
    problems,
    tiles,
    work,
    out,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    problem = problems + 6 * tl.load(tile)
    d, in_columns = tl.load(problem + 2), tl.load(problem + 5)
    own = work + 3 * tl.load(tile)
    address, count, offset = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    rows = tl.load(tile + 1) + tl.arange(0, SIZE)
    columns = tl.load(tile + 2) + tl.arange(0, COLUMNS)
    live = (rows < count)[:, None] & (columns < d)[None, :]
    # fmt: off
    if in_columns != 0:
        total = multiply(blocks, owner, problem, address, count, rows, columns,
                         True, CHUNK, ELEMENT, VECTOR)
        at = out + offset + columns[None, :] * count + rows[:, None]
        tl.store(at, cast(total, out.dtype.element_ty), mask=live)
    else:
        total = multiply(blocks, owner, problem, address, count, rows, columns,
                         False, CHUNK, ELEMENT, VECTOR)
        at = out + offset + rows[:, None] * d + columns[None, :]
        tl.store(at, cast(total, out.dtype.element_ty), mask=live)
    # fmt: on


def apply(table: Table, size: int, tiles: Tensor, work: Tensor, out: Tensor) -> None:
    """See Kernels.apply."""
    apply_kernel[(len(tiles),)](
        table.blocks,
        table.owner,
        table.problems,
        tiles,
        work,
        out,
        SIZE=size,
        COLUMNS=COLUMNS[size],
        CHUNK=CHUNK,
        ELEMENT=ELEMENTS[table.dtype],
        VECTOR=table.even,
        num_warps=WARPS[size],
    )
