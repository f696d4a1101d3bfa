"""Tensors that adapters save whole, added up or compared, a piece at a time."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..errors import DomergeError
from ..storage.lazy import LazyTensor, dtype_name, in_step

__all__ = ["CHOOSE", "Sum", "change", "equal"]

CHOOSE = "say whole='from:NAME' to take one adapter's, or 'drop' (--whole)"
"""The remedy where they cannot become one."""


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """W0 + Σ w_i (W_i - W0), computed piece by piece whenever it is read; without the first W0
    where it is only the change that is wanted."""

    name: str
    origin: LazyTensor
    terms: tuple[tuple[float, LazyTensor], ...]
    dtype: torch.dtype
    only_change: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.origin.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        parts = [self._of(*tensors) for tensors in in_step(self._tensors)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._of(*(tensor.rows(start, stop) for tensor in self._tensors))

    @property
    def _tensors(self) -> list[LazyTensor]:
        return [self.origin, *(tensor for _, tensor in self.terms)]

    def _of(self, origin: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        wide = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
        origin = origin.to(wide)
        total = torch.zeros_like(origin) if self.only_change else origin.clone()
        for (weight, _), tensor in zip(self.terms, tensors):
            total += weight * (tensor.to(origin) - origin)
        rounded = total.to(self.dtype)
        if not torch.isfinite(rounded).all():
            problem = f"{self.name!r}, which adapters save whole: the sum is not finite"
            raise DomergeError(f"{problem} in {dtype_name(self.dtype)}; {CHOOSE}")
        return rounded


def change(name: str, tensor: LazyTensor, origin: LazyTensor, dtype: torch.dtype) -> Sum:
    """W - W0 of what is kept."""
    if isinstance(tensor, Sum):
        return Sum(name, tensor.origin, tensor.terms, dtype, only_change=True)
    return Sum(name, origin, ((1.0, tensor),), dtype, only_change=True)


def equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors are the same bit by bit, or one is the other rounded to fewer bits."""
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    if one.shape != other.shape or (one.dtype != other.dtype and not _rounds(one, other)):
        return False
    return all(torch.equal(_bits(x, narrow), _bits(y, narrow)) for x, y in in_step([one, other]))


def _rounds(one: LazyTensor, other: LazyTensor) -> bool:
    floats = one.dtype.is_floating_point and other.dtype.is_floating_point
    return floats and one.dtype.itemsize != other.dtype.itemsize


def _bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.cpu().to(dtype).contiguous().reshape(-1).view(torch.uint8)
