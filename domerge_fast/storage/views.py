"""Parts of stored tensors, and tensors one below the other, that are read only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .lazy import LazyTensor
from .safetensors_file import block

__all__ = ["Picked", "Stacked", "rows_at"]


def rows_at(x: LazyTensor, places: Sequence[int]) -> LazyTensor:
    """The rows of a tensor at these places, in order; at least one."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    found = tuple(block(x, start, stop) for start, stop in runs)
    return found[0] if len(found) == 1 else Stacked(found)


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """Tensors of one dtype, one below the other."""

    parts: tuple[LazyTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(x.shape[0] for x in self.parts), *self.parts[0].shape[1:]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.parts)

    def read(self) -> torch.Tensor:
        return torch.cat([x.read() for x in self.parts])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        found = []
        for x in self.parts:
            count = x.shape[0]
            if start < count and stop > 0:
                found.append(x.rows(max(start, 0), min(stop, count)))
            start, stop = start - count, stop - count
        return torch.cat(found)


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """Some columns of a stored matrix [m, r] (or [m, r, 1...]), in order."""

    whole: LazyTensor
    columns: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        m, _, *ones = self.whole.shape
        return m, len(self.columns), *ones

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes // self.whole.shape[1] * len(self.columns)

    def read(self) -> torch.Tensor:
        return self.whole.read()[:, list(self.columns)]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.whole.rows(start, stop)[:, list(self.columns)]
