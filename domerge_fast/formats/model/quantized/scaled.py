"""Numbers of few bits with a factor for each matrix, row, group of a row's numbers or block, as
DeepSeek, fbgemm and compressed-tensors store FP8 and int8.

W = s q, or s (q - z). Sources: arXiv 2412.19437; the tensors that transformers 5.24 and
compressed-tensors 0.20 save.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....storage.lazy import LazyTensor
from ....storage.safetensors_file import FileTensor
from .dequantized import Dequantized

__all__ = ["Scaled", "grid_of"]


class Scaled(Dequantized):
    """data: [..., m, n]. scales: one for each block of so many rows and columns, [..., m / rows,
    n / columns], in any shape with as many numbers; zeros: what is taken off each number, alike.
    divisor: of the scales."""

    def __init__(
        self,
        data: FileTensor,
        scales: LazyTensor,
        block: tuple[int, int],
        written: torch.dtype,
        zeros: LazyTensor | None = None,
        divisor: float = 1.0,
    ) -> None:
        super().__init__(data, data.shape, written)
        self._data, self._scales, self._zeros = data, scales, zeros
        self._block, self._divisor = block, divisor

    def rows(self, start: int, stop: int) -> Tensor:
        made = self._data.rows(start, stop).float()
        if self._zeros is not None:
            made -= self._spread(self._zeros, start, stop)
        return made.mul_(self._spread(self._scales, start, stop) / self._divisor)

    def _spread(self, grid: LazyTensor, start: int, stop: int) -> Tensor:
        """What each number of some rows has of a grid."""
        *lead, m, n = self.shape
        rows, across = self._block
        found = grid.read().float().reshape(*lead, -(-m // rows), -(-n // across))
        if lead:
            found, (start, stop) = found[start:stop], (0, m)
        first = start // rows
        found = found[..., first : -(-stop // rows), :].repeat_interleave(rows, -2)
        found = found[..., start - first * rows : stop - first * rows, :]
        return found if across == n else found.repeat_interleave(across, -1)[..., :n]


def grid_of(
    shape: tuple[int, ...], block: tuple[int, int] | None, scales: tuple[int, ...]
) -> tuple[int, int] | None:
    """The block of so many rows and columns that each scale is for, of a weight [..., m, n]; None
    where as many scales are for no such blocks. block: as it is stated, if it is."""
    *lead, m, n = shape
    count = math.prod(lead)
    if block and scales == (*lead, -(-m // block[0]), -(-n // block[1])):
        return block
    if math.prod(scales) == count:
        return m, n
    if scales in ((*lead, m), (*lead, m, 1)):
        return 1, n
    return None
