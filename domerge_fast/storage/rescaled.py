"""What brings the rows, or the columns, of W + s B A to lengths of their own, less W: computed of
stored tensors whenever it is read, in float64 and rounded once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .lazy import LazyTensor
from .made import Made

__all__ = ["Rescaled", "RescaledColumns"]

_PIECE = 1 << 20
"""Entries that are in float64 at once."""


@dataclass(frozen=True, eq=False)
class _Sum(Made):
    """Of W [m, n...], A [r, n...], B [m, r...] and s; lengths of what is rescaled."""

    weight: LazyTensor
    a: LazyTensor
    b: LazyTensor
    scaling: float
    lengths: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """W and W + s B A of some rows, as matrices, a few at a time."""
        weight = self.weight.rows(start, stop).flatten(1)
        a = self.a.read().double().flatten(1)
        b = self.b.rows(start, stop).double().flatten(1) * self.scaling
        step = max(1, _PIECE // weight.shape[1])
        for k in range(0, len(weight), step):
            before = weight[k : k + step].double()
            yield before, before + b[k : k + step] @ a


class Rescaled(_Sum):
    """l (W + s B A) / ||W + s B A|| - W with the norm of each row: [m, n...]; lengths: [m]."""

    def rows(self, start: int, stop: int) -> Tensor:
        lengths = self.lengths.rows(start, stop).double()
        made = torch.empty(stop - start, *self.shape[1:])
        rows, k = made.flatten(1), 0
        for before, after in self.pieces(start, stop):
            some = slice(k, k + len(before))
            factor = lengths[some] / torch.linalg.vector_norm(after, dim=1)
            rows[some] = factor[:, None] * after - before
            k += len(before)
        return made


class RescaledColumns(_Sum):
    """The same with the norm of each input: of a column, of a convolution over all outputs and the
    kernel; lengths: [1, n, 1...]."""

    def rows(self, start: int, stop: int) -> Tensor:
        factor = self._factor
        made = torch.empty(stop - start, *self.shape[1:])
        rows, k = made.flatten(1), 0
        for before, after in self.pieces(start, stop):
            some = slice(k, k + len(before))
            rows[some] = factor * after - before
            k += len(before)
        return made

    @functools.cached_property
    def _factor(self) -> Tensor:
        """What each entry of a row is multiplied by; kept, being one row."""
        inputs = self.shape[1]
        sums = torch.zeros(inputs, dtype=torch.float64)
        step = max(1, _PIECE // (self.nbytes // self.dtype.itemsize // self.shape[0]))
        for k in range(0, self.shape[0], step):
            for _, after in self.pieces(k, min(k + step, self.shape[0])):
                sums += after.reshape(len(after), inputs, -1).square().sum((0, 2))
        factor = self.lengths.read().flatten().double() / sums.sqrt()
        each = self.nbytes // self.dtype.itemsize // self.shape[0] // inputs
        return factor.repeat_interleave(each)
