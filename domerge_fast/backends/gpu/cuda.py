"""The ops as CUDA C++ kernels: all modules in one launch, on the current stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _cuda
from ...algebra.entry_rules import Election
from ...algebra.side import CODES
from .entries import MEANS, SIGNS, GpuEntries, Updates
from .host import Gpu
from .phases import descend
from .tables import Table

__all__ = [
    "BATCHES",
    "apply",
    "apply_decouple",
    "block_gram",
    "block_largest",
    "block_products",
    "entry_counts",
    "entry_merge",
    "entry_sums",
    "gram",
    "largest",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
]

BATCHES = True
"""Ops take sides of several modules."""


TILED_SIZES = tuple(n << k for k in range(7, 20) for n in (3, 4))
"""R, padded, of descents by tiles."""


class _Splitting:
    """gpu.splitting.Splitting."""

    rows = _cuda.split_rows()
    numbers = staticmethod(_cuda.split_numbers)

    def launch(self, table: Table, tiles: Tensor, work: Tensor) -> None:
        _cuda.split(_numbers(table), *_rows(tiles), _at(work), _stream(tiles))


class _Kernels:
    """gpu.kernels.Kernels and gpu.entries.EntryKernels by the launches of the extension."""

    def sizes(self, op: str) -> tuple[int, ...]:
        sizes = tuple(getattr(_cuda, f"{op}_sizes")())
        return sizes + TILED_SIZES if op == "orthogonalize" else sizes

    def columns(self, op: str, size: int) -> int:
        return getattr(_cuda, f"{op}_columns")(size)

    def gram(
        self, table: Table, size: int, tiles: Tensor, sums: Tensor, parts: Tensor, out: Tensor
    ) -> None:
        _cuda.gram(
            _numbers(table), size, *_rows(tiles), *_rows(sums), _at(parts), _at(out), _stream(out)
        )

    def block_gram(self, table: Table, work: Tensor, out: Tensor) -> None:
        _cuda.block_gram(_numbers(table), *_rows(work), _at(out), _stream(out))

    def orthogonalize(
        self,
        size: int,
        adapters: int,
        work: Tensor,
        starts: Tensor,
        out: Tensor,
        stats: Tensor,
        frobenius: bool,
        gamma: float,
        steps: int,
        tol: float,
    ) -> None:
        if size not in _cuda.orthogonalize_sizes():
            each = _cuda.tiled_descent_bytes(size, adapters, frobenius)

            def start(batch: Tensor, memory: Tensor) -> _TiledDescent:
                launches = _cuda.TiledDescent(
                    size=size,
                    work=_at(batch),
                    problems=len(batch),
                    starts=_at(starts),
                    memory=_at(memory),
                    each=each,
                    out=_at(out),
                    stats=_at(stats),
                    frobenius=frobenius,
                    gamma=gamma,
                    tol=tol,
                )
                return _TiledDescent(launches, _stream(out))

            descend(work, each // 8, 0, steps, start)
            return
        needed = _cuda.orthogonalize_scratch(size, len(work), frobenius)
        scratch = torch.empty(needed, dtype=torch.uint8, device=out.device)
        _cuda.orthogonalize(
            size,
            *_rows(work),
            _at(starts),
            _at(out),
            _at(stats),
            _at(scratch),
            frobenius,
            gamma,
            steps,
            tol,
            _stream(out),
        )

    def splitting(self, dtype: torch.dtype, out_dtype: torch.dtype) -> _Splitting | None:
        on_tensor_cores = _cuda.takes_parts(CODES[dtype], CODES[out_dtype])
        return _Splitting() if on_tensor_cores else None

    def apply(self, table: Table, size: int, tiles: Tensor, work: Tensor, out: Tensor) -> None:
        code = CODES[out.dtype]
        _cuda.apply(_numbers(table), size, *_rows(tiles), _at(work), _at(out), code, _stream(out))

    def root_numbers(self, rank: int) -> int:
        size = rank + -rank % 8
        return size * size + size

    def as_roots(self, roots: Tensor) -> Tensor:
        """Triangular, in blocks of 8 x 8 and with the order of their columns behind them
        (csrc/cuda/magnitudes.h)."""
        count, rank, _ = roots.shape
        more = -rank % 8
        s = torch.nn.functional.pad(torch.linalg.qr(roots, mode="r").R, (0, more, 0, more))
        blocks = s.float().unflatten(2, (-1, 2, 4)).unflatten(1, (-1, 8)).permute(0, 1, 3, 2, 5, 4)
        order = torch.arange(rank, dtype=torch.int32, device=roots.device)
        behind = torch.nn.functional.pad(order, (0, more)).view(torch.float32)
        return torch.cat([blocks.flatten(1), behind.expand(count, -1)], 1)

    def roots(self, work: Tensor, out: Tensor, norms: Tensor) -> None:
        scratch = torch.empty_like(out, dtype=torch.float64)
        _cuda.roots(*_rows(work), _at(out), _at(norms), _at(scratch), _stream(out))

    def apply_decouple(
        self,
        table: Table,
        size: int,
        rank: int,
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
        needed = _cuda.apply_decouple_scratch(size, len(tiles), rank)
        scratch = torch.empty(needed, dtype=torch.uint8, device=out.device)
        numbers = _cuda.Decoupling(
            work=_at(work),
            offsets=_at(offsets),
            roots=_at(roots),
            norms=_at(norms),
            omegas=_at(omegas),
            scale=scale,
            energies=_at(energies),
            slots=energies.shape[1],
            scratch=_at(scratch),
        )
        code = CODES[out.dtype]
        _cuda.apply_decouple(
            _numbers(table), size, rank, *_rows(tiles), numbers, _at(out), code, _stream(out)
        )

    def largest(self, dtype: torch.dtype, tiles: Tensor, tops: Tensor) -> None:
        _cuda.largest(CODES[dtype], *_rows(tiles), _at(tops), _stream(tops))

    def entry_counts(self, updates: Updates, prefixes: Tensor | None, out: Tensor) -> None:
        behind = 0 if prefixes is None else _at(prefixes)
        _cuda.entry_counts(*_updates(updates), behind, _at(out), _stream(out))

    def entry_sums(
        self, updates: Updates, trims: Tensor, draw: Tensor, rows: Tensor, out: Tensor
    ) -> None:
        _cuda.entry_sums(
            *_updates(updates), _at(trims), _at(draw), _at(rows), _at(out), _stream(out)
        )

    def entry_merge(
        self,
        updates: Updates,
        trims: Tensor,
        draw: Tensor,
        weights: Tensor,
        election: Election,
        scale: float,
        out: Tensor,
    ) -> None:
        _cuda.entry_merge(
            *_updates(updates),
            _at(trims),
            _at(draw),
            _at(weights),
            SIGNS[election.sign],
            election.weighted,
            MEANS[election.mean],
            scale,
            _at(out),
            _stream(out),
        )


@dataclass(frozen=True, eq=False)
class _TiledDescent:
    launches: _cuda.TiledDescent
    stream: int

    def begin(self) -> None:
        self.launches.begin(self.stream)

    def step(self, first: bool) -> None:
        self.launches.step(first, self.stream)

    def finish(self) -> None:
        self.launches.finish(self.stream)


def _at(x: Tensor) -> int:
    return x.data_ptr()


def _rows(table: Tensor) -> tuple[int, int]:
    """Where a list of rows begins, and how many there are."""
    return table.data_ptr(), len(table)


def _numbers(table: Table) -> tuple[int, int, int, int]:
    return _at(table.blocks), _at(table.owner), _at(table.problems), CODES[table.dtype]


def _updates(updates: Updates) -> tuple[tuple[int, int, int, int], _cuda.Updates]:
    rows, adapters = _rows(updates.rows)
    return _numbers(updates.table), _cuda.Updates(rows, adapters, updates.m, updates.n)


def _stream(x: Tensor) -> int:
    """The current stream of a tensor's device; 0 where kernels are compiled for the host."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


_gpu = Gpu(_Kernels)
gram = _gpu.gram
block_gram = _gpu.block_gram
block_largest = _gpu.block_largest
block_products = _gpu.block_products
orthogonalize = _gpu.orthogonalize
orthogonalize_factors = _gpu.orthogonalize_factors
apply = _gpu.apply
apply_decouple = _gpu.apply_decouple
truncate = _gpu.truncate
largest = _gpu.largest

_entries = GpuEntries(_Kernels)
entry_counts = _entries.entry_counts
entry_sums = _entries.entry_sums
entry_merge = _entries.entry_merge
