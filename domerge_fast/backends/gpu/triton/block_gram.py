"""K_i = X_i X_i^T [r_i, r_i] in float64, of every block.

A program adds up one tile of the lower triangle, every product in a sum of its own until the end:
tensor cores and `tl.dot` hold float32 at most.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tables import Table
from .tiles import ELEMENTS

__all__ = ["block_gram"]

SIZE = 16
COLUMNS = 64
WARPS = 8


@triton.jit
def _add_up(
    block,
    rows,
    others,
    rank,
    d,
    IN_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """X_i[rows] X_i[others]^T, unscaled. Rows from r_i on are the last row."""
    address = tl.load(block).to(tl.pointer_type(ELEMENT))
    pitch = tl.load(block + 1)
    place = tl.arange(0, COLUMNS)
    rows, others = tl.minimum(rows, rank - 1)[:, None], tl.minimum(others, rank - 1)[:, None]
    if IN_COLUMNS:
        step = pitch
        x_at = address + rows + place[None, :] * pitch
        y_at = address + others + place[None, :] * pitch
    else:
        step = pitch * 0 + 1
        x_at = address + rows * pitch + place[None, :]
        y_at = address + others * pitch + place[None, :]
    sums = tl.zeros((rows.shape[0], others.shape[0], COLUMNS), tl.float64)
    for first in range(0, d, COLUMNS):
        live = (place < d - first)[None, :]
        x = tl.load(x_at + first * step, mask=live, other=0.0).to(tl.float32)
        y = tl.load(y_at + first * step, mask=live, other=0.0).to(tl.float32)
        sums += x.to(tl.float64)[:, None, :] * y.to(tl.float64)[None, :, :]
    return tl.sum(sums, 2)


@triton.jit
def block_gram_kernel(
    blocks,
    problems,
    work,
    out,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    one = work + 4 * tl.program_id(0)
    rank = tl.load(one + 2)
    i, j = tl.program_id(1), tl.program_id(2)
    if (j <= i) & (i * SIZE < rank):
        problem = problems + 6 * tl.load(one)
        block = blocks + 4 * tl.load(one + 1)
        d = tl.load(problem + 2)
        rows, others = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
        if tl.load(problem + 5) != 0:
            total = _add_up(block, rows, others, rank, d, True, COLUMNS, ELEMENT)
        else:
            total = _add_up(block, rows, others, rank, d, False, COLUMNS, ELEMENT)
        scale = tl.load(block + 3).to(tl.float64, bitcast=True)
        total = total * (scale * scale)
        row, other = rows[:, None], others[None, :]
        lower = (row < rank) & (other <= row)
        result = out + tl.load(one + 3)
        tl.store(result + row * rank + other, total, mask=lower)
        tl.store(result + other * rank + row, total, mask=lower)


def block_gram(table: Table, work: Tensor, out: Tensor) -> None:
    """See Kernels.block_gram."""
    tiles = -(-table.largest // SIZE)
    block_gram_kernel[(len(work), tiles, tiles)](
        table.blocks,
        table.problems,
        work,
        out,
        SIZE=SIZE,
        COLUMNS=COLUMNS,
        ELEMENT=ELEMENTS[table.dtype],
        num_warps=WARPS,
    )
