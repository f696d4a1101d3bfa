"""Tiles of X [R, d] as the kernels read them: ragged blocks, in rows or in columns.

A tile is always X[rows, columns]. In columns it is read transposed, so that neighbouring threads
read neighbouring addresses in either layout.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["ELEMENTS", "cast", "find_rows", "load_tile"]

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def find_rows(
    blocks, owner, first_row, rank, rows,
    IN_COLUMNS: tl.constexpr, ELEMENT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Where rows of X begin, the step from a column to the next, and the scales in float32.

    Rows from R on are the last VECTOR ones again, which keeps vectors whole: they may be read, and
    are not to be used.
    """
    rows = tl.where(rows < rank, rows, rank - VECTOR + rows % VECTOR)
    block = blocks + 4 * tl.load(owner + first_row + rows)
    address = tl.load(block).to(tl.pointer_type(ELEMENT))
    pitch = tl.load(block + 1)
    within = rows - tl.load(block + 2)
    scale = tl.load(block + 3).to(tl.float64, bitcast=True).to(tl.float32)
    if IN_COLUMNS:
        return address + within, pitch, scale
    else:
        return address + within * pitch, pitch, scale


@triton.jit
def load_tile(begins, pitches, columns, end, IN_COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """X[rows, columns] as stored, 0 in columns from `end` on."""
    if IN_COLUMNS:
        pointers = begins[None, :] + columns[:, None] * pitches[None, :]
        mask = (columns < end)[:, None]
    else:
        pointers = begins[:, None] + columns[None, :]
        mask = (columns < end)[None, :]
    if VECTOR > 1:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 16]), [1, VECTOR])
        if not IN_COLUMNS:
            mask = tl.max_constancy(mask, [1, VECTOR])
    tile = tl.load(pointers, mask=mask, other=0.0)
    # The interpreter cannot compute with bfloat16.
    if INTERPRETED:
        tile = tile.to(tl.float32)
    if IN_COLUMNS:
        tile = tl.trans(tile)
    return tile


@triton.jit
def cast(x, ELEMENT: tl.constexpr):
    """x in float32, rounded to the nearest value of the element type."""
    # The interpreter truncates to bfloat16: there the value is rounded beforehand.
    if INTERPRETED and tl.bfloat16 == ELEMENT:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(ELEMENT)
