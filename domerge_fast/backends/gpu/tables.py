"""The numbers that a launch over many ragged problems reads: made on the host, copied at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _C
from ...algebra.side import Side, table

__all__ = ["HostTable", "Table", "describe", "keeping", "upload"]

_captured: list[Tensor] = []
"""Host tables that CUDA graphs read again at every replay, of graphs that nobody told of."""
_kept: ContextVar[list[Tensor] | None] = ContextVar("kept", default=None)
"""Where those of a graph go that frees them."""


@dataclass(frozen=True, eq=False)
class Table:
    """Problems as numbers on their device (int64).

    blocks [N, 4]: address, pitch in elements, first row within its problem, scale (the bits of a
    float64). owner [rows]: the block of every stacked row, all problems one after the other.
    problems [P, 6]: first row in owner, R, d, first block, blocks, 1 for the layout in columns
    (see Side.ready). dtype: that of all blocks. largest: the largest r_i. even: how many neighbours
    of every block, in either layout, one read can take: 16 bytes or 1. alive: what the addresses
    point into.
    """

    blocks: Tensor
    owner: Tensor
    problems: Tensor
    dtype: torch.dtype
    largest: int
    even: int
    alive: list[Side]


@dataclass(frozen=True, eq=False)
class HostTable:
    """Problems on the host, and whatever other tables are made of them: `made` numbers these."""

    made: _C.LaunchTables
    dtype: torch.dtype
    even: int
    alive: list[Side]

    def uploaded(self) -> tuple[Table, list[Tensor]]:
        """The problems on the device of their blocks, and all tables by their numbers."""
        found = upload(self.alive[0].device, self.made)
        blocks, owner, problems, *_ = found
        told = self.dtype, self.made.largest_rank, self.even, self.alive
        return Table(blocks, owner, problems, *told), found


def describe(problems: Sequence[Side], rows_only: bool = False) -> HostTable:
    """The problems' tables. Blocks of mixed dtypes become float32."""
    given = table(problems, rows_only)
    dtypes = {dtype for layout in {x.layout for x in given.sides} for dtype in layout.dtypes}
    if len(dtypes) > 1:
        given = table(problems, rows_only, torch.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    made = _C.LaunchTables()
    even = made.describe(*given[:3], 16 // dtype.itemsize)
    return HostTable(made, dtype, even, given.sides)


@contextmanager
def keeping(tables: list[Tensor]) -> Iterator[None]:
    """Host tables of what is captured meanwhile go there, and are to live as long as the graph."""
    token = _kept.set(tables)
    try:
        yield
    finally:
        _kept.reset(token)


def upload(device: torch.device, made: _C.LaunchTables) -> list[Tensor]:
    """The tables on the device, all of them in one copy that nothing waits for; RuntimeError where
    more are made then.

    The host's copy of what a CUDA graph captures is kept where `keeping` says, or for good: every
    replay reads it.
    """
    if not made.places:
        return []
    flat = torch.frombuffer(made, dtype=torch.int64)
    if device.type != "cpu":
        pinned = flat.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            kept = _kept.get()
            (_captured if kept is None else kept).append(pinned)
        flat = pinned.to(device, non_blocking=True)
    return [
        flat.as_strided((rows, width), (width, 1), first)
        if width
        else flat.as_strided((rows,), (1,), first)
        for first, rows, width in made.places
    ]
