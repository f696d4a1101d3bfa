"""What a report tells module by module, where that is asked for: how much the adapters interfere
before the merge, what share of each the merge keeps, and the spectra of a sample of the modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Stack
from ..algebra.full_precision import full_precision
from ..algebra.host import lengths
from ..algebra.roots import root
from ..results.details import Details, Overlap

__all__ = ["MOST_SPECTRA", "DetailSums"]

MOST_SPECTRA = 256
"""Modules whose singular values are found; of more, evenly spaced ones."""


class DetailSums:
    """sampled: the modules whose singular values are found. adapters: how many there are."""

    def __init__(self, sampled: frozenset[str], adapters: int) -> None:
        self._sampled = sampled
        self._energies: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * adapters
        self._merged = torch.zeros(0, dtype=torch.float64)
        self._modules: dict[str, Overlap] = {}
        self._all_factors = True

    @classmethod
    def of(cls, names: Sequence[str], adapters: int) -> DetailSums:
        """names: of all modules."""
        return cls(frozenset(names[:: max(1, math.ceil(len(names) / MOST_SPECTRA))]), adapters)

    def fresh(self) -> DetailSums:
        """Sums of the same, with nothing counted."""
        return DetailSums(self._sampled, len(self._energies))

    def plain(self) -> tuple[Any, ...]:
        """What was counted, for `take`."""
        modules = {name: dataclasses.astuple(x) for name, x in self._modules.items()}
        return modules, self._energies, self._merged, self._all_factors

    def take(self, plain: tuple[Any, ...]) -> None:
        """Count in what others have counted."""
        modules, energies, merged, all_factors = plain
        self._modules |= {name: Overlap(*x) for name, x in modules.items()}
        self._energies = [_longer_sum(x, y) for x, y in zip(self._energies, energies)]
        self._merged = _longer_sum(self._merged, merged)
        self._all_factors = self._all_factors and all_factors

    def add(
        self,
        names: Sequence[str],
        stack: Stack,
        grams: tuple[Tensor, Tensor],
        tables: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Count modules in before they are merged. stack: of one of them, with the adapters and
        powers of all. grams: of A and B, [P, R, R], on any device. tables: overlaps of rows and
        columns, and <ΔW_i, ΔW_j>, [P, T, T], in the host's memory."""
        self._modules |= zip(names, _overlaps(stack.adapters, *tables))
        chosen = [k for k, name in enumerate(names) if name in self._sampled]
        if chosen:
            a, b = (x[chosen].cpu().double() for x in grams)
            true = 4.0 ** sum(stack.powers)
            ends = torch.tensor((0, *stack.a.ranks)).cumsum(0).tolist()
            for i, begin, end in zip(stack.adapters, ends, ends[1:]):
                at = slice(begin, end)
                found = true * _squares(a[:, at, at], b[:, at, at])
                self._energies[i] = _longer_sum(self._energies[i], found)

    def add_merged(
        self,
        stack: Stack,
        powers: tuple[int, int],
        merged: tuple[Tensor, ...],
    ) -> list[list[float]]:
        """Count what became of a stack in; returns <ΔW, ΔW_i> / ||ΔW_i||^2 of the adapters of every
        module, 0 of an update that is 0. powers: what the true factors are larger by. merged: A
        and B, or ΔW, with P before their shapes where the stack has P."""
        parts = [merged] if stack.count is None else zip(*(x.unbind() for x in merged))
        size, found = 2.0 ** sum(powers), []
        for one, tensors in zip(stack.each(), parts):
            if one.name in self._sampled:
                self._count(tensors)
            pairs = _products(one, tensors)
            found.append([x / (size * own) if own else 0.0 for x, own in pairs])
        return found

    def _count(self, merged: tuple[Tensor, ...]) -> None:
        if len(merged) == 1:
            self._all_factors = False
            return
        a, b = (x.double() for x in merged)
        found = _squares((a @ a.T)[None], (b.T @ b)[None])
        self._merged = _longer_sum(self._merged, found)

    def result(self) -> Details:
        """Of the adapters."""
        energies = tuple(tuple(x.tolist()) for x in self._energies)
        return Details(self._modules, energies, len(self._sampled))

    @property
    def merged_energies(self) -> tuple[float, ...] | None:
        """The sums of σ_k^2 of the merge over the sampled modules; None of dense results."""
        return tuple(self._merged.tolist()) if self._all_factors else None


def _overlaps(
    adapters: Sequence[int], rows: Tensor, columns: Tensor, inner: Tensor
) -> Iterator[Overlap]:
    """By module; of none where there is one adapter. inner: <ΔW_i, ΔW_j>."""
    count = len(adapters)
    if count == 1:
        return
    i, j = torch.triu_indices(count, count, 1)
    norms = lengths(inner.diagonal(dim1=1, dim2=2))
    product = norms[:, i] * norms[:, j]
    cosine = torch.where(product > 0, inner[:, i, j] / product.where(product > 0, 1.0), 0.0)
    means = [x.mean(1).tolist() for x in (rows[:, i, j], columns[:, i, j], cosine.abs())]
    at = cosine.abs().argmax(1)
    strongest = cosine.gather(1, at[:, None])[:, 0].tolist()
    for row, column, mean, extreme, k in zip(*means, strongest, at.tolist()):
        yield Overlap(row, column, mean, extreme, (adapters[int(i[k])], adapters[int(j[k])]))


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Sums over matrices of σ_k^2 of B A, from A A^T and B^T B [P, r, r], the largest first."""
    roots = root(a)
    inner = roots @ b @ roots.mT
    values = torch.linalg.eigvalsh((inner + inner.mT) / 2)
    return values.clamp_min(0).sum(0).flip(0).cpu()


def _longer_sum(x: Tensor, y: Tensor) -> Tensor:
    """Of vectors, where the shorter one goes on with zeros."""
    if len(x) < len(y):
        x, y = y, x
    return torch.cat([x[: len(y)] + y, x[len(y) :]])


def _products(stack: Stack, merged: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    """<ΔW, ΔW_i> and ||ΔW_i||^2 of a module's adapters, as the factors of the stack are."""
    ranks, dense = list(stack.a.ranks), len(merged) == 1
    # Products of rows far below 1 would have few digits in float32, or none.
    dtype = full_precision(stack.a.device) if dense else torch.float64
    a, b = stack.a.stack(dtype), stack.b.stack(dtype)
    if dense:
        products = (b @ merged[0].to(b)).double() * a
    else:
        products = (a @ merged[0].to(a).T).double() * (b @ merged[1].to(b)).double()
    inner = [float(x.sum()) for x in products.sum(1).split(ranks)]
    grams = ([(x @ x.T).double() for x in side.split(ranks)] for side in (a, b))
    return [(x, float((one * other).sum())) for x, one, other in zip(inner, *grams)]
