"""Tensors that are computed of stored ones whenever they are read, and kept nowhere.

Single products of entries are formed in float32, where they are rounded once; sums in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .lazy import LazyTensor

__all__ = [
    "ColumnPairs",
    "Folded",
    "Kronecker",
    "Made",
    "Multiplied",
    "RowPairs",
    "Shaped",
    "Unit",
    "Vector",
    "beside_unit",
    "flat",
]


class Made:
    """A tensor, in float32 unless said; `rows` makes its rows."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Folded(Made):
    """What two factors of a convolution in Tucker's form are together:
    [r, n, k...] = Σ_j mid[:, j, k...] down[j, n]. mid: [r, s, k...], down: [s, n, 1...]."""

    mid: LazyTensor
    down: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mid.shape[0], self.down.shape[1], *self.mid.shape[2:])

    def rows(self, start: int, stop: int) -> Tensor:
        down = self.down.read().double().flatten(1)
        mid = self.mid.rows(start, stop).double()
        return torch.einsum("mj...,jn->mn...", mid, down).float()


@dataclass(frozen=True, eq=False)
class Multiplied(Made):
    """The product of matrices [m, r] and [r, n...], or of such products entry by entry."""

    pairs: tuple[tuple[LazyTensor, LazyTensor], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        left, right = self.pairs[0]
        return (left.shape[0], *right.shape[1:])

    def rows(self, start: int, stop: int) -> Tensor:
        found = torch.ones((), dtype=torch.float64)
        for left, right in self.pairs:
            found = found * (left.rows(start, stop).double() @ right.read().double().flatten(1))
        return found.float().reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class Kronecker(Made):
    """[p s, q t, k...] of x [p, q] and y [s, t, k...]: y times every entry of x."""

    x: LazyTensor
    y: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        (p, q), (s, t, *kernel) = self.x.shape, self.y.shape
        return (p * s, q * t, *kernel)

    def rows(self, start: int, stop: int) -> Tensor:
        s = self.y.shape[0]
        first = start // s
        x, y = self.x.rows(first, -(-stop // s)).float(), self.y.read().float()
        (q, *_), (t, *kernel) = x.shape[1:], y.shape[1:]
        spread = x.reshape(len(x), 1, q, 1, *[1] * len(kernel))
        made = (spread * y.reshape(s, 1, t, *kernel)).reshape(len(x) * s, q * t, *kernel)
        return made[start - first * s : stop - first * s]


@dataclass(frozen=True, eq=False)
class RowPairs(Made):
    """[p q, n...] of x [p, n...] and y [q, n...]: row i q + j is x_i y_j, entry by entry."""

    x: LazyTensor
    y: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.x.shape[0] * self.y.shape[0], *self.x.shape[1:])

    def rows(self, start: int, stop: int) -> Tensor:
        q = self.y.shape[0]
        first = start // q
        x, y = self.x.rows(first, -(-stop // q)).float(), self.y.read().float()
        made = (x[:, None] * y).flatten(0, 1)
        return made[start - first * q : stop - first * q]


@dataclass(frozen=True, eq=False)
class ColumnPairs(Made):
    """[m, p q] of x [m, p] and y [m, q]: column i q + j is x_i y_j, entry by entry."""

    x: LazyTensor
    y: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape[0], self.x.shape[1] * self.y.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        x, y = self.x.rows(start, stop).float(), self.y.rows(start, stop).float()
        return (x[:, :, None] * y[:, None]).flatten(1)


@dataclass(frozen=True, eq=False)
class Unit(Made):
    """The unit matrix [size, size]."""

    size: int
    kind: torch.dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    def rows(self, start: int, stop: int) -> Tensor:
        made = torch.zeros(stop - start, self.size, dtype=self.kind)
        made.diagonal(start).fill_(1.0)
        return made


@dataclass(frozen=True, eq=False)
class Shaped:
    """A tensor in another shape with the same first dimension."""

    whole: LazyTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def read(self) -> Tensor:
        return self.whole.read().reshape(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.whole.rows(start, stop).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class Vector:
    """The entries of a tensor, in order."""

    whole: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.whole.shape),)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def read(self) -> Tensor:
        return self.whole.read().flatten()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]


def beside_unit(whole: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """A matrix [m, n...] and the unit matrix on its shorter side, as A [k, n...] and B [m, k]:
    their product is the matrix."""
    m, n = whole.shape[0], math.prod(whole.shape[1:])
    if m <= n:
        return whole, Unit(m, whole.dtype)
    return Shaped(Unit(n, whole.dtype), (n, *whole.shape[1:])), flat(whole)


def flat(x: LazyTensor) -> LazyTensor:
    """A tensor as a matrix of its rows."""
    return x if len(x.shape) == 2 else Shaped(x, (x.shape[0], math.prod(x.shape[1:])))
