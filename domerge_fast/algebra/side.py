"""One side of a module, or of modules alike: the stacked factors that the ops work on.

Notation (the same in code, docs and tests): T adapters; adapter i owns the block X_i [r_i, d];
the stacked X is [R, d] with R = sum(r_i). On the A side X_i = A_i and d = n; on the B side
X_i = B_i.T, a view of the stored [m, r_i] matrix, and d = m.

What kernels are told of a side is made once and kept with it, as bytes that `table` joins for a
group of sides: a merge of 18,000 modules makes millions of small objects otherwise. So the sides of
P modules that are alike but for where their factors lie are one, and what ops make of it has the
modules as its first dimension, as with torch's batched functions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..storage.buffers import Matrix, as_tensor, packed, spread
from .described import CODES, Described, Layout, bits, described, rows_of, starts

__all__ = ["CODES", "Side", "each_row", "owners", "squares", "starts", "table"]


class Side:
    """Blocks X_i [r_i, d] and the scale that is multiplied into each on reading.

    The memory of a block is row-major [r_i, d] ("rows") or the transpose of a row-major
    [d, r_i] matrix ("columns"). ranks: the r_i; rank: R. in_columns: whether the first block is
    the transpose of a row-major [d, r] matrix. count: of the modules whose side it is, or None:
    of one, and then results have no dimension for modules. ValueError unless there is a scale for
    every block, and a block, and kernels can be handed them.
    """

    __slots__ = (
        *("scales", "ranks", "rank", "d", "device", "in_columns", "count"),
        *("described", "_blocks", "_stored", "_turned", "_copies"),
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
        stored: Tensor | Sequence[Matrix],
        blocks: Sequence[Tensor] | None = None,
        turned: bool = False,
        count: int | None = None,
    ) -> None:
        self.scales, self.ranks, self.rank, self.d = scales, ranks, sum(ranks), d
        self.device, self.in_columns, self.count = device, in_columns, count
        self._stored, self._blocks, self._turned = stored, blocks, turned
        self.described: Described | None = None
        self._copies: dict[tuple[bool, torch.dtype | None], Side] | None = None

    @classmethod
    def of(
        cls,
        matrices: Sequence[Matrix],
        scales: tuple[float, ...],
        ranks: tuple[int, ...],
        d: int,
        transposed: bool = False,
        count: int | None = None,
        places: bytes | None = None,
    ) -> Side:
        """Of row-major matrices [r_i, d] without gaps, or [d, r_i] of which the blocks are the
        transposes: tensors and views are made only if somebody asks for them. count: of modules,
        whose matrices follow each other on one device; those of every adapter have one dtype.
        places: where all begin, if that is known."""
        side = cls.__new__(cls)
        in_columns = transposed and d > 1
        first = matrices[: len(ranks)]
        device = first[0].device
        side._set(scales, ranks, d, device, in_columns, matrices, turned=transposed, count=count)
        dtypes = tuple([x.dtype for x in first])
        if CODES.keys() >= set(dtypes):
            pitches = ranks if in_columns else (d,) * len(ranks)
            places = places or packed([x.data_ptr() for x in matrices])
            side._describe(pitches, dtypes, places)
        return side

    @classmethod
    def split(cls, x: Tensor, ranks: tuple[int, ...]) -> Side:
        """The rows of x [R, d], or of every matrix of x [P, R, d], r_i of them a block, each with
        scale 1."""
        count = x.shape[0] if x.dim() == 3 else None
        *_, rows, d = x.shape
        strides = x.stride()[-2:]
        layout, places = rows_of(ranks, (rows, d), strides, x.dtype)
        side = cls.__new__(cls)
        in_columns = d > 1 and strides[0] == 1
        side._set((1.0,) * len(ranks), ranks, d, x.device, in_columns, x, count=count)
        if layout:
            side.described = layout, spread([starts(x)], places)
        return side

    def _alike(self, stored: Any, count: int | None, at: slice) -> Side:
        """The side of some of the modules, whose blocks these are."""
        side = Side.__new__(Side)
        common = self.scales, self.ranks, self.d, self.device, self.in_columns
        side._set(*common, stored, turned=self._turned, count=count)
        if self.described:
            layout, places = self.described
            side.described = layout, places[8 * at.start : 8 * at.stop]
        return side

    def of_modules(self, begin: int, end: int) -> Side:
        """The side of the modules from one position to another."""
        at = slice(begin * len(self.ranks), end * len(self.ranks))
        stored = self._stored
        part = stored[begin:end] if isinstance(stored, Tensor) else stored[at]
        return self._alike(part, end - begin, at)

    def each(self) -> list[Side]:
        """The sides of the modules, one by one."""
        if self.count is None:
            return [self]
        width, stored = len(self.ranks), self._stored
        parts = [slice(k, k + width) for k in range(0, width * self.count, width)]
        if isinstance(stored, Tensor):
            return [self._alike(x, None, at) for x, at in zip(stored.unbind(), parts)]
        return [self._alike(stored[at], None, at) for at in parts]

    def scaled(self, scales: tuple[float, ...]) -> Side:
        """The same blocks with other scales."""
        side = Side.__new__(Side)
        common = self.ranks, self.d, self.device, self.in_columns
        side._set(scales, *common, self._stored, self._blocks, self._turned, self.count)
        if self.described:
            layout, at = self.described
            side.described = described(*layout.key, bits(scales)), at
        return side

    def elsewhere(self, matrices: Sequence[Tensor]) -> Side:
        """The side with its `matrices` replaced by others of the same shapes, dense and on one
        device."""
        if self.count is None:
            blocks = [x.T for x in matrices] if self._turned else matrices
            return Side(blocks, self.scales)
        return Side.of(matrices, self.scales, self.ranks, self.d, self._turned, self.count)

    @property
    def matrices(self) -> list[Tensor]:
        """The blocks, or their transposes, as they are stored, one after the other."""
        stored = self._stored
        return [*self.blocks] if isinstance(stored, Tensor) else [as_tensor(x) for x in stored]

    @property
    def modules(self) -> int:
        """How many it is of."""
        return 1 if self.count is None else self.count

    @property
    def is_dense(self) -> bool:
        """Whether kernels read every block as it is, in memory without gaps."""
        return self.described is not None and self.described[0].is_dense

    @property
    def layout(self) -> Layout:
        """Of a side that is `ready`."""
        assert self.described
        return self.described[0]

    @property
    def blocks(self) -> Sequence[Tensor]:
        """The X_i, of one module after the other."""
        if self._blocks is None:
            stored = self._stored
            if isinstance(stored, Tensor):
                whole = [stored] if self.count is None else stored.unbind()
                self._blocks = [b for x in whole for b in x.split_with_sizes(list(self.ranks))]
            else:
                matrices = map(as_tensor, stored)
                self._blocks = tuple([x.T for x in matrices] if self._turned else matrices)
        return self._blocks

    def is_on(self, device: torch.device) -> bool:
        """Whether all blocks are."""
        if isinstance(self._stored, Tensor) or self.count is not None:
            return self.device == device
        return {x.device for x in self._stored} == {device}

    def stack(self, dtype: torch.dtype) -> Tensor:
        """X [R, d] with the scales multiplied in, in the memory layout of the first block; of one
        module."""
        assert self.count is None
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
        if self._copies is None:
            self._copies = {}
        if (columns, dtype) not in self._copies:
            self._copies[columns, dtype] = self._arranged(columns, dtype)
        return self._copies[columns, dtype]

    def _arranged(self, columns: bool, dtype: torch.dtype | None) -> Side:
        found = [_arranged(block, columns, dtype) for block in self.blocks]
        blocks, count = [block for block, _ in found], len(self.ranks)
        side = Side.__new__(Side)
        common = self.scales, self.ranks, self.d, self.device
        side._set(*common, columns, blocks, blocks, count=self.count)
        pitches = tuple([pitch for _, pitch in found[:count]])
        dtypes = tuple([block.dtype for block in blocks[:count]])
        side._describe(pitches, dtypes, packed([block.data_ptr() for block in blocks]))
        return side

    def _describe(
        self, pitches: tuple[int, ...], dtypes: tuple[torch.dtype, ...], places: bytes
    ) -> None:
        layout = described(self.ranks, self.d, self.in_columns, pitches, dtypes, bits(self.scales))
        self.described = layout, places


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


def owners(ranks: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Whose every row of the stacked blocks is, [R]."""
    # Of a list: `repeat_interleave` opens all of torch's threads and waits for them, for a few rows
    # too; where others want their cores that takes milliseconds.
    return torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)], device=device)


def each_row(x: Tensor, ranks: Sequence[int]) -> Tensor:
    """What is said of every block, [.., T], of every row of it, [.., R]."""
    return x.index_select(-1, owners(ranks, x.device))


class Table(NamedTuple):
    """Sides as bytes: the addresses of all blocks one after the other, `Layout.head` of every
    module's side, `Layout.rows` of all blocks. Good as long as the sides live."""

    addresses: bytes
    heads: bytes
    rows: bytes
    sides: list[Side]


def table(
    sides: Sequence[Side], rows_only: bool = False, dtype: torch.dtype | None = None
) -> Table:
    """The table of the sides as they are `ready`."""
    found = [side.ready(rows_only, dtype) for side in sides]
    described = [(*side.described, side.modules) for side in found if side.described]
    return Table(
        b"".join([at for _, at, _ in described]),
        b"".join([layout.head * count for layout, _, count in described]),
        b"".join([layout.rows * count for layout, _, count in described]),
        found,
    )
