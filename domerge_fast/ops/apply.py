"""C X of every problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side
from ._backend import implementation, op

__all__ = ["apply"]


@op
def apply(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    out_dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> list[Tensor]:
    """C X [K, d] of every problem, with C [K, R] or None for X itself (stacked, scaled, cast).

    Computed in float32. Where the first block is the transpose of a row-major [d, r] matrix, so
    is the result: B sides come out as the transposes of row-major [m, K] matrices.
    """
    for c, p in zip(coefficients, problems, strict=True):
        if c is not None and (c.ndim != 2 or c.shape[1] != p.rank):
            raise ValueError(f"C must be [K, {p.rank}], got {tuple(c.shape)}")
    return implementation(backend, problems).apply(coefficients, problems, out_dtype)
