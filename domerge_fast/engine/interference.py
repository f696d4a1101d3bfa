"""Adds up, group by group, how much adapters interfere, from their Gram matrices alone."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.host import gather
from ..results.report import Interference

__all__ = ["InterferenceSums", "own_norms"]


class InterferenceSums:
    """Running sums over modules for `adapters` named adapters."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        size = (len(names), len(names))
        self.rows, self.columns, self.inner, self.shared = (
            torch.zeros(size, dtype=torch.float64) for _ in range(4)
        )
        self.norms: list[list[float]] = [[] for _ in names]

    def add(
        self, stacks: Sequence[Stack], grams_a: Sequence[Tensor], grams_b: Sequence[Tensor]
    ) -> list[list[float]]:
        """Count modules in, their Grams in the host's memory (in float64 where stacks have powers
        or sizes far apart); returns the adapters' ||ΔW_i||_F of each."""
        alike: dict[tuple, list[int]] = {}
        for k, stack in enumerate(stacks):
            alike.setdefault((stack.adapters, stack.a.ranks, grams_a[k].dtype), []).append(k)
        norms: list[list[float]] = [[] for _ in stacks]
        for (adapters, ranks, _), members in alike.items():
            a = [grams_a[k] for k in members]
            b = [grams_b[k] for k in members]
            true = [4.0 ** sum(stacks[k].powers) for k in members]
            sizes = torch.tensor(true, dtype=torch.float64)
            inner = _block_products(a, b, ranks) * sizes[:, None, None]
            at = torch.tensor(adapters)
            grid = (at[:, None], at[None, :])
            self.inner[grid] += inner.sum(0)
            self.shared[grid] += len(members)
            self.rows[grid] += _alignment(a, ranks)
            self.columns[grid] += _alignment(b, ranks)
            found = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().tolist()
            for k, values in zip(members, found):
                norms[k] = values
        for stack, values in zip(stacks, norms):
            for i, norm in zip(stack.adapters, values):
                self.norms[i].append(norm)
        return norms

    def result(self) -> Interference:
        count = self.shared.clamp_min(1)
        norms = self.inner.diagonal().clamp_min(0).sqrt()
        product = norms[:, None] * norms[None, :]
        cosine = torch.where(product > 0, self.inner / product.where(product > 0, 1.0), 0.0)
        return Interference(
            self.names,
            _table(self.rows / count),
            _table(self.columns / count),
            _table(cosine),
            tuple(norms.tolist()),
            tuple((min(n), statistics.median(n), max(n)) if n else (0.0,) * 3 for n in self.norms),
        )


def own_norms(
    stacks: Sequence[Stack], backend: str
) -> tuple[list[list[float]], list[tuple[Tensor, Tensor]]]:
    """||ΔW_i||_F of the adapters of each stack, where there are too many for the tables, and the
    squared norms of the rows of both sides."""
    a = gather(ops.block_gram([s.a for s in stacks], backend=backend))
    b = gather(ops.block_gram([s.b for s in stacks], backend=backend))
    products = ((x * y).split([r * r for r in s.a.ranks]) for x, y, s in zip(a, b, stacks))
    norms = [[float(p.sum().clamp_min(0).sqrt()) for p in parts] for parts in products]
    places = [_diagonal(s.a.ranks) for s in stacks]
    return norms, [(x[at], y[at]) for x, y, at in zip(a, b, places)]


@functools.lru_cache(maxsize=64)
def _diagonal(ranks: tuple[int, ...]) -> Tensor:
    """Where the diagonals of packed blocks [r_i, r_i] are."""
    starts = itertools.accumulate([0, *(r * r for r in ranks)])
    return torch.cat([at + (r + 1) * torch.arange(r) for at, r in zip(starts, ranks)])


def _alignment(grams: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """||G_ij||^2 / (||G_ii|| ||G_jj||), 0 where an adapter's factor is zero, summed over grams."""
    energy = _block_products(grams, grams, ranks)
    own = energy.diagonal(dim1=1, dim2=2).sqrt()
    product = own[:, :, None] * own[:, None, :]
    return torch.where(product > 0, energy / product.where(product > 0, 1.0), 0.0).sum(0)


def _block_products(x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Those in float64 stay that: the fast backends take float32."""
    backend = "torch" if x[0].dtype == torch.float64 else "auto"
    return ops.block_products(x, y, ranks, backend=backend)


def _table(x: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in x.tolist())
