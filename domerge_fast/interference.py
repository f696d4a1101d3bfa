"""Adds up, group by group, how much adapters interfere, from their Gram matrices alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Stack
from .report import Interference


def block_sums(x: Tensor, ranks: Sequence[int]) -> Tensor:
    """The sums of the blocks of x [R, R] between every two adapters, [T, T] in float64."""
    owner = torch.repeat_interleave(torch.tensor(ranks, device=x.device))
    member = torch.nn.functional.one_hot(owner, len(ranks)).to(x.dtype)
    return (member.T @ x @ member).double().cpu()


class InterferenceSums:
    """Running sums over modules for `adapters` named adapters."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        size = (len(names), len(names))
        self.rows, self.columns, self.inner, self.shared = (
            torch.zeros(size, dtype=torch.float64) for _ in range(4)
        )
        self.norms: list[list[float]] = [[] for _ in names]

    def add(self, stack: Stack, gram_a: Tensor, gram_b: Tensor) -> list[float]:
        """Count one module in; returns ||ΔW_i||_F of its adapters."""
        ranks = stack.a.ranks
        at = torch.tensor(stack.adapters)
        grid = (at[:, None], at[None, :])
        inner = block_sums(gram_a * gram_b, ranks)
        self.inner[grid] += inner
        self.shared[grid] += 1
        self.rows[grid] += _alignment(gram_a, ranks)
        self.columns[grid] += _alignment(gram_b, ranks)
        norms = inner.diagonal().clamp_min(0).sqrt().tolist()
        for i, norm in zip(stack.adapters, norms):
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


def _alignment(gram: Tensor, ranks: Sequence[int]) -> Tensor:
    """||G_ij||^2 / (||G_ii|| ||G_jj||), 0 where an adapter's factor is zero; [T, T]."""
    unit = gram.diagonal().abs().max().clamp_min(torch.finfo(gram.dtype).tiny)
    energy = block_sums((gram / unit).square(), ranks)
    own = energy.diagonal().sqrt()
    product = own[:, None] * own[None, :]
    return torch.where(product > 0, energy / product.where(product > 0, 1.0), 0.0)


def _table(x: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in x.tolist())
