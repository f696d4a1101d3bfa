"""What the CUDA and the Triton backend share: which numbers a launch reads, and where it writes.

The kernels differ (`Kernels`); the tables, the tiles and the allocations are the same. One launch
does all problems of an op, whatever their shapes: R is padded to a few sizes, work is cut into
tiles, the largest first, and sums over d into fixed chunks that are added in order, so that
results are bitwise the same every time. Launches are on the current stream, nothing waits for
them, and so a call can be captured in a CUDA graph: after one call outside it, with
capture_error_mode="relaxed", because the tables go through pinned memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ...algebra.side import Side
from .. import torch as library
from ..descent import STATS
from ..layout import addresses, dense, matrices, together
from . import tables
from .tables import Table

__all__ = ["MAX_RANK", "Gpu", "region", "upload_table"]

GRAM_CHUNK = 4096
"""Columns of X that are summed at a stretch."""

FINITE_CHUNK = 1 << 16
"""Elements that one block looks through for NaN and Inf."""

MAX_RANK = 256
"""R up to which one block works on a problem's R x R matrices; beyond it, library GEMMs do."""


class Kernels(Protocol):
    """The launches that a backend supplies.

    All tensors are on the device, all tables int64. `out` is the first problem's result; offsets of
    the others are distances from its first element, in elements, positive or negative. What
    results hold before is arbitrary.
    """

    def sizes(self, op: str) -> tuple[int, ...]:
        """The padded sizes, rising, that an op has kernels for. The tiles of "gram" and "apply"
        have these many rows and any R; "orthogonalize" and "apply_decouple" pad R to them."""

    def columns(self, op: str, size: int) -> int:
        """Columns of X in a tile of "apply" or "apply_decouple" of this size."""

    def gram(
        self, table: Table, size: int, tiles: Tensor, sums: Tensor, parts: Tensor, out: Tensor
    ) -> None:
        """G = X X^T in float32, scaled, both triangles.

        tiles [N, 7]: problem, row tile i, column tile j <= i, begin, end (columns of X), part,
        offset of G. Tile (i, j) is rows i size to (i + 1) size times rows j size to (j + 1) size.
        Part -1: the tile spans d and goes to out; else it goes, unscaled, to parts[part]
        [size, size]. sums [M, 6]: problem, i, j, first part, number of parts, offset of G: the
        parts are then added in order, scaled, and written to out.
        """

    def block_gram(self, table: Table, work: Tensor, out: Tensor) -> None:
        """K_i = X_i X_i^T in float64, scaled. work [N, 4]: problem, block, its rank, offset."""

    def orthogonalize(
        self,
        size: int,
        work: Tensor,
        starts: Tensor,
        out: Tensor,
        stats: Tensor,
        frobenius: bool,
        gamma: float,
        steps: int,
        tol: float,
    ) -> None:
        """C of every problem, by the rule of descent.py.

        work [P, 6]: address of G (float32 [R, R]), R, T, position in starts of its T + 1 entries
        (the first row of each adapter, then R), offset of C, row of stats [., 5] in float64.
        """

    def apply(self, table: Table, size: int, tiles: Tensor, work: Tensor, out: Tensor) -> None:
        """C X, or X where there is no C, scaled and cast to out's dtype.

        work [P, 3]: address of C (float32 [K, R]) or 0, K, offset. tiles [N, 3]: problem, first
        row, first column of a tile of `size` rows. Results are [K, d]; [d, K] in columns.
        """

    def roots(self, work: Tensor, out: Tensor, norms: Tensor) -> None:
        """S (float32 [r, r]) with norm^2 S^T S = K, norm^2 = trace K, of every block.

        work [N, 3]: address of K (float64 [r, r]), r, offset. norms [N] in float32. By Cholesky
        with diagonal pivoting in float64, stopped where what is left is below 1e-16 r trace K;
        the rows from there on are zero. K = 0 gives S = 0 and norm 0.
        """

    def apply_decouple(
        self,
        table: Table,
        size: int,
        tiles: Tensor,
        work: Tensor,
        offsets: Tensor,
        roots: Tensor,
        norms: Tensor,
        omegas: Tensor,
        scale: float,
        out: Tensor,
        energies: Tensor,
    ) -> None:
        """A' [R, d] of ops.apply_decouple without `full`, for problems in rows.

        work [P, 2]: address of C (float32 [R, R]) or 0, offset. tiles [N, 3]: problem, first
        column, slot. offsets [N]: of every block's S in roots; norms and omegas (float64) [N]: one
        a block. energies [N, slots] in float64, zero before: the sum of mag_i^2 over a slot's
        columns. Where ||S_i a_i|| <= ZERO_COLUMN ||a_i||, mag_i is zero.
        """

    def all_finite(self, dtype: torch.dtype, tiles: Tensor, flags: Tensor) -> None:
        """Sets flags[i] (int32, 1 before) to 0 where tensor i holds NaN or Inf.

        tiles [N, 3]: tensor, address of a stretch of it, elements.
        """


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
            grams, offsets = together([(p.rank, p.rank) for p in problems], torch.float32, device)
            plans = [
                (size, *tables.gram_tiles(problems, members, offsets, size, GRAM_CHUNK))
                for size, members in _by_rank(problems, kernels.sizes("gram")).items()
            ]
            table, rest = upload_table(host, [x for _, *pair, _ in plans for x in pair])
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
            sizes = [(sum(r * r for r in p.ranks),) for p in problems]
            packed, offsets = together(sizes, torch.float64, device)
            work: list[int] = []
            block = 0
            for k, (p, at) in enumerate(zip(problems, offsets)):
                for r in p.ranks:
                    work += (k, block, r, at)
                    at += r * r
                    block += 1
            jobs = tables.numbers(work, 4)
            cost = host.problems[jobs[:, 0], 2] * jobs[:, 2] ** 2
            table, rest = upload_table(host, [tables.largest_first(jobs, cost)])
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
        """C [R, R] of every problem and the descent's statistics [P, 5] (see descent.STATS).

        Problems with R above MAX_RANK go through batched library calls.
        """
        large = [i for i, g in enumerate(grams) if len(g) > MAX_RANK]
        small = {i: g.float().contiguous() for i, g in enumerate(grams) if len(g) <= MAX_RANK}
        if not small:
            return library.orthogonalize(grams, ranks, penalty, gamma, steps, tol)
        kernels = self.load()
        results: list[Tensor] = list(grams)
        with region("orthogonalize", grams[0].device) as device:
            stats = torch.empty(len(grams), len(STATS), dtype=torch.float64, device=device)
            if large:
                found, stats[large] = library.orthogonalize(
                    [grams[i] for i in large], [ranks[i] for i in large], penalty, gamma, steps, tol
                )
                for i, c in zip(large, found):
                    results[i] = c
            cs, offsets = together([g.shape for g in small.values()], torch.float32, device)
            starts: list[int] = []
            work: dict[int, tuple[int, ...]] = {}
            for (i, g), at in zip(small.items(), offsets):
                work[i] = (g.data_ptr(), len(g), len(ranks[i]), len(starts), at, i)
                starts += accumulate(ranks[i], initial=0)
            groups = tables.buckets(
                {i: len(g) for i, g in small.items()}, kernels.sizes("orthogonalize")
            )
            jobs = [tables.rows([work[i] for i in members], 6) for members in groups.values()]
            jobs = [tables.largest_first(table, table[:, 1]) for table in jobs]
            begins, *works = tables.upload(device, [tables.numbers(starts), *jobs])
            rule = (penalty == "frobenius", gamma, steps, tol)
            for size, rows_of in zip(groups, works):
                kernels.orthogonalize(size, rows_of, begins, cs[0], stats, *rule)
            for i, c in zip(small, cs):
                results[i] = c
        return results, stats

    def orthogonalize_factors(
        self, problems: Sequence[Side], gamma: float = 1.0, steps: int = 50, tol: float = 1e-3
    ) -> tuple[list[Tensor], Tensor]:
        """Xhat [R, d] where R > d, and statistics [P, 5]: library calls."""
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
            counts = [p.rank if c is None else len(c) for c, p in zip(cs, problems)]
            shapes = [(p.d, k) if p.in_columns else (k, p.d) for k, p in zip(counts, problems)]
            results, offsets = _results(shapes, out_dtype, device)
            work = tables.rows(zip(addresses(cs), counts, offsets), 3)
            groups = tables.buckets(dict(enumerate(counts)), kernels.sizes("apply"))
            tiles = [
                tables.grid(
                    members,
                    [counts[k] for k in members],
                    [problems[k].d for k in members],
                    size,
                    kernels.columns("apply", size),
                )[:, :3]
                for size, members in groups.items()
            ]
            table, rest = upload_table(host, [work, *tiles])
            work_of = next(rest)
            for size in groups:
                kernels.apply(table, size, next(rest), work_of, results[0])
        return [x.T if p.in_columns else x for x, p in zip(results, problems)]

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

        With `full`, or R above MAX_RANK in any problem, by library calls.
        """
        if (
            full is not None
            or max((p.rank for p in problems), default=0) > MAX_RANK
            or not problems
        ):
            return library.apply_decouple(
                coefficients, problems, blocks, omegas, scale, out_dtype, full
            )
        kernels = self.load()
        with region("apply_decouple", problems[0].device) as device:
            host = tables.describe(problems, rows_only=True)
            cs = matrices(coefficients)
            packed = [k.contiguous() for k in blocks]
            results, offsets = _results([(p.rank, p.d) for p in problems], out_dtype, device)
            work = tables.rows(zip(addresses(cs), offsets), 2)
            squares = []
            for p, k in zip(problems, packed):
                address = k.data_ptr()
                for r in p.ranks:
                    squares.append((address, r))
                    address += 8 * r * r
            places, root_total = tables.places(r * r for _, r in squares)
            roots_of = tables.rows(((*square, at) for square, at in zip(squares, places)), 3)
            weights = tables.float_bits([w for omega in omegas for w in omega])
            groups = _by_rank(problems, kernels.sizes("apply_decouple"))
            tiles = [
                tables.grid(
                    members,
                    [1] * len(members),
                    [problems[k].d for k in members],
                    1,
                    kernels.columns("apply_decouple", size),
                )[:, [0, 2, 3]]
                for size, members in groups.items()
            ]
            slots = 1 + max(int(t[:, 2].max()) for t in tiles)
            numbers = [work, roots_of, tables.numbers(places), weights]
            table, rest = upload_table(host, [*numbers, *tiles])
            work_of, roots_work, root_at, bits = (next(rest) for _ in numbers)
            roots = torch.empty(root_total, device=device)
            norms = torch.empty(len(squares), device=device)
            energies = torch.zeros(len(squares), slots, dtype=torch.float64, device=device)
            kernels.roots(roots_work, roots, norms)
            for size in groups:
                kernels.apply_decouple(
                    table,
                    size,
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
            counts = [len(p.ranks) for p in problems]
            sizes = energies.sum(1).sqrt().split_with_sizes(counts)
        return results, list(sizes)

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
        self, x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int]
    ) -> Tensor:
        """Sums of x_ij y_ij over the block of every two adapters, by batched library calls."""
        return library.block_products(x, y, ranks)

    def all_finite(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Whether each tensor (float32, bfloat16 or float16) holds neither NaN nor Inf."""
        if not tensors:
            return []
        kernels = self.load()
        with region("all_finite", tensors[0].device) as device:
            pieces = [dense(x) for x in tensors]
            flags = torch.ones(len(pieces), dtype=torch.int32, device=device)
            groups: dict[torch.dtype, list[tuple[int, int, int]]] = {}
            for i, x in enumerate(pieces):
                for begin in range(0, x.numel(), FINITE_CHUNK):
                    count = min(FINITE_CHUNK, x.numel() - begin)
                    address = x.data_ptr() + begin * x.element_size()
                    groups.setdefault(x.dtype, []).append((i, address, count))
            tiles_of = tables.upload(device, [tables.rows(g, 3) for g in groups.values()])
            for dtype, tiles in zip(groups, tiles_of):
                kernels.all_finite(dtype, tiles, flags)
        return [bool(flag) for flag in flags.tolist()]


def _results(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[int]]:
    """Memory of its own for every result, and each one's offset from the first."""
    results = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    first = results[0].data_ptr()
    return results, [(x.data_ptr() - first) // dtype.itemsize for x in results]


def _by_rank(problems: Sequence[Side], sizes: Sequence[int]) -> dict[int, list[int]]:
    return tables.buckets({k: p.rank for k, p in enumerate(problems)}, sizes)


def upload_table(host: Table, others: list[Tensor]) -> tuple[Table, Iterator[Tensor]]:
    """The table and others on the device of the table's blocks."""
    device = host.alive[0].device
    first, *rest = tables.upload(device, [host.blocks, host.owner, host.problems, *others])
    owner, problems, *others = rest
    return host.to(first, owner, problems), iter(others)


@contextlib.contextmanager
def region(name: str, device: torch.device) -> Iterator[torch.device]:
    """The device made current, and an NVTX range around the launches of an op."""
    if device.type != "cuda":
        yield device
        return
    with torch.cuda.device(device), torch.cuda.nvtx.range(f"domerge_fast::{name}"):
        yield device
