"""The numbers that a launch over many ragged problems reads: made on the host, copied at once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...algebra.side import Side, table
from ..layout import addresses

__all__ = [
    "Table",
    "buckets",
    "column",
    "describe",
    "each",
    "float_bits",
    "gram_tiles",
    "grid",
    "keeping",
    "largest_first",
    "numbers",
    "offsets",
    "places",
    "upload",
    "within",
]

ALIGNMENT = 16
"""What shares an allocation starts at multiples of this many elements."""

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
    point into. ranks [N]: r_i, on the host.
    """

    blocks: Tensor
    owner: Tensor
    problems: Tensor
    ranks: Tensor
    dtype: torch.dtype
    largest: int
    even: int
    alive: list[Side]

    def uploaded(self, others: Sequence[Tensor]) -> tuple[Table, Iterator[Tensor]]:
        """The same table, and others, on the device of its blocks: in one copy (`upload`)."""
        own = self.blocks, self.owner, self.problems
        blocks, owner, problems, *rest = upload(self.alive[0].device, [*own, *others])
        return replace(self, blocks=blocks, owner=owner, problems=problems), iter(rest)


def describe(problems: Sequence[Side], rows_only: bool = False) -> Table:
    """The table of the problems, on the host. Blocks of mixed dtypes become float32."""
    given = table(problems, rows_only)
    dtypes = {dtype for layout in {x.layout for x in given.sides} for dtype in layout.dtypes}
    if len(dtypes) > 1:
        given = table(problems, rows_only, torch.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    begins, heads, rows_of = map(column, given[:3])
    counts, rank, d, columns = heads.view(-1, 4).unbind(1)
    ranks, pitches, _, scales = rows_of.view(-1, 4).unbind(1)
    first_row, first_block = rank.cumsum(0) - rank, counts.cumsum(0) - counts
    starts = ranks.cumsum(0) - ranks - first_row.repeat_interleave(counts)
    blocks = torch.stack([begins, pitches, starts, scales], 1)
    heads = torch.stack([first_row, rank, d, first_block, counts, columns], 1)
    owner = torch.repeat_interleave(ranks)
    count = 16 // dtype.itemsize
    odd = [begins % 16, ranks % count, pitches % count, d % count]
    even = 1 if any(bool(x.any()) for x in odd) else count
    return Table(blocks, owner, heads, ranks, dtype, int(ranks.max()), even, given.sides)


def column(packed: bytes | memoryview) -> Tensor:
    """int64 numbers that lie as `storage.buffers.packed`."""
    if not packed:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(packed), dtype=torch.int64)


def offsets(results: Sequence[Tensor], dims: int = 2) -> Tensor:
    """`layout.addresses` of results that lie together, in elements from where the first begins."""
    at = column(addresses(results, dims=dims))
    return (at - at[0]) // results[0].itemsize


def within(sizes: Tensor, first: Tensor, owner: Tensor) -> Tensor:
    """Where pieces of these sizes begin, those of an owner one after the other. first: the first
    piece of every owner; owner: of every piece."""
    begins = sizes.cumsum(0) - sizes
    return begins - begins[first][owner]


def numbers(values: Iterable[int], width: int | None = None) -> Tensor:
    """int64 numbers, in rows of `width` where it is given."""
    flat = array("q", values)
    found = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    return found if width is None else found.view(-1, width)


def float_bits(values: Sequence[float]) -> Tensor:
    """The bits of float64 numbers, as int64."""
    return torch.frombuffer(array("d", values), dtype=torch.int64)


@contextmanager
def keeping(tables: list[Tensor]) -> Iterator[None]:
    """Host tables of what is captured meanwhile go there, and are to live as long as the graph."""
    token = _kept.set(tables)
    try:
        yield
    finally:
        _kept.reset(token)


def upload(device: torch.device, tables: Sequence[Tensor]) -> list[Tensor]:
    """The int64 tables on the device, all of them in one copy that nothing waits for.

    Each starts at a multiple of 16 bytes, which Triton compiles kernels for. The host's copy of
    what a CUDA graph captures is kept where `keeping` says, or for good: every replay reads it.
    """
    if device.type == "cpu" or not tables:
        return [t.contiguous() for t in tables]
    even = [t.numel() + t.numel() % 2 for t in tables]
    flat = torch.cat(
        [torch.nn.functional.pad(t.flatten(), (0, n - t.numel())) for t, n in zip(tables, even)]
    )
    pinned = flat.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        kept = _kept.get()
        (_captured if kept is None else kept).append(pinned)
    pieces = pinned.to(device, non_blocking=True).split(even)
    return [piece[: t.numel()].view(t.shape) for piece, t in zip(pieces, tables)]


def places(sizes: Tensor) -> tuple[Tensor, int]:
    """Where results of these sizes begin in one allocation, in elements, and its size."""
    taken = (sizes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return taken.cumsum(0) - taken, int(taken.sum())


def buckets(ranks: Tensor, sizes: Sequence[int]) -> dict[int, Tensor]:
    """Problems, by their R, by the padded size that serves them; the last serves all larger."""
    which = torch.bucketize(ranks.contiguous(), torch.tensor(sizes)).clamp_max(len(sizes) - 1)
    return {sizes[k]: (which == k).nonzero()[:, 0] for k in which.unique().tolist()}


def largest_first(table: Tensor, cost: Tensor) -> Tensor:
    """The rows by falling cost: what starts last should be short."""
    return table[cost.argsort(descending=True, stable=True)]


def gram_tiles(
    members: Tensor, ranks: Tensor, d: Tensor, offsets: Tensor, size: int, chunk: int
) -> tuple[Tensor, Tensor, int]:
    """Tiles [N, 7], sums [M, 6] and the number of parts, as Kernels.gram wants them.

    members: the problems; ranks, d, offsets: of all that there are.
    """
    heights = -(-ranks[members] // size)
    counts = heights * (heights + 1) // 2
    owner, number = each(counts)
    k = members[owner]
    most = int(heights.max())
    lower = torch.stack([k, *torch.tril_indices(most, most)[:, number]], 1)
    stretches = -(-d[k] // chunk)
    pair, stretch = each(stretches)
    is_cut = stretches != 1
    taken = torch.where(is_cut, stretches, 0)
    first = taken.cumsum(0) - taken
    begins = stretch * chunk
    ends = torch.minimum(begins + chunk, d[k][pair])
    part = torch.where(is_cut[pair], first[pair] + stretch, -1)
    tiles = torch.stack([*lower[pair].unbind(1), begins, ends, part, offsets[k][pair]], 1)
    sums = torch.stack([*lower.unbind(1), first, stretches, offsets[k]], 1)[is_cut]
    return largest_first(tiles, ends - begins), sums, int(taken.sum())


def grid(members: Tensor, heights: Tensor, widths: Tensor, height: int, width: int) -> Tensor:
    """(problem, first row, first column, number of the tile) [N, 4] of tiles of height x width.

    members: the problems; heights and widths: their results' sizes.
    """
    across = -(-widths // width)
    owner, number = each(-(-heights // height) * across)
    row = number // across[owner] * height
    column = number % across[owner] * width
    return torch.stack([members[owner], row, column, number], 1)


def each(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of so many things of every owner: the owner, and the number among its own."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
