"""A' [R, d]: C X, every column's magnitudes, the merged magnitude and the rescaling.

With a = C X and S_i^T S_i = K_i / norm_i^2, for every column c:
    mag_i = norm_i ||S_i a_i||    (0 where ||S_i a_i|| <= ZERO_COLUMN ||a_i||)
    A'_i = scale omega_i a_i sum_j(|omega_j| mag_j) / mag_i

A program makes some columns of one problem, all R rows. a and the magnitudes wait in a workspace
that stays in the L2 cache, because programs take tile after tile: what one adapter's rows are
multiplied with depends on all others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import torch as library
from ..tables import Table
from .apply import CHUNK, multiply
from .tiles import ELEMENTS, cast

__all__ = ["COLUMNS", "SIZES", "apply_decouple"]

SIZES = (16, 32, 64)
"""Rows of C X that are made at a time."""

COLUMNS = 128

MAX_ROOT_ROWS = 64
PROGRAMS_PER_PROCESSOR = 2
MAX_WORKSPACE = 256 << 20
"""Bytes of all programs, unless R is so large that one needs more."""

ZERO_COLUMN = tl.constexpr(library.ZERO_COLUMN)


@triton.jit
def _magnitude(values, root, rank, place, COLUMNS: tl.constexpr, ROOT_ROWS: tl.constexpr):
    """||S a|| [COLUMNS] of an adapter's rows of a, 0 where it is rounding noise."""
    squares = tl.zeros((COLUMNS,), tl.float32)
    own = tl.zeros((COLUMNS,), tl.float32)
    for row in range(0, rank, ROOT_ROWS):
        rows = row + tl.arange(0, ROOT_ROWS)
        y = tl.zeros((ROOT_ROWS, COLUMNS), tl.float32)
        for first in range(0, rank, ROOT_ROWS):
            inner = first + tl.arange(0, ROOT_ROWS)
            live = (rows < rank)[:, None] & (inner < rank)[None, :]
            s = tl.load(root + rows[:, None] * rank + inner[None, :], mask=live, other=0.0)
            at = values + inner[:, None] * COLUMNS + place[None, :]
            a = tl.load(at, mask=(inner < rank)[:, None], other=0.0)
            y = tl.dot(s, a, y, input_precision="tf32x3")
            if row == 0:
                own += tl.sum(a * a, 0)
        squares += tl.sum(y * y, 0)
    norms = tl.sqrt(squares)
    return tl.where(norms > ZERO_COLUMN * tl.sqrt(own), norms, 0.0)


@triton.jit(do_not_specialize=["count", "workspace_size", "slots"])
def apply_decouple_kernel(
    blocks,
    owner,
    problems,
    tiles,
    count,
    work,
    offsets,
    roots,
    norms,
    omegas,
    scale,
    workspace,
    workspace_size,
    out,
    energies,
    slots,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOT_ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    place = tl.arange(0, COLUMNS)
    values = workspace + tl.program_id(0).to(tl.int64) * workspace_size
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        tile = tiles + 3 * number
        problem = problems + 6 * tl.load(tile)
        rank, d = tl.load(problem + 1), tl.load(problem + 2)
        first_block, adapters = tl.load(problem + 3), tl.load(problem + 4)
        own = work + 2 * tl.load(tile)
        address, result = tl.load(own), out + tl.load(own + 1)
        columns, slot = tl.load(tile + 1) + place, tl.load(tile + 2)
        magnitudes = values + rank * COLUMNS

        for row in range(0, rank, ROWS):
            rows = row + tl.arange(0, ROWS)
            a = multiply(
                blocks, owner, problem, address, rank, rows, columns, False, CHUNK, ELEMENT, VECTOR
            )
            at = values + rows[:, None] * COLUMNS + place[None, :]
            tl.store(at, a, mask=(rows < rank)[:, None])
        tl.debug_barrier()

        merged = tl.zeros((COLUMNS,), tl.float32)
        begin = rank * 0
        for i in range(adapters):
            block = first_block + i
            end = tl.load(blocks + 4 * block + 6, mask=i + 1 < adapters, other=rank)
            root = roots + tl.load(offsets + block)
            norm = tl.load(norms + block)
            relative = _magnitude(
                values + begin * COLUMNS, root, end - begin, place, COLUMNS, ROOT_ROWS
            )
            magnitude = relative * norm
            wide = magnitude.to(tl.float64)
            tl.store(energies + block * slots + slot, tl.sum(wide * wide, 0))
            tl.store(magnitudes + i * COLUMNS + place, magnitude)
            merged += tl.abs(tl.load(omegas + block)).to(tl.float32) * magnitude
            begin = end
        tl.debug_barrier()

        begin = rank * 0
        for i in range(adapters):
            block = first_block + i
            end = tl.load(blocks + 4 * block + 6, mask=i + 1 < adapters, other=rank)
            magnitude = tl.load(magnitudes + i * COLUMNS + place)
            weight = (tl.load(omegas + block) * scale).to(tl.float32)
            divisor = tl.where(magnitude > 0, magnitude, 1.0)
            factor = tl.where(magnitude > 0, merged / divisor * weight, 0.0)
            for row in range(begin, end, ROOT_ROWS):
                rows = row + tl.arange(0, ROOT_ROWS)
                at = values + rows[:, None] * COLUMNS + place[None, :]
                a = tl.load(at, mask=(rows < end)[:, None], other=0.0)
                live = (rows < end)[:, None] & (columns < d)[None, :]
                at = result + rows[:, None] * d + columns[None, :]
                tl.store(at, cast(a * factor[None, :], out.dtype.element_ty), mask=live)
            begin = end
        tl.debug_barrier()


def apply_decouple(
    table: Table,
    size: int,
    rank: int,
    tiles: Tensor,
    work: Tensor,
    offsets: Tensor,
    roots: Tensor,
    norms: Tensor,
    omegas: Tensor,
    scale: float,
    out: Tensor,
    energies: Tensor,
) -> None:
    """See Kernels.apply_decouple."""
    size_of_one = 2 * rank * COLUMNS
    fit = max(1, MAX_WORKSPACE // (size_of_one * 4))
    programs = min(len(tiles), _programs(out.device), fit)
    workspace = torch.empty(programs, size_of_one, device=out.device)
    apply_decouple_kernel[(programs,)](
        table.blocks,
        table.owner,
        table.problems,
        tiles,
        len(tiles),
        work,
        offsets,
        roots,
        norms,
        omegas,
        scale,
        workspace,
        workspace.shape[1],
        out,
        energies,
        energies.shape[1],
        ROWS=size,
        COLUMNS=COLUMNS,
        CHUNK=CHUNK,
        ROOT_ROWS=min(MAX_ROOT_ROWS, max(16, triton.next_power_of_2(table.largest))),
        ELEMENT=ELEMENTS[table.dtype],
        VECTOR=table.even,
        num_warps=8,
        num_stages=2,
    )


def _programs(device: torch.device) -> int:
    """Programs that run side by side on a device."""
    if device.type != "cuda":
        return 2
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_PROCESSOR * processors
