"""The largest magnitude of tensors: it tells their size, and whether all of them is finite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.side import Side
from ._backend import implementation, op

__all__ = ["block_largest", "largest"]


@op
def largest(tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """max |x| of every tensor (float16, bfloat16, float32 or float64), [N] in float64 on their
    device: NaN where one holds NaN, else Inf where one holds that; 0 of no elements.

    By comparison of bits, each tensor read once: the same whatever the order.
    """
    return implementation("largest", backend, tensors).largest(tensors)


@op
def block_largest(problems: Sequence[Side], *, backend: str = "auto") -> Tensor:
    """`largest` of every block of the problems, of one module after the other; scales are left
    out."""
    return implementation("block_largest", backend, problems).block_largest(problems)
