"""How the memory of a problem's blocks is laid out for kernels that read addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers by which csrc/common/problem.h knows them."""


def arrange(
    problem: Side, in_columns: bool, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[int]]:
    """The problem's blocks in one layout, and the distance from one row of memory to the next.

    Rows: element (r, c) of X_i [r_i, d] lies at r * pitch + c; columns: at c * pitch + r. A block
    laid out otherwise is copied, a slice of a larger matrix is not. dtype: what all blocks are
    brought to; None leaves each as it is, but for float64, which becomes float32.
    """
    blocks, pitches = [], []
    d = problem.d
    for block, rank in zip(problem.blocks, problem.ranks):
        wanted = dtype or (block.dtype if block.dtype in DTYPES else torch.float32)
        if block.dtype != wanted:
            block = block.to(wanted)
        pitch, step = block.stride()
        if in_columns:
            pitch, step = step, pitch
        width = rank if in_columns else d
        if step != 1 or pitch < width:
            block = block.T.contiguous().T if in_columns else block.contiguous()
            pitch = width
        blocks.append(block)
        pitches.append(pitch)
    return blocks, pitches


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors' elements begin; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it where it is no dense piece of memory; a transposed one is."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


def matrices(coefficients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Float32, row-major."""
    return [None if c is None else c.float().contiguous() for c in coefficients]
