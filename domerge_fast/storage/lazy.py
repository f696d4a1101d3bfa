"""Tensors that are known by dtype and shape, and read only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "Columns",
    "LazyTensor",
    "MemoryTensor",
    "Rows",
    "Turned",
    "apart",
    "dtype_name",
    "in_step",
    "pieces",
]

PIECE_BYTES = 16 << 20
"""Of a tensor that goes from file to file."""


class LazyTensor(Protocol):
    """A stored tensor. ``shape`` is the stored shape; ``nbytes`` the stored size in bytes."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> torch.Tensor:
        """The tensor in its stored dtype and shape: of a file in memory of its own."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A part of it along the first dimension; nothing else is read."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MemoryTensor:
    """A tensor that is already in memory, on whatever device it lives."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def read(self) -> torch.Tensor:
        return self.tensor.detach()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Every `count`-th column of a stored matrix [m, r count], from `index` on: [m, r]."""

    whole: LazyTensor
    index: int
    count: int

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        m, columns = self.whole.shape
        return m, columns // self.count

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes // self.count

    def read(self) -> torch.Tensor:
        return self._of(self.whole.read())

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._of(self.whole.rows(start, stop))

    def _of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.index :: self.count].contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """The transpose of a stored matrix [n, m]: [m, n]. What is read is a view of that; of a row,
    all of it is read."""

    whole: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        n, m = self.whole.shape
        return m, n

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def read(self) -> torch.Tensor:
        return self.whole.read().T

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows first to last - 1 of a tensor."""

    whole: LazyTensor
    first: int
    last: int

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.last - self.first, *self.whole.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes // self.whole.shape[0] * self.shape[0]

    def read(self) -> torch.Tensor:
        return self.whole.rows(self.first, self.last)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.whole.rows(self.first + start, self.first + stop)


def apart(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """All `Columns` of a matrix [m, r count], one after the other: [count, m, r]."""
    m = matrix.shape[0]
    return matrix.reshape(-1, count).T.contiguous().view(count, m, -1)


def dtype_name(dtype: torch.dtype) -> str:
    """As options, cards and messages have it."""
    return str(dtype).removeprefix("torch.")


def pieces(tensor: LazyTensor, most_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """The tensor in parts along its first dimension, in order, none much larger than so many
    bytes (but one row)."""
    for (piece,) in in_step([tensor], most_bytes):
        yield piece


def in_step(
    tensors: Sequence[LazyTensor], most_bytes: int = PIECE_BYTES
) -> Iterator[list[torch.Tensor]]:
    """The same pieces of tensors of one shape."""
    largest = max(x.nbytes for x in tensors)
    shape = tensors[0].shape
    if largest <= most_bytes or not shape:
        yield [x.read() for x in tensors]
        return
    step = max(1, most_bytes * shape[0] // largest)
    for start in range(0, shape[0], step):
        yield [x.rows(start, min(start + step, shape[0])) for x in tensors]
