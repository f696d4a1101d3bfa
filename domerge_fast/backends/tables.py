"""The numbers that a launch over many ragged problems reads: made on the host, copied at once."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..problem import Problem
from .layout import arrange

ALIGNMENT = 16
"""What shares an allocation starts at multiples of this many elements."""

_captured: list[Tensor] = []
"""Host tables that CUDA graphs read again at every replay."""


@dataclass(frozen=True, eq=False)
class Table:
    """Problems as numbers on their device (int64).

    blocks [N, 4]: address, pitch in elements, first row within its problem, scale (the bits of a
    float64). owner [rows]: the block of every stacked row, all problems one after the other.
    problems [P, 6]: first row in owner, R, d, first block, blocks, 1 for the layout in columns
    (see layout.arrange). dtype: that of all blocks. alive: what the addresses point into.
    """

    blocks: Tensor
    owner: Tensor
    problems: Tensor
    dtype: torch.dtype
    alive: list[Tensor]

    def to(self, blocks: Tensor, owner: Tensor, problems: Tensor) -> Table:
        """The same table with its numbers elsewhere."""
        return Table(blocks, owner, problems, self.dtype, self.alive)


def describe(problems: Sequence[Problem], rows_only: bool = False) -> Table:
    """The table of the problems, on the host. Blocks of mixed dtypes become float32."""
    for p in problems:
        if p.device != problems[0].device:
            raise ValueError(f"problems on {problems[0].device} and {p.device} in one call")
    dtypes = {block.dtype for p in problems for block in p.blocks}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = torch.float32 if dtype == torch.float64 else dtype
    alive: list[Tensor] = []
    blocks: list[int] = []
    ranks: list[int] = []
    heads: list[int] = []
    first_row = 0
    for p in problems:
        in_columns = p.in_columns and not rows_only
        heads += (first_row, p.rank, p.d, len(alive), len(p.blocks), in_columns)
        row = 0
        for block, pitch, scale in zip(*arrange(p, in_columns, dtype), p.scales):
            blocks += (block.data_ptr(), pitch, row, float_bits(scale))
            alive.append(block)
            row += block.shape[0]
        ranks += p.ranks
        first_row += p.rank
    owner = torch.repeat_interleave(torch.tensor(ranks))
    return Table(_rows(blocks, 4), owner, _rows(heads, 6), dtype, alive)


def _rows(numbers: list[int], width: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).view(-1, width)


def float_bits(x: float) -> int:
    """The bits of a float64 as an int64."""
    return int.from_bytes(struct.pack("<d", x), "little", signed=True)


def upload(device: torch.device, tables: Sequence[Tensor]) -> list[Tensor]:
    """The int64 tables on the device, all of them in one copy that nothing waits for.

    Each starts at a multiple of 16 bytes, which Triton compiles kernels for. The host's copy of
    what a CUDA graph captures is kept for good: every replay reads it.
    """
    if device.type == "cpu" or not tables:
        return list(tables)
    even = [t.numel() + t.numel() % 2 for t in tables]
    flat = torch.cat(
        [torch.nn.functional.pad(t.flatten(), (0, n - t.numel())) for t, n in zip(tables, even)]
    )
    pinned = flat.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    pieces = pinned.to(device, non_blocking=True).split(even)
    return [piece[: t.numel()].view(t.shape) for piece, t in zip(pieces, tables)]


def places(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where results of these sizes begin in one allocation, in elements, and its size."""
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    return [0, *ends[:-1]], ends[-1] if ends else 0


def buckets(ranks: Mapping[int, int], sizes: Sequence[int]) -> dict[int, list[int]]:
    """Problems (position -> R) by the padded size that serves them; the last serves all larger."""
    found: dict[int, list[int]] = {}
    for i, rank in ranks.items():
        size = next((s for s in sizes if s >= rank), sizes[-1])
        found.setdefault(size, []).append(i)
    return found


def largest_first(
    rows: Sequence[tuple[int, ...]], cost: Callable[[tuple[int, ...]], int]
) -> Tensor:
    """The rows of a table, the most expensive ones first: what starts last should be short."""
    return torch.tensor(sorted(rows, key=cost, reverse=True), dtype=torch.int64)


def gram_tiles(
    problems: Sequence[Problem],
    members: Sequence[int],
    offsets: Sequence[int],
    size: int,
    chunk: int,
) -> tuple[Tensor, Tensor, int]:
    """Tiles [N, 7], sums [M, 6] and the number of parts, as Kernels.gram wants them."""
    tiles, sums = [], []
    parts = 0
    for k in members:
        p, offset = problems[k], offsets[k]
        count = -(-p.rank // size)
        bounds = [*range(0, p.d, chunk), p.d]
        for i in range(count):
            for j in range(i + 1):
                if len(bounds) == 2:
                    tiles.append((k, i, j, 0, p.d, -1, offset))
                    continue
                sums.append((k, i, j, parts, len(bounds) - 1, offset))
                for begin, end in pairwise(bounds):
                    tiles.append((k, i, j, begin, end, parts, offset))
                    parts += 1
    return (
        largest_first(tiles, lambda t: t[4] - t[3]),
        _rows([x for s in sums for x in s], 6),
        parts,
    )


def column_tiles(
    problems: Sequence[Problem], members: Sequence[int], columns: int
) -> list[tuple[int, int, int]]:
    """(problem, first column, number of the tile within its problem)."""
    return [
        (k, begin, slot)
        for k in members
        for slot, begin in enumerate(range(0, problems[k].d, columns))
    ]
