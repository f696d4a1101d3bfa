"""One side of one module: the stacked factors that the ops work on.

Notation (the same in code, docs and tests): T adapters; adapter i owns the block X_i [r_i, d];
the stacked X is [R, d] with R = sum(r_i). On the A side X_i = A_i and d = n; on the B side
X_i = B_i.T, a view of the stored [m, r_i] matrix, and d = m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False, slots=True)  # not frozen: every op makes them again, 18,000 modules long
class Side:
    """Blocks X_i [r_i, d] and the scale that is multiplied into each on reading.

    The memory of a block is row-major [r_i, d] ("rows") or the transpose of a row-major
    [d, r_i] matrix ("columns"). ranks: the r_i; rank: R. ValueError unless there is a scale for
    every block, and a block.
    """

    blocks: tuple[Tensor, ...]
    scales: tuple[float, ...]
    ranks: tuple[int, ...] = field(init=False)
    rank: int = field(init=False)
    d: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.scales):
            raise ValueError(f"a side needs one scale a block, got {len(self.blocks)} blocks")
        self.d = self.blocks[0].shape[1]
        self.ranks = tuple([block.shape[0] for block in self.blocks])
        self.rank = sum(self.ranks)

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    @property
    def in_columns(self) -> bool:
        """Whether the first block is the transpose of a row-major [d, r] matrix."""
        return self.blocks[0].stride()[0] == 1 and self.d > 1

    def stack(self, dtype: torch.dtype) -> Tensor:
        """X [R, d] with the scales multiplied in, in the memory layout of the first block."""
        if self.in_columns:
            return torch.cat([s * b.T.to(dtype) for b, s in zip(self.blocks, self.scales)], 1).T
        return torch.cat([s * b.to(dtype) for b, s in zip(self.blocks, self.scales)], 0)


def check_sides(problems: Sequence[Side]) -> None:
    """Raise ValueError unless every problem can be handed to a kernel."""
    for p in problems:
        d, device = p.d, p.device
        for block, rank in zip(p.blocks, p.ranks):
            if block.shape != (rank, d) or not rank:
                raise ValueError(f"blocks must be [r_i, {d}], got {tuple(block.shape)}")
            if block.dtype not in FACTOR_DTYPES and block.dtype != torch.float64:
                raise ValueError(f"blocks must be floating point, got {block.dtype}")
            if block.device != device:
                raise ValueError(f"blocks on {device} and {block.device} in one side")
