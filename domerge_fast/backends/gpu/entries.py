"""What the CUDA and the Triton backend share of the elementwise ops (rules: ../entries.py).

One launch does a module: all tiles of all its updates, each made in registers and gone again. A
trim with spread needs the ranks of whole rows: a call that has one is plain PyTorch's (entries.py
beside this file), on the same device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from ...algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ...algebra.side import Side
from .. import torch_entries as library
from . import tables
from .host import region
from .tables import Table

__all__ = ["MEANS", "SIGNS", "GpuEntries", "Updates"]

SIGNS = {"none": 0, "total": 1, "frequency": 2}
MEANS = {"sum": 0, "count": 1, "weight": 2}
"""The numbers by which the kernels know what an Election says."""


@dataclass(frozen=True, eq=False)
class Updates:
    """The τ_i [m, n] of one module, as numbers on their device.

    table: two problems, A and B^T, whose scales are not read. rows [T, 3]: first row in both, r_i,
    s_i (the bits of a float64).
    """

    table: Table
    rows: Tensor
    m: int
    n: int


class EntryKernels(Protocol):
    """The launches that a backend supplies.

    All tensors are on the device; numbers are int64, or float64 by their bits. trims [T, 6]: low,
    high, keep and gain (float64), rescale, the adapter's number. draw [3]: lower and upper half of
    the seed, module.
    """

    def entry_counts(self, updates: Updates, prefixes: Tensor | None, out: Tensor) -> None:
        """Counts of the upper 16 bits of |τ_i|, or of the lower 15 of those behind prefixes [T].

        out [T, bins] in int64, 0 before.
        """

    def entry_sums(
        self, updates: Updates, trims: Tensor, draw: Tensor, rows: Tensor, out: Tensor
    ) -> None:
        """sum |τ_i| of all entries and of those that are kept: out [T, 2] in float64.

        rows [2 T, m], float64, holds the sums of the rows meanwhile.
        """

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
        """The merged ΔW [m, n] in float32. weights [T] in float64."""


@dataclass(frozen=True, eq=False)
class GpuEntries:
    """The elementwise ops on the kernels that `load` gives."""

    load: Callable[[], EntryKernels]

    def entry_counts(self, a: Side, b: Side, prefixes: Sequence[int] | None = None) -> Tensor:
        """Counts of the upper 16 bits of |τ_i|, or of the lower 15 behind a prefix: [T, bins]."""
        with region("entry_counts", a.device) as device:
            given = [] if prefixes is None else [(prefixes, 0)]
            updates, rest = _upload(a, b, given)
            bins = 1 << (LOW_BITS if given else HIGH_BITS)
            counts = torch.zeros(len(a.blocks), bins, dtype=torch.int64, device=device)
            self.load().entry_counts(updates, next(rest, None), counts)
        return counts

    def entry_sums(self, a: Side, b: Side, trims: Sequence[Trim], draw: Draw) -> Tensor:
        """sum |τ_i| over all entries and over those that are kept: [T, 2] in float64."""
        if _need_ranks(trims):
            return library.entry_sums(a, b, trims, draw)
        with region("entry_sums", a.device) as device:
            updates, rest = _upload(a, b, _rules(trims, draw))
            rows = torch.empty(2 * len(trims), updates.m, dtype=torch.float64, device=device)
            sums = torch.empty(len(trims), 2, dtype=torch.float64, device=device)
            self.load().entry_sums(updates, next(rest), next(rest), rows, sums)
        return sums

    def entry_merge(
        self,
        a: Side,
        b: Side,
        trims: Sequence[Trim],
        weights: Sequence[float],
        election: Election,
        draw: Draw,
        scale: float,
    ) -> Tensor:
        """The merged ΔW [m, n] in float32."""
        if _need_ranks(trims):
            return library.entry_merge(a, b, trims, weights, election, draw, scale)
        with region("entry_merge", a.device) as device:
            given = [*_rules(trims, draw), (_bits(weights), 0)]
            updates, rest = _upload(a, b, given)
            merged = torch.empty(updates.m, updates.n, device=device)
            rules = next(rest), next(rest), next(rest).view(torch.float64)
            self.load().entry_merge(updates, *rules, election, scale, merged)
        return merged


def _need_ranks(trims: Sequence[Trim]) -> bool:
    return any(trim.spread for trim in trims)


def _upload(
    a: Side, b: Side, others: Sequence[tuple[Sequence[int], int]]
) -> tuple[Updates, Iterator[Tensor]]:
    """The updates and other tables on their device. others: numbers, and how many a row has; 0:
    they are a vector."""
    host = tables.describe([a, b])
    starts = accumulate(a.ranks, initial=0)
    rows = [*chain(*zip(starts, a.ranks, _bits(b.scales)))]
    places = [host.made.add(*own) for own in [(rows, 3), *others]]
    table, made = host.uploaded()
    own, *rest = (made[k] for k in places)
    return Updates(table, own, b.d, a.d), iter(rest)


def _rules(trims: Sequence[Trim], draw: Draw) -> list[tuple[Sequence[int], int]]:
    """trims and draw as the kernels read them."""
    limits = [[getattr(t, name) for t in trims] for name in ("low", "high", "keep", "gain")]
    rows = [*zip(*map(_bits, limits), [t.rescale for t in trims], draw.adapters)]
    word = 0xFFFFFFFF
    key = (draw.seed & word, draw.seed >> 32 & word, draw.module)
    return [([*chain(*rows)], len(rows[0])), (key, 0)]


def _bits(values: Sequence[float]) -> Sequence[int]:
    """The bits of float64 numbers, as int64."""
    return array("q", array("d", values).tobytes())
