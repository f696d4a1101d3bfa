"""Where the numbers of a problem lie while it descends: matrices in float32, scalars in float64.

A problem is a tuple: its matrices, the scalars of the whole, V [T, T], the adapter of every row,
the first row of every adapter (and R), R, T, and the size to which matrices are padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
"""Rows, tiles, adapters or pairs that are treated at a time."""

# Matrices. The sums of pairs begin where P is, which is not needed while they are.
G, H, C, D, Q, PG, E, F, P = (tl.constexpr(k) for k in range(9))
SUMS = P
MATRICES, FROBENIUS_MATRICES = tl.constexpr(9), tl.constexpr(13)

# Scalars of the whole: ETA is the step that was found last, SLOPE the last <K P, P>, WIDEST the
# largest r_i, RUNNING 1 until the last step has been found.
WHOLE = tl.constexpr(16)
UNIT, TRACE, CROSS, BEFORE, AFTER, MOVED = (tl.constexpr(k) for k in range(6))
SLOPE, GAIN_1, GAIN_2, TAKEN, RUNNING, ETA, WIDEST = (tl.constexpr(k) for k in range(6, 13))

# Sums of a tile: products in the metric of G, then five coefficients of the quartic.
PARTS = tl.constexpr(16)
KP_P, KP_LAST, KP_D, D_D, D_CHANGE, QUARTIC = (tl.constexpr(k) for k in range(6))


@triton.jit
def find(number, work, starts, memory, each, size, FROBENIUS: tl.constexpr):
    """A problem. Its memory has the scalars of the whole, matrices, owners, V, then `scalars`."""
    one = work + 6 * number
    rank, adapters, size = tl.load(one + 1), tl.load(one + 2), size.to(tl.int64)
    whole = memory + number.to(tl.int64) * each
    m = (whole + WHOLE).to(tl.pointer_type(tl.float32))
    rest = m + (FROBENIUS_MATRICES if FROBENIUS else MATRICES) * size * size
    owner = rest.to(tl.pointer_type(tl.int32))
    return m, whole, rest + size, owner, starts + tl.load(one + 3), rank, adapters, size


@triton.jit
def scalars(problem, TILE: tl.constexpr):
    """Where norms [T], curvatures [T], sums of tiles, and tables [T, T] of pairs i > j begin."""
    _, _, v, _, _, rank, adapters, _ = problem
    norms = (v + (adapters * adapters + 1) // 2 * 2).to(tl.pointer_type(tl.float64))
    sums = norms + 2 * adapters
    tiles = (rank + TILE - 1) // TILE
    return norms, norms + adapters, sums, sums + tiles * tiles * PARTS


def numbers(size: int, adapters: int, frobenius: bool, tile: int) -> int:
    """Float64 numbers that the memory of a problem has at most, a multiple of 16."""
    area, pairs = size * size, adapters * adapters
    singles = (FROBENIUS_MATRICES if frobenius else MATRICES).value * area + size + pairs + 1
    tables = (6 if frobenius else 1) * pairs
    count = WHOLE.value + singles // 2 + 2 * adapters + area // tile**2 * PARTS.value + tables
    return -(-count // 16) * 16


@triton.jit
def total(problem, which, TILE: tl.constexpr):
    """A sum of all tiles, added in their order."""
    _, _, _, _, _, rank, _, _ = problem
    _, _, sums, _ = scalars(problem, TILE)
    found = tl.zeros((BLOCK,), tl.float64)
    tiles = (rank + TILE - 1) // TILE
    for first in range(0, tiles * tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        found += tl.load(sums + tile * PARTS + which, mask=tile < tiles * tiles, other=0.0)
    return tl.sum(found, 0)
