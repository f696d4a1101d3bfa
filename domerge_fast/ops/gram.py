"""G = X X^T [R, R] of every problem, and the adapters' own diagonal blocks of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side, check_sides
from . import _library


def gram(
    problems: Sequence[Side], *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> list[Tensor]:
    """X X^T [R, R] of every problem, in `dtype` (float32 or float64: products and sums too)."""
    check_sides(problems)
    return _gram(*_library.flatten(problems), dtype, backend)


def block_gram(problems: Sequence[Side], *, backend: str = "auto") -> list[Tensor]:
    """K_i = X_i X_i^T of every adapter, accumulated in float64, packed [sum r_i^2] a problem.

    Row-major blocks one after the other. Column magnitudes are square roots of quadratic forms
    in K_i, which would lose half their digits to a float32 Gram.
    """
    check_sides(problems)
    return _block_gram(*_library.flatten(problems), backend)


def _run_gram(blocks, counts, scales, dtype, backend):
    problems = _library.unflatten(blocks, counts, scales)
    return _library.implementation(backend, blocks).gram(problems, dtype)


def _fake_gram(blocks, counts, scales, dtype, backend):
    problems = _library.unflatten(blocks, counts, scales)
    return [p.blocks[0].new_empty(p.rank, p.rank, dtype=dtype) for p in problems]


def _run_block_gram(blocks, counts, scales, backend):
    problems = _library.unflatten(blocks, counts, scales)
    return _library.implementation(backend, blocks).block_gram(problems)


def _fake_block_gram(blocks, counts, scales, backend):
    problems = _library.unflatten(blocks, counts, scales)
    return [
        p.blocks[0].new_empty(sum(r * r for r in p.ranks), dtype=torch.float64) for p in problems
    ]


_gram = _library.define(
    "gram",
    f"({_library.PROBLEMS}, ScalarType dtype, str backend) -> Tensor[]",
    _run_gram,
    _fake_gram,
)
_block_gram = _library.define(
    "block_gram",
    f"({_library.PROBLEMS}, str backend) -> Tensor[]",
    _run_block_gram,
    _fake_block_gram,
)
