"""C in two parts of 16 bits, made once by a launch before those that make products with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ... import _C
from .tables import Table

__all__ = ["Split", "Splitting"]


class Splitting(Protocol):
    """The launch that splits, of a backend whose kernels read parts."""

    rows: int
    """Of C, that a tile has."""

    def numbers(self, rows: int, rank: int) -> int:
        """How many float32 the parts of C [rows, rank] take the place of."""

    def launch(self, table: Table, tiles: Tensor, work: Tensor) -> None:
        """The parts of C times the scales of X. tiles [N, 2]: problem, first row. work [P, 3]:
        address of C (float32 [K, R]) or 0, K, address of the parts."""


@dataclass(frozen=True, eq=False)
class Split:
    """What makes the parts that kernels read in place of C. tables: the numbers of those that its
    launch reads, tiles and work. memory: what the parts lie in."""

    splitting: Splitting | None = None
    tables: tuple[int, int] = (0, 0)
    memory: Tensor | None = None

    @classmethod
    def of(cls, splitting: Splitting | None, made: _C.LaunchTables, device: torch.device) -> Split:
        """Parts of the coefficients that the tables know; none without `splitting`."""
        if splitting is None:
            return cls()
        memory = torch.empty(made.part_numbers(splitting.numbers), device=device)
        return cls(splitting, made.split(memory.data_ptr(), splitting.rows), memory)

    def make(self, table: Table, made: Sequence[Tensor]) -> None:
        """Launches it. made: all tables, on the device."""
        if self.splitting is not None:
            tiles, work = self.tables
            self.splitting.launch(table, made[tiles], made[work])
