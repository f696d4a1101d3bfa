"""Small tensors in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _C

__all__ = ["Rows", "gather", "lengths", "norms_apart", "over_diagonals", "within"]

Maybe = TypeVar("Maybe", Tensor, Tensor | None)


class Rows(Sequence[list[float]]):
    """Rows of numbers, each a list when it is asked for. tensor: [P, N], in float64."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Rows:
        """Of rows of one length."""
        return rows if isinstance(rows, Rows) else cls(torch.tensor(rows, dtype=torch.float64))

    @overload
    def __getitem__(self, at: int) -> list[float]: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> list[float] | Rows:
        found = self.tensor[at]
        return Rows(found) if isinstance(at, slice) else found.tolist()

    def __iter__(self) -> Iterator[list[float]]:
        return iter(self.tensor.tolist())

    def __len__(self) -> int:
        return self.tensor.shape[0]


def gather(tensors: Sequence[Maybe]) -> list[Maybe]:
    """Small tensors in the host's memory, in one copy that is waited for; then all in the widest
    dtype of theirs."""
    present = [x for x in tensors if x is not None]
    if not present or present[0].device.type == "cpu":
        return list(tensors)
    flat = torch.cat([x.flatten() for x in present]).cpu()
    pieces = iter(flat.split([x.numel() for x in present]))
    return [x if x is None else next(pieces).view(x.shape) for x in tensors]


def within(x: Tensor, low: float, high: float) -> bool:
    """Whether no number of x [P, N], which has any strides, is outside of low and high; NaN is."""
    count, size = x.shape
    step, distance = x.stride()
    wide = x.dtype == torch.float64
    return _C.within(x.data_ptr(), count, size, step, distance, wide, low, high)


def norms_apart(squares: Tensor, ranks: Sequence[int], least: float) -> float:
    """How many times the norms of two adapters' factors are apart, at most, but for those of
    `least` of the largest one or less. squares: what is on the diagonals of Grams of modules'
    sides, [P, R] with any strides."""
    step, distance = squares.stride()
    given = squares.data_ptr(), squares.shape[0], step, distance, ranks
    return _C.norms_apart(*given, squares.dtype == torch.float64, least)


def over_diagonals(x: Tensor) -> None:
    """Divide every x_ij by sqrt(x_ii) sqrt(x_jj), in matrices [.., T, T] without gaps in float64;
    0 where that is not above 0."""
    roots = x.diagonal(dim1=-2, dim2=-1).sqrt().contiguous()
    at, count, size = x.data_ptr(), x.shape[:-2].numel(), x.shape[-1]
    _C.over_products(at, roots.data_ptr(), count, size, at)


def lengths(squares: Tensor) -> Tensor:
    """Norms [.., T] of their squares, 0 of what rounding made negative."""
    # In rows that do not touch: of 100 numbers without gaps MKL opens all of torch's threads, which
    # takes milliseconds where others want their cores.
    return pad(squares.clamp_min(0), (0, 1))[..., :-1].sqrt()
