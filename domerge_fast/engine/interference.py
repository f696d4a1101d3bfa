"""Adds up, group by group, how much adapters interfere, from their Gram matrices alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.host import Rows, gather, lengths, norms_apart, over_diagonals
from ..backends.descent import NEGLIGIBLE
from ..recipe import DETAILS, FULL, NONE, NORMS
from ..results.report import Interference
from .details import DetailSums

__all__ = ["MOST_COMPARED", "InterferenceSums", "own_norms", "told"]

MOST_COMPARED = 64
"""Adapters up to which every merge also measures their pairwise interference, where it is asked for
a full report."""


def told(report: str, adapters: int) -> str:
    """Whether FULL, NORMS or NONE is counted, for so many adapters."""
    report = FULL if report == DETAILS else report
    return NORMS if report == FULL and adapters > MOST_COMPARED else report


Pair = tuple[Tensor, Tensor]
Plain = tuple[Tensor, Tensor, list[tuple[tuple[int, ...], Tensor]], float, Any]


class InterferenceSums:
    """Running sums over modules for `adapters` named adapters. report: what is counted, FULL,
    NORMS or NONE. details: what is counted module by module, of a FULL report."""

    def __init__(
        self, names: Sequence[str], report: str = FULL, details: DetailSums | None = None
    ) -> None:
        self.names, self.report, self.details = tuple(names), report, details
        size = (len(names),) * 2 if report == FULL else (0, 0)
        self.sums = torch.zeros(3, *size, dtype=torch.float64)
        """Of the overlaps of rows, of those of columns, and of <ΔW_i, ΔW_j>."""
        self.shared = torch.zeros(size, dtype=torch.float64)
        self.norms: dict[tuple[int, ...], list[Tensor]] = {}
        """By adapters, the norms [P, T] of modules that these have."""
        self.apart = 1.0
        """How many times the norms of two adapters' A, or of their B, are apart in a module, at
        most, but for those that count as zero."""

    def add(
        self, names: Sequence[Sequence[str]], stack: Stack, grams: Pair, diagonals: Pair
    ) -> Rows:
        """Count modules in, whose names these are, one after the other, by their Grams [P, R, R] on
        any device, in float64 where they have powers or sizes far apart, and what is on the
        diagonals of these, [P, R] in the host's memory; returns the adapters' ||ΔW_i||_F of each.
        stack: of one of them, with the adapters and powers of all."""
        adapters, ranks = stack.adapters, stack.a.ranks
        self._note_apart(diagonals, ranks)
        a, b = grams
        pairs = ([a, b, a], [a, b, b]) if self.report == FULL else ([a], [b])
        # Those in float64 stay that: the fast backends take float32.
        backend = "torch" if a.dtype == torch.float64 else "auto"
        products = ops.block_products(*pairs, ranks, backend=backend).cpu()
        tables = products.view(-1, a.shape[0], *products.shape[1:])
        inner = tables[-1]
        if stack.powers != (0, 0):
            inner *= _size(stack)
        if self.report == FULL:
            over_diagonals(tables[:2])
            self._add(adapters, tables.sum(1), a.shape[0])
            if self.details:
                rows, columns, _ = tables
                self.details.add(
                    [*chain.from_iterable(names)], stack, grams, (rows, columns, inner)
                )
        return self.count(adapters, lengths(inner.diagonal(dim1=1, dim2=2)))

    def _add(self, adapters: Sequence[int], sums: Tensor, modules: int) -> None:
        """What so many modules of these adapters add."""
        if len(adapters) == len(self.names):
            self.sums += sums
            self.shared += modules
        else:
            at = torch.tensor(adapters)
            self.sums[:, at[:, None], at] += sums
            self.shared[at[:, None], at] += modules

    def add_norms(self, stacks: Sequence[Stack], backend: str) -> list[Rows]:
        """Count the norms of modules in, without Grams; returns them, stack by stack."""
        found = _own(stacks, backend)
        for s, (_, diagonals) in zip(stacks, found):
            self._note_apart(diagonals, s.a.ranks)
        return [self.count(s.adapters, norms) for s, (norms, _) in zip(stacks, found)]

    def _note_apart(self, diagonals: Pair, ranks: Sequence[int]) -> None:
        found = [norms_apart(x, ranks, NEGLIGIBLE) for x in diagonals]
        self.apart = max(self.apart, *found)

    def count(self, adapters: Sequence[int], norms: Tensor) -> Rows:
        """Count the norms of P modules in, [P, T] of these adapters; returns them."""
        self.norms.setdefault(tuple(adapters), []).append(norms)
        return Rows(norms)

    def fresh(self) -> InterferenceSums:
        """Sums of the same, with nothing counted."""
        return InterferenceSums(self.names, self.report, self.details and self.details.fresh())

    def plain(self) -> Plain:
        """What was counted, for `take`."""
        details = self.details.plain() if self.details else None
        norms = [(adapters, torch.cat(own)) for adapters, own in self.norms.items()]
        return self.sums, self.shared, norms, self.apart, details

    def take(self, plain: Plain) -> None:
        """Count in what others have counted."""
        sums, shared, norms, apart, details = plain
        if self.details:
            self.details.take(details)
        self.sums += sums
        self.shared += shared
        self.apart = max(self.apart, apart)
        for adapters, own in norms:
            self.norms.setdefault(adapters, []).append(own)

    def result(self) -> Interference | None:
        """What was counted."""
        if self.report == NONE:
            return None
        of_all = self._norms_of_adapters()
        spread = _spread(of_all)
        if self.report == NORMS:
            norms = tuple(math.sqrt(math.fsum(x * x for x in n.tolist())) for n in of_all)
            return Interference(self.names, None, None, None, norms, spread)
        return self._tables(spread)

    def _norms_of_adapters(self) -> list[Tensor]:
        """The norms of every adapter's updates, in no order."""
        found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.float64)] for _ in self.names]
        for adapters, norms in self.norms.items():
            for i, column in zip(adapters, torch.cat(norms).T):
                found[i].append(column)
        return [torch.cat(own) for own in found]

    def _tables(self, spread: tuple[tuple[float, float, float], ...]) -> Interference:
        rows, columns, inner = self.sums
        count = self.shared.clamp_min(1)
        norms = inner.diagonal().clamp_min(0).sqrt()
        product = norms[:, None] * norms[None, :]
        cosine = torch.where(product > 0, inner / product.where(product > 0, 1.0), 0.0)
        return Interference(
            self.names,
            _table(rows / count),
            _table(columns / count),
            _table(cosine),
            tuple(norms.tolist()),
            spread,
            details=self.details.result() if self.details else None,
        )


