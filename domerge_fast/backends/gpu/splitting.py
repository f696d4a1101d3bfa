"""C in two parts of 16 bits, made once by a launch before those that make products with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import tables
from .tables import Table

__all__ = ["Split", "Splitting", "given"]


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
    """What kernels read of C of every problem: its address, that of its parts, or 0.

    tables: what the launch that makes the parts reads, to be uploaded; none where C is not split.
    memory: what the parts lie in.
    """

    addresses: Tensor
    splitting: Splitting | None = None
    tables: Sequence[Tensor] = ()
    memory: Tensor | None = None

    def make(self, table: Table, rest: Iterator[Tensor]) -> None:
        """The parts; takes this one's tables from those that were uploaded."""
        if self.splitting is not None:
            self.splitting.launch(table, next(rest), next(rest))


def given(
    splitting: Splitting | None,
    cs: Tensor,
    rows: Tensor,
    ranks: Tensor,
    device: torch.device,
) -> Split:
    """cs: addresses of C [rows, rank] of every problem, 0 where there is none."""
    members = cs.nonzero()[:, 0]
    if splitting is None or not len(members):
        return Split(cs)
    above = int(ranks.max()) + 1
    codes, which = (rows * above + ranks).unique(return_inverse=True)
    sizes = tables.numbers(splitting.numbers(*divmod(x, above)) for x in codes.tolist())[which]
    places, total = tables.places(torch.where(cs != 0, sizes, 0))
    memory = torch.empty(total, device=device)
    parts = torch.where(cs != 0, memory.data_ptr() + memory.itemsize * places, 0)
    heights = rows[members]
    tiles = tables.grid(members, heights, torch.ones_like(heights), splitting.rows, 1)[:, :2]
    work = torch.stack([cs, rows, parts], 1)
    return Split(parts, splitting, [tiles, work], memory)
