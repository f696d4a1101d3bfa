"""Tensors that are known by dtype and shape, and read only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class LazyTensor(Protocol):
    """A stored tensor. ``shape`` is the stored shape; ``nbytes`` the stored size in bytes."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> torch.Tensor:
        """The tensor in its stored dtype and shape; shares the stored memory where it can."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The part [start:stop] of the first dimension, read alone."""
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
