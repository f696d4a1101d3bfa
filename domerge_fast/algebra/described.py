"""How kernels read the blocks of a side: what sides alike have in common, as bytes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..storage.buffers import Run

__all__ = [
    "CODES",
    "FACTOR_DTYPES",
    "Described",
    "Layout",
    "bits",
    "described",
    "rows_of",
    "starts",
]

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CODES = {dtype: code for code, dtype in enumerate(FACTOR_DTYPES)}
"""The numbers by which csrc/common/problem.h knows them."""


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """How kernels read a side, but for where its blocks begin; sides alike share it.

    Element (r, c) of X_i [r_i, d] lies at r * pitch + c, or in columns at c * pitch + r. key: the
    ranks, d, whether in columns, pitches, dtypes. head: number of blocks, R, d, 1 for columns.
    rows: r_i, pitch, code of the dtype and scale (float64) of every block, in 8 bytes each, as
    all numbers.
    """

    key: tuple[tuple[int, ...], int, bool, tuple[int, ...], tuple[torch.dtype, ...]]
    head: bytes
    rows: bytes

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.key[-1]

    @property
    def is_dense(self) -> bool:
        """Whether no block has gaps between its rows."""
        ranks, d, columns, pitches, _ = self.key
        return pitches == (ranks if columns else (d,) * len(ranks))


Described = tuple[Layout, bytes]
"""A layout, and where the blocks begin (int64)."""


@functools.lru_cache(maxsize=1 << 14)
def described(
    ranks: tuple[int, ...],
    d: int,
    columns: bool,
    pitches: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    scales: bytes,
) -> Layout:
    head = struct.pack("=4q", len(ranks), sum(ranks), d, columns)
    sizes = struct.unpack(f"={len(ranks)}q", scales)
    rows = zip(ranks, pitches, (CODES[dtype] for dtype in dtypes), sizes, strict=True)
    of_blocks = b"".join([struct.pack("=4q", *row) for row in rows])
    return Layout((ranks, d, columns, pitches, dtypes), head, of_blocks)


@functools.lru_cache(maxsize=1 << 14)
def rows_of(
    ranks: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[Layout | None, list[int]]:
    """Of blocks of so many rows of a matrix: how kernels read them, None if they cannot, and where
    each begins, in bytes from the first."""
    (rank, d), (row, column) = shape, strides
    columns = d > 1 and row == 1
    pitch, step, width = (column, row, rank) if columns else (row, column, d)
    if dtype not in CODES or step != 1 or pitch < width:
        return None, []
    count = len(ranks)
    layout = described(ranks, d, columns, (pitch,) * count, (dtype,) * count, bits((1.0,) * count))
    first = accumulate(ranks[:-1], initial=0)
    return layout, [row * dtype.itemsize * start for start in first]


def starts(x: Tensor, dims: int = 2) -> Run:
    """Where a matrix begins, or every matrix of x [P, ...]. dims: of what is no matrix."""
    shape = x.shape
    if len(shape) <= dims:
        return x.data_ptr(), 0, 1
    return x.data_ptr(), x.stride(0) * x.itemsize, shape[0]


def bits(scales: Sequence[float]) -> bytes:
    return struct.pack(f"={len(scales)}d", *scales)
