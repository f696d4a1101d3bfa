"""Tensors that are known by dtype and shape, and read only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["LazyTensor", "MemoryTensor", "dtype_name", "in_step", "pieces"]

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
        return self.tensor.detach()[start:stop]


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
