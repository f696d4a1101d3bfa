"""One side of one module: the stacked factors that the ops work on.

Notation (the same in code, docs and tests): T adapters; adapter i owns the block X_i [r_i, d];
the stacked X is [R, d] with R = sum(r_i). On the A side X_i = A_i and d = n; on the B side
X_i = B_i.T, a view of the stored [m, r_i] matrix, and d = m.

What kernels are told of a side is made once and kept with it, as bytes that `table` joins for a
group of sides: a merge of 18,000 modules makes millions of small objects otherwise.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CODES", "Side", "squares", "table"]

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


Described = tuple[Layout, bytes]
"""A layout, and where the blocks begin (int64)."""


@functools.lru_cache(maxsize=1 << 14)
def _layout(
    ranks: tuple[int, ...],
    d: int,
    columns: bool,
    pitches: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    scales: bytes,
) -> Layout:
    head = struct.pack("=4q", len(ranks), sum(ranks), d, columns)
    bits = struct.unpack(f"={len(ranks)}q", scales)
    rows = zip(ranks, pitches, (CODES[dtype] for dtype in dtypes), bits, strict=True)
    packed = b"".join([struct.pack("=4q", *row) for row in rows])
    return Layout((ranks, d, columns, pitches, dtypes), head, packed)


@functools.lru_cache(maxsize=1 << 14)
def _rows_of(
    ranks: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[Layout | None, list[int]]:
    """Of blocks of so many rows of a matrix: how kernels read them, None if they cannot, and where
    each begins, in bytes."""
    (rank, d), (row, column) = shape, strides
    columns = d > 1 and row == 1
    pitch, step, width = (column, row, rank) if columns else (row, column, d)
    if dtype not in CODES or step != 1 or pitch < width:
        return None, []
    count = len(ranks)
    layout = _layout(ranks, d, columns, (pitch,) * count, (dtype,) * count, _bits((1.0,) * count))
    starts = accumulate(ranks[:-1], initial=0)
    return layout, [row * dtype.itemsize * start for start in starts]


class Side:
    """Blocks X_i [r_i, d] and the scale that is multiplied into each on reading.

    The memory of a block is row-major [r_i, d] ("rows") or the transpose of a row-major
    [d, r_i] matrix ("columns"). ranks: the r_i; rank: R. in_columns: whether the first block is
    the transpose of a row-major [d, r] matrix. ValueError unless there is a scale for every block,
    and a block, and kernels can be handed them.
    """

    __slots__ = (
        *("scales", "ranks", "rank", "d", "device", "in_columns"),
        *("described", "_blocks", "_stored", "_copies"),
    )

    def __init__(self, blocks: Sequence[Tensor], scales: tuple[float, ...]) -> None:
        if not blocks or len(blocks) != len(scales):
            raise ValueError(f"a side needs one scale a block, got {len(blocks)} blocks")
        first = blocks[0]
        d, device = first.shape[1], first.device
        for block in blocks:
            if block.shape[1:] != (d,) or not block.shape[0]:
                raise ValueError(f"blocks must be [r_i, {d}], got {tuple(block.shape)}")
            if block.dtype not in CODES and block.dtype != torch.float64:
                raise ValueError(f"blocks must be floating point, got {block.dtype}")
            if block.device != device:
                raise ValueError(f"blocks on {device} and {block.device} in one side")
        ranks = tuple([block.shape[0] for block in blocks])
        self._set(scales, ranks, d, device, d > 1 and first.stride()[0] == 1, blocks, blocks)

    def _set(
        self,
        scales: tuple[float, ...],
        ranks: tuple[int, ...],
        d: int,
        device: torch.device,
        in_columns: bool,
        stored: Tensor | Sequence[Tensor],
        blocks: Sequence[Tensor] | None = None,
    ) -> None:
        self.scales, self.ranks, self.rank, self.d = scales, ranks, sum(ranks), d
        self.device, self.in_columns = device, in_columns
        self._stored, self._blocks = stored, blocks
        self.described: Described | None = None
        self._copies: dict[tuple[bool, torch.dtype | None], Side] = {}

    @classmethod
    def of(
        cls,
        matrices: Sequence[Tensor],
        scales: tuple[float, ...],
        ranks: tuple[int, ...],
        d: int,
        transposed: bool = False,
    ) -> Side:
        """Of row-major matrices [r_i, d] without gaps, or [d, r_i] of which the blocks are the
        transposes: these views are made only if somebody asks for them."""
        side = cls.__new__(cls)
        in_columns = transposed and d > 1
        blocks = None if transposed else matrices
        side._set(scales, ranks, d, matrices[0].device, in_columns, matrices, blocks)
        dtypes = tuple([x.dtype for x in matrices])
        if CODES.keys() >= set(dtypes):
            pitches = ranks if in_columns else (d,) * len(ranks)
            side._describe(pitches, dtypes, [x.data_ptr() for x in matrices])
        return side

    @classmethod
    def split(cls, x: Tensor, ranks: tuple[int, ...]) -> Side:
        """The rows of x [R, d], r_i of them a block, each with scale 1."""
        layout, places = _rows_of(ranks, tuple(x.shape), x.stride(), x.dtype)
        d = x.shape[1]
        side = cls.__new__(cls)
        side._set((1.0,) * len(ranks), ranks, d, x.device, d > 1 and x.stride(0) == 1, x)
        if layout:
            first = x.data_ptr()
            side.described = layout, _packed([first + place for place in places])
        return side

    def scaled(self, scales: tuple[float, ...]) -> Side:
        """The same blocks with other scales."""
        side = Side.__new__(Side)
        common = self.ranks, self.d, self.device, self.in_columns
        side._set(scales, *common, self._stored, self._blocks)
        if self.described:
            layout, at = self.described
            side.described = _layout(*layout.key, _bits(scales)), at
        return side

    @property
    def layout(self) -> Layout:
        """Of a side that is `ready`."""
        assert self.described
        return self.described[0]

    @property
    def blocks(self) -> Sequence[Tensor]:
        if self._blocks is None:
            stored = self._stored
            if isinstance(stored, Tensor):
                self._blocks = stored.split_with_sizes(list(self.ranks))
            else:
                self._blocks = tuple([x.T for x in stored])
        return self._blocks

    def is_on(self, device: torch.device) -> bool:
        """Whether all blocks are."""
        stored = [self._stored] if isinstance(self._stored, Tensor) else self._stored
        return all(x.device == device for x in stored)

    def stack(self, dtype: torch.dtype) -> Tensor:
        """X [R, d] with the scales multiplied in, in the memory layout of the first block."""
        if self.in_columns:
            return torch.cat([s * b.T.to(dtype) for b, s in zip(self.blocks, self.scales)], 1).T
        return torch.cat([s * b.to(dtype) for b, s in zip(self.blocks, self.scales)], 0)

    def ready(self, rows_only: bool = False, dtype: torch.dtype | None = None) -> Side:
        """The side as kernels read it: all blocks in rows, or all in columns unless there are to be
        rows only, in memory that is laid out so. Blocks of which that is not so are copied; a slice
        of a larger matrix is not. dtype: what all blocks are brought to; None leaves each as it is,
        but for float64, which becomes float32."""
        if (
            self.described
            and not (rows_only and self.in_columns)
            and (dtype is None or set(self.described[0].dtypes) == {dtype})
        ):
            return self
        columns = self.in_columns and not rows_only
        if (columns, dtype) not in self._copies:
            self._copies[columns, dtype] = self._arranged(columns, dtype)
        return self._copies[columns, dtype]

    def _arranged(self, columns: bool, dtype: torch.dtype | None) -> Side:
        found = [_arranged(block, columns, dtype) for block in self.blocks]
        blocks, pitches = [block for block, _ in found], tuple([pitch for _, pitch in found])
        side = Side.__new__(Side)
        side._set(self.scales, self.ranks, self.d, self.device, columns, blocks, blocks)
        dtypes = tuple([block.dtype for block in blocks])
        side._describe(pitches, dtypes, [block.data_ptr() for block in blocks])
        return side

    def _describe(
        self, pitches: tuple[int, ...], dtypes: tuple[torch.dtype, ...], at: Sequence[int]
    ) -> None:
        layout = _layout(self.ranks, self.d, self.in_columns, pitches, dtypes, _bits(self.scales))
        self.described = layout, _packed(at)


def _packed(addresses: Sequence[int]) -> bytes:
    return struct.pack(f"={len(addresses)}Q", *addresses)


def _bits(scales: Sequence[float]) -> bytes:
    return struct.pack(f"={len(scales)}d", *scales)


def _arranged(block: Tensor, columns: bool, dtype: torch.dtype | None) -> tuple[Tensor, int]:
    """The block, or a copy, in rows or in columns, and its pitch."""
    rank, d = block.shape
    wanted = dtype or (block.dtype if block.dtype in CODES else torch.float32)
    if block.dtype != wanted:
        block = block.to(wanted)
    pitch, step = block.stride()
    if columns:
        pitch, step = step, pitch
    width = rank if columns else d
    if step == 1 and pitch >= width:
        return block, pitch
    return (block.T.contiguous().T if columns else block.contiguous()), width


@functools.cache
def squares(ranks: tuple[int, ...]) -> int:
    """Entries of all matrices [r_i, r_i]."""
    return sum(r * r for r in ranks)


class Table(NamedTuple):
    """Sides as bytes: the addresses of all blocks one after the other, `Layout.head` of every side,
    `Layout.rows` of all blocks. Good as long as the sides live."""

    addresses: bytes
    heads: bytes
    rows: bytes
    sides: list[Side]


def table(
    sides: Sequence[Side], rows_only: bool = False, dtype: torch.dtype | None = None
) -> Table:
    """The table of the sides as they are `ready`."""
    found = [side.ready(rows_only, dtype) for side in sides]
    described = [side.described for side in found if side.described]
    layouts = [layout for layout, _ in described]
    return Table(
        b"".join([at for _, at in described]),
        b"".join([layout.head for layout in layouts]),
        b"".join([layout.rows for layout in layouts]),
        found,
    )
