"""C X of every problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side, check_sides
from . import _library


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
    check_sides(problems)
    for c, p in zip(coefficients, problems, strict=True):
        if c is not None and (c.ndim != 2 or c.shape[1] != p.rank):
            raise ValueError(f"C must be [K, {p.rank}], got {tuple(c.shape)}")
    return _apply(list(coefficients), *_library.flatten(problems), out_dtype, backend)


def _run(coefficients, blocks, counts, scales, out_dtype, backend):
    problems = _library.unflatten(blocks, counts, scales)
    return _library.implementation(backend, blocks).apply(coefficients, problems, out_dtype)


def _fake(coefficients, blocks, counts, scales, out_dtype, backend):
    results = []
    for c, p in zip(coefficients, _library.unflatten(blocks, counts, scales)):
        rows = p.rank if c is None else c.shape[0]
        shape = (p.d, rows) if p.in_columns else (rows, p.d)
        result = p.blocks[0].new_empty(shape, dtype=out_dtype)
        results.append(result.T if p.in_columns else result)
    return results


_apply = _library.define(
    "apply",
    f"(Tensor?[] coefficients, {_library.PROBLEMS}, ScalarType out_dtype, str backend) -> Tensor[]",
    _run,
    _fake,
)
