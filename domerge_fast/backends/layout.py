"""How the memory of tensors is laid out for kernels that read addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["addresses", "dense", "matrices", "together"]

GAP = 64
"""Results that share an allocation begin at multiples of this many elements."""


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors' elements begin; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it where it is no dense piece of memory; a transposed one is."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


def matrices(coefficients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Float32, row-major."""
    return [None if c is None else c.float().contiguous() for c in coefficients]


def together(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device | None = None
) -> tuple[list[Tensor], list[int]]:
    """Row-major results of an op in one allocation, and where each begins in it, in elements. Small
    ones cost more to allocate than to compute. One of them keeps the memory of all."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for k, shape in enumerate(shapes):
        alike.setdefault(tuple(shape), []).append(k)
    steps = {shape: -(-math.prod(shape) // GAP) * GAP for shape in alike}
    total = sum(steps[shape] * len(members) for shape, members in alike.items())
    memory = torch.empty(total, dtype=dtype, device=device)
    results, places, first = [memory] * len(shapes), [0] * len(shapes), 0
    for shape, members in alike.items():
        step = steps[shape]
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        views = memory.as_strided((len(members), *shape), (step, *strides), first).unbind()
        for k, view in zip(members, views):
            results[k], places[k] = view, first
            first += step
    return results, places
