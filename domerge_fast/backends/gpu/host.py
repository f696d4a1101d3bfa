"""What the CUDA and the Triton backend share: which numbers a launch reads, and where it writes.

The kernels differ (`Kernels`); the tables, the tiles and the allocations are the same. One launch
does all problems of an op, whatever their shapes: R is padded to a few sizes, work is cut into
tiles, the largest first, and sums over d into fixed chunks that are added in order, so that
results are bitwise the same every time. Launches are on the current stream, nothing waits for
them (but library calls, and descents of many launches between steps), and so a call can be captured
in a CUDA graph: after one call outside it, with capture_error_mode="relaxed", because the tables go
through pinned memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...algebra.side import CODES, Side, squares
from .. import torch as by_torch
from ..descent import STATS
from ..layout import addresses, dense, matrices, row_major, together
from ..singly import Singly
from . import splitting, tables
from .kernels import Kernels
from .roots import MAX_RANK, find_large
from .tables import Table

__all__ = ["Gpu", "region"]

GRAM_CHUNK = 4096
"""Columns of X that are summed at a stretch."""

library = Singly(by_torch)

LARGEST_CHUNK = 1 << 16
"""Elements that one block looks through for the largest."""


@dataclass(frozen=True, eq=False)
class Gpu:
    """The ops of registry.OPS on the kernels that `load` gives."""

    load: Callable[[], Kernels]

    def gram(self, problems: Sequence[Side], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """X X^T [R, R] of every problem; in float64 by library calls."""
        if dtype == torch.float64 or not problems:
            return library.gram(problems, dtype)
        kernels = self.load()
        with region("gram", problems[0].device) as device:
            host = tables.describe(problems)
            shapes, counts = [(p.rank, p.rank) for p in problems], [p.count for p in problems]
            grams = together(shapes, torch.float32, device, counts)
            _, ranks, d, *_ = host.problems.unbind(1)
            at = tables.offsets(grams)
            plans = [
                (size, *tables.gram_tiles(members, ranks, d, at, size, GRAM_CHUNK))
                for size, members in tables.buckets(ranks, kernels.sizes("gram")).items()
            ]
            table, rest = host.uploaded([x for _, *pair, _ in plans for x in pair])
            for size, _, _, count in plans:
                parts = torch.empty(count, size, size, device=device)
                kernels.gram(table, size, next(rest), next(rest), parts, grams[0])
        return grams

    def block_gram(self, problems: Sequence[Side]) -> list[Tensor]:
        """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
        if not problems:
            return []
        kernels = self.load()
        with region("block_gram", problems[0].device) as device:
            host = tables.describe(problems)
            sizes, counts = [(squares(p.ranks),) for p in problems], [p.count for p in problems]
            packed = together(sizes, torch.float64, device, counts)
            first, owner = _owners(host)
            numbers = host.ranks**2
            at = tables.offsets(packed, dims=1)[owner] + tables.within(numbers, first, owner)
            jobs = torch.stack([owner, torch.arange(len(owner)), host.ranks, at], 1)
            cost = host.problems[owner, 2] * numbers
            table, rest = host.uploaded([tables.largest_first(jobs, cost)])
            kernels.block_gram(table, next(rest), packed[0])
        return packed

    def orthogonalize(
        self,
        grams: Sequence[Tensor],
        ranks: Sequence[tuple[int, ...]],
        penalty: str = "squared",
        gamma: float = 1.0,
        steps: int = 50,
        tol: float = 1e-3,
    ) -> tuple[list[Tensor], Tensor]:
        """C [R, R] of every problem and the descent's statistics [P, 5] (see descent.STATS)."""
        if not grams:
            return [], torch.empty(0, len(STATS), dtype=torch.float64)
        kernels = self.load()
        with region("orthogonalize", grams[0].device) as device:
            given = [row_major(g.float()) for g in grams]
            counts = [len(g) if g.dim() == 3 else None for g in given]
            shapes = [(g.shape[-1], g.shape[-1]) for g in given]
            cs = together(shapes, torch.float32, device, counts)
            at = tables.offsets(cs)
            stats = torch.empty(len(at), len(STATS), dtype=torch.float64, device=device)
            begins = tables.numbers(x for own in ranks for x in accumulate(own, initial=0))
            adapters_of = tables.numbers(map(len, ranks))
            first = (adapters_of + 1).cumsum(0) - adapters_of - 1
            of_side = [tables.numbers(n for n, _ in shapes), adapters_of, first]
            side = _sides(counts)
            columns = [tables.column(addresses(given)), *(x[side] for x in of_side)]
            work = torch.stack([*columns, at, torch.arange(len(at))], 1)
            groups = tables.buckets(work[:, 1], kernels.sizes("orthogonalize"))
            jobs = [work[members] for members in groups.values()]
            jobs = [tables.largest_first(table, table[:, 1]) for table in jobs]
            begin_of, *works = tables.upload(device, [begins, *jobs])
            rule = (penalty == "frobenius", gamma, steps, tol)
            for size, work_of, table in zip(groups, works, jobs):
                adapters = int(table[:, 2].max())
                kernels.orthogonalize(size, adapters, work_of, begin_of, cs[0], stats, *rule)
        return cs, stats

    def orthogonalize_factors(
        self, problems: Sequence[Side], gamma: float = 1.0, steps: int = 50, tol: float = 1e-3
    ) -> tuple[list[Tensor], Tensor]:
        """Xhat [R, d] for the squared penalty, and statistics [P, 6]: library calls."""
        return library.orthogonalize_factors(problems, gamma, steps, tol)

    def apply(
        self,
        coefficients: Sequence[Tensor | None],
        problems: Sequence[Side],
        out_dtype: torch.dtype,
    ) -> list[Tensor]:
        """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
        if not problems:
            return []
        kernels = self.load()
        with region("apply", problems[0].device) as device:
            host = tables.describe(problems)
            cs = matrices(coefficients)
            heights = [p.rank if c is None else c.shape[-2] for c, p in zip(cs, problems)]
            shapes = [(p.d, k) if p.in_columns else (k, p.d) for k, p in zip(heights, problems)]
            results = _results(shapes, out_dtype, problems)
            _, ranks, d, *_ = host.problems.unbind(1)
            counts = tables.numbers(heights)[_sides([p.count for p in problems])]
            own = kernels.splitting(host.dtype, out_dtype)
            at = tables.column(addresses(cs, problems))
            split = splitting.given(own, at, counts, ranks, device)
            work = torch.stack([split.addresses, counts, tables.offsets(results)], 1)
            groups = tables.buckets(counts, kernels.sizes("apply"))
            tiles = [
                tables.grid(
                    members, counts[members], d[members], size, kernels.columns("apply", size)
                )[:, :3]
                for size, members in groups.items()
            ]
            table, rest = host.uploaded([*split.tables, work, *tiles])
            split.make(table, rest)
            work_of = next(rest)
            for size in groups:
                kernels.apply(table, size, next(rest), work_of, results[0])
        return [x.mT if p.in_columns else x for x, p in zip(results, problems)]

    def apply_decouple(
        self,
        coefficients: Sequence[Tensor | None],
        problems: Sequence[Side],
        blocks: Sequence[Tensor],
        omegas: Sequence[Sequence[float]],
        scale: float,
        out_dtype: torch.dtype,
        full: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A' [R, n] and the adapters' norms ||B_i A_i||_F [T] in float64, of every problem.

        With `full` by library calls.
        """
        if full is not None or not problems:
            return library.apply_decouple(
                coefficients, problems, blocks, omegas, scale, out_dtype, full
            )
        kernels = self.load()
        with region("apply_decouple", problems[0].device) as device:
            host = tables.describe(problems, rows_only=True)
            cs = matrices(coefficients)
            packed = [k if k.stride(-1) == 1 else k.contiguous() for k in blocks]
            shapes = [(p.rank, p.d) for p in problems]
            results = _results(shapes, out_dtype, problems)
            _, ranks, d, *_ = host.problems.unbind(1)
            own = kernels.splitting(host.dtype, out_dtype)
            at = tables.column(addresses(cs, problems))
            split = splitting.given(own, at, ranks, ranks, device)
            work = torch.stack([split.addresses, tables.offsets(results)], 1)
            first, owner = _owners(host)
            begins = tables.column(addresses(packed, dims=1))[owner]
            begins += 8 * tables.within(host.ranks**2, first, owner)
            found, which = host.ranks.unique(return_inverse=True)
            root_numbers = tables.numbers(map(kernels.root_numbers, found.tolist()))
            places, root_total = tables.places(root_numbers[which])
            small = torch.where(host.ranks <= MAX_RANK, host.ranks, 0)
            roots_of = torch.stack([begins, small, places], 1)
            weights = torch.cat(
                [tables.float_bits(omega).repeat(p.modules) for omega, p in zip(omegas, problems)]
            )
            groups = tables.buckets(ranks, kernels.sizes("apply_decouple"))
            ones = torch.ones_like(d)
            tiles = [
                tables.grid(
                    members,
                    ones[members],
                    d[members],
                    1,
                    kernels.columns("apply_decouple", size),
                )[:, [0, 2, 3]]
                for size, members in groups.items()
            ]
            slots = 1 + max(int(t[:, 2].max()) for t in tiles)
            numbers = [work, roots_of, places, weights]
            table, rest = host.uploaded([*split.tables, *numbers, *tiles])
            split.make(table, rest)
            work_of, roots_work, root_at, bits = (next(rest) for _ in numbers)
            roots = torch.empty(root_total, device=device)
            norms = torch.empty(len(owner), device=device)
            energies = torch.zeros(len(owner), slots, dtype=torch.float64, device=device)
            kernels.roots(roots_work, roots, norms)
            find_large(kernels, packed, problems, places, roots, norms)
            for size, members in groups.items():
                kernels.apply_decouple(
                    table,
                    size,
                    int(ranks[members].max()),
                    next(rest),
                    work_of,
                    root_at,
                    roots,
                    norms,
                    bits.view(torch.float64),
                    scale,
                    results[0],
                    energies,
                )
            counts = [p.modules * len(p.ranks) for p in problems]
            sizes = energies.sum(1).sqrt().split_with_sizes(counts)
        pairs = zip(sizes, problems)
        return results, [x if p.count is None else x.view(p.count, -1) for x, p in pairs]

    def truncate(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        rank: int | None,
        energy: float | None,
        out_dtype: torch.dtype,
    ) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """The best approximation of every B A of rank k, by batched library calls."""
        return library.truncate(pairs, rank, energy, out_dtype)

    def block_products(
        self, x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor, ranks: Sequence[int]
    ) -> Tensor:
        """Sums of x_ij y_ij over the block of every two adapters, by batched library calls."""
        return library.block_products(x, y, ranks)

    def largest(self, tensors: Sequence[Tensor]) -> Tensor:
        """max |x| of every tensor, [N] in float64; NaN and Inf where there are such. With float64
        among them, by library calls."""
        if not tensors or any(x.dtype not in CODES for x in tensors):
            return library.largest(tensors)
        kernels = self.load()
        with region("largest", tensors[0].device) as device:
            pieces = [dense(x) for x in tensors]
            tops = torch.zeros(len(pieces), dtype=torch.int32, device=device)
            sizes = tables.numbers(x.numel() for x in pieces)
            owner, stretch = tables.each(-(-sizes // LARGEST_CHUNK))
            begin = stretch * LARGEST_CHUNK
            bytes_of = tables.numbers(x.itemsize for x in pieces)[owner]
            at = tables.numbers(x.data_ptr() for x in pieces)[owner] + begin * bytes_of
            every = torch.stack([owner, at, (sizes[owner] - begin).clamp_max(LARGEST_CHUNK)], 1)
            codes = tables.numbers(CODES[x.dtype] for x in pieces)[owner]
            present = codes.unique().tolist()
            groups = {x: every[codes == code] for x, code in CODES.items() if code in present}
            tiles_of = tables.upload(device, list(groups.values()))
            for dtype, tiles in zip(groups, tiles_of):
                kernels.largest(dtype, tiles, tops)
        return tops.view(torch.float32).double()

    def block_largest(self, problems: Sequence[Side]) -> Tensor:
        """`largest` of every block, one after the other."""
        return self.largest([block for p in problems for block in p.blocks])


def _results(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, problems: Sequence[Side]
) -> list[Tensor]:
    """Memory of its own for every problem's result."""
    device = problems[0].device
    leads = [() if p.count is None else (p.count,) for p in problems]
    pairs = zip(leads, shapes)
    return [torch.empty((*lead, *shape), dtype=dtype, device=device) for lead, shape in pairs]


def _sides(counts: Sequence[int | None]) -> Tensor:
    """Which side every module is of, by how many modules sides have."""
    return torch.repeat_interleave(tables.numbers(1 if n is None else n for n in counts))


def _owners(host: Table) -> tuple[Tensor, Tensor]:
    """The first block of every problem, and the problem of every block."""
    return host.problems[:, 3], torch.repeat_interleave(host.problems[:, 4])


@contextlib.contextmanager
def region(name: str, device: torch.device) -> Iterator[torch.device]:
    """The device made current, and an NVTX range around the launches of an op."""
    if device.type != "cuda":
        yield device
        return
    with torch.cuda.device(device), torch.cuda.nvtx.range(f"domerge_fast::{name}"):
        yield device
