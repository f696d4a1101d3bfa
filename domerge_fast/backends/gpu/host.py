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

import torch
from torch import Tensor

from ... import _C
from ...algebra.described import FACTOR_DTYPES
from ...algebra.side import CODES, Side, squares, table
from .. import torch as by_torch
from ..descent import STATS
from ..layout import addresses, dense, matrices, placed, row_major
from ..singly import Singly
from . import tables
from .kernels import Kernels
from .roots import MAX_RANK, find_large
from .splitting import Split
from .tables import HostTable

__all__ = ["Gpu", "region"]

GRAM_CHUNK = 4096
"""Columns of X that are summed at a stretch."""

library = Singly(by_torch)

LARGEST_CHUNK = 1 << 16
"""Elements that one block looks through for the largest."""

ITEMSIZES = [dtype.itemsize for dtype in FACTOR_DTYPES]
"""Bytes of a number, by the code of its dtype."""


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
            grams, at = placed(shapes, torch.float32, device, counts)
            plans = host.made.gram(kernels.sizes("gram"), at, GRAM_CHUNK)
            table, made = host.uploaded()
            for size, tiles, sums, count in plans:
                parts = torch.empty(count, size, size, device=device)
                kernels.gram(table, size, made[tiles], made[sums], parts, grams[0])
        return grams

    def block_gram(self, problems: Sequence[Side]) -> list[Tensor]:
        """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
        if not problems:
            return []
        kernels = self.load()
        with region("block_gram", problems[0].device) as device:
            host = tables.describe(problems)
            sizes, counts = [(squares(p.ranks),) for p in problems], [p.count for p in problems]
            packed, at = placed(sizes, torch.float64, device, counts)
            work = host.made.block_gram(at)
            table, made = host.uploaded()
            kernels.block_gram(table, made[work], packed[0])
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
            cs, at = placed(shapes, torch.float32, device, counts)
            stats = torch.empty(len(at), len(STATS), dtype=torch.float64, device=device)
            host, modules = _C.LaunchTables(), [1 if n is None else n for n in counts]
            sizes = kernels.sizes("orthogonalize")
            starts, plans = host.orthogonalize(sizes, addresses(given), at, ranks, modules)
            made = tables.upload(device, host)
            rule = (penalty == "frobenius", gamma, steps, tol)
            for size, work, adapters in plans:
                kernels.orthogonalize(size, adapters, made[work], made[starts], cs[0], stats, *rule)
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
        with region("apply", problems[0].device):
            host = tables.describe(problems)
            cs = matrices(coefficients)
            heights = [p.rank if c is None else c.shape[-2] for c, p in zip(cs, problems)]
            shapes = [(p.d, k) if p.in_columns else (k, p.d) for k, p in zip(heights, problems)]
            results = _results(shapes, out_dtype, problems)
            split = _read(kernels, host, cs, heights, problems, out_dtype)
            sizes, columns = _tiles(kernels, "apply")
            given = addresses(results), out_dtype.itemsize
            work, plans = host.made.apply(sizes, columns, *given)
            table, made = host.uploaded()
            split.make(table, made)
            for size, tiles in plans:
                kernels.apply(table, size, made[tiles], made[work], results[0])
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
            split = _read(kernels, host, cs, [p.rank for p in problems], problems, out_dtype)
            at, count = addresses(packed, dims=1), host.made.blocks
            roots_work, places, numbers = host.made.roots(at, kernels.root_numbers, MAX_RANK)
            sizes, columns = _tiles(kernels, "apply_decouple")
            given = addresses(results), out_dtype.itemsize, omegas, [p.modules for p in problems]
            work, weights, slots, plans = host.made.apply_decouple(sizes, columns, *given)
            table, made = host.uploaded()
            split.make(table, made)
            roots = torch.empty(numbers, device=device)
            norms = torch.empty(count, device=device)
            energies = torch.zeros(count, slots, dtype=torch.float64, device=device)
            kernels.roots(made[roots_work], roots, norms)
            find_large(kernels, packed, problems, host.made, places, roots, norms)
            bits = made[weights].view(torch.float64)
            for size, tiles, rank in plans:
                kernels.apply_decouple(
                    table,
                    size,
                    rank,
                    made[tiles],
                    made[work],
                    made[places],
                    roots,
                    norms,
                    bits,
                    scale,
                    results[0],
                    energies,
                )
            per_side = [p.modules * len(p.ranks) for p in problems]
            sizes_of = energies.sum(1).sqrt().split_with_sizes(per_side)
        pairs = zip(sizes_of, problems)
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
        pieces = [dense(x) for x in tensors]
        at, sizes = [x.data_ptr() for x in pieces], [x.numel() for x in pieces]
        host, codes = _C.LaunchTables(), [CODES[x.dtype] for x in pieces]
        plans = host.largest(at, sizes, codes, ITEMSIZES, LARGEST_CHUNK)
        return self._largest(host, plans, len(pieces), pieces[0].device)

    def block_largest(self, problems: Sequence[Side]) -> Tensor:
        """`largest` of every block, one after the other."""
        rest = [p for p in problems if not p.is_dense]
        if not problems or any(x.dtype not in CODES for p in rest for x in p.blocks):
            return self.largest([block for p in problems for block in p.blocks])
        given = table([p if p.is_dense else _without_gaps(p) for p in problems])
        host, count = _C.LaunchTables(), sum([p.modules * len(p.ranks) for p in problems])
        plans = host.block_largest(*given[:3], ITEMSIZES, LARGEST_CHUNK)
        return self._largest(host, plans, count, problems[0].device)

    def _largest(
        self,
        host: _C.LaunchTables,
        plans: Sequence[tuple[int, int]],
        count: int,
        device: torch.device,
    ) -> Tensor:
        """Of so many tensors, by tables of their stretches."""
        kernels = self.load()
        with region("largest", device):
            tops = torch.zeros(count, dtype=torch.int32, device=device)
            made = tables.upload(device, host)
            for code, tiles in plans:
                kernels.largest(FACTOR_DTYPES[code], made[tiles], tops)
        return tops.view(torch.float32).double()


def _without_gaps(p: Side) -> Side:
    """The blocks of all modules as those of one."""
    blocks = [dense(x) for x in p.blocks]
    return Side(blocks, (1.0,) * len(blocks)).ready()


def _results(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, problems: Sequence[Side]
) -> list[Tensor]:
    """Memory of its own for every problem's result."""
    device = problems[0].device
    leads = [() if p.count is None else (p.count,) for p in problems]
    pairs = zip(leads, shapes)
    return [torch.empty((*lead, *shape), dtype=dtype, device=device) for lead, shape in pairs]


def _read(
    kernels: Kernels,
    host: HostTable,
    cs: Sequence[Tensor | None],
    rows: Sequence[int],
    problems: Sequence[Side],
    out_dtype: torch.dtype,
) -> Split:
    """Tells the tables where C [rows, R] of every problem, or its parts, are read from."""
    host.made.coefficients(addresses(cs, problems), rows, [p.modules for p in problems])
    own = kernels.splitting(host.dtype, out_dtype)
    return Split.of(own if any(c is not None for c in cs) else None, host.made, problems[0].device)


def _tiles(kernels: Kernels, op: str) -> tuple[Sequence[int], list[int]]:
    """The sizes of an op's tiles, and the columns of each."""
    sizes = kernels.sizes(op)
    return sizes, [kernels.columns(op, size) for size in sizes]


@contextlib.contextmanager
def region(name: str, device: torch.device) -> Iterator[torch.device]:
    """The device made current, and an NVTX range around the launches of an op."""
    if device.type != "cuda":
        yield device
        return
    with torch.cuda.device(device), torch.cuda.nvtx.range(f"domerge_fast::{name}"):
        yield device