def own_norms(stacks: Sequence[Stack], backend: str) -> list[Tensor]:
    """||ΔW_i||_F of the adapters of every stack's modules, [P, T] each."""
    return [norms for norms, _ in _own(stacks, backend)]


def _own(stacks: Sequence[Stack], backend: str) -> list[tuple[Tensor, Pair]]:
    """`own_norms`, and what is on the diagonals of A's and of B's Grams, [P, R] each."""
    blocks = ops.block_gram([side for s in stacks for side in (s.a, s.b)], backend=backend)
    given: list[Tensor] = []
    for s, *pair in zip(stacks, blocks[::2], blocks[1::2]):
        a, b = (x.view(-1, x.shape[-1]) for x in pair)
        sizes = [r * r for r in s.a.ranks]
        squares = [part.sum(1) for part in (_size(s) * a * b).split(sizes, 1)]
        given.append(torch.stack(squares, 1))
        for x in (a, b):
            grams = [part.unflatten(1, (r, r)) for part, r in zip(x.split(sizes, 1), s.a.ranks)]
            given.append(torch.cat([g.diagonal(dim1=1, dim2=2) for g in grams], 1))
    rest = iter(gather(given))
    return [(lengths(squares), (a, b)) for squares, a, b in zip(rest, rest, rest)]


def _size(stack: Stack) -> float:
    """What the powers of two that were taken out make of <ΔW_i, ΔW_j>."""
    return float(4.0 ** sum(stack.powers))


def _spread(norms: Sequence[Tensor]) -> tuple[tuple[float, float, float], ...]:
    """The least, the median and the largest of each; 0 where there is none."""
    alike = len({x.shape for x in norms}) == 1
    tables = [torch.stack([*norms])] if alike else [x[None] for x in norms]
    return tuple([own for table in tables for own in _spread_of_rows(table)])


def _spread_of_rows(norms: Tensor) -> list[tuple[float, float, float]]:
    rows, count = norms.shape
    if not count:
        return [(0.0, 0.0, 0.0)] * rows
    places = torch.tensor([0, (count - 1) // 2, count // 2, count - 1])
    found = norms.sort(1).values[:, places].tolist()
    return [(least, (low + high) / 2, most) for least, low, high, most in found]


def _table(x: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in x.tolist())
