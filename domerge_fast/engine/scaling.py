"""λ where none is given: from the adapters alone, for the whole model at once.

    λ = d c  sum_modules rms_i(|w_i| ||τ_i||_Sq) / mean_i |w_i|  /  sum_modules ||M||_Sq

over the modules that the same number of adapters have; M is the merge at λ = 1 and ||.||_Sq the
Schatten norm (schatten.py). A merge that goes as far along its strongest directions as the
adapters do keeps most of what they gained: there it interferes most. In units of the Frobenius
norm, a merge with a flat spectrum would be stopped far too early. Weights are proportions under it:
[1, 1] is [2, 2]. A module that one adapter alone has keeps λ = 1.

    d = 1 / (1 + 0.2 S),  S = sum_modules (mean_i ||τ_i||_F^2 / m)^(1/2)

S is about how far the adapters move the whole model: a row of a trained weight has a length near 1,
so that ||τ_i||_F / m^(1/2) is the size of an update beside its weight, and what modules change adds
up from layer to layer. The experts of a layer count once, as few of them see a token. Interference
grows with S: the merge that keeps most is smaller in deep models, and for adapters trained far.

Methods that have a size of their own take no norms, but 1, and for M mean_i |w_i|, or 1 where only
ratios of weights matter. With weights of 1, λ = d for `tsvm` with its spectrum, which adds up what
does not overlap, 1.25 d for `ties` and the like and after `svc`. A module that is cut has the
norm from before the cut (finish.py). docs/choosing.md says what was measured, and where this fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Stack
from ..algebra.threads import in_order, in_threads
from ..methods.base import ScaleRule
from ..methods.spectral import schatten
from ..methods.steps.base import alike

__all__ = ["Sums", "rounded"]

DIGITS = 6
"""Of λ, so that it is what is printed, and sums in another order find the same one."""

DAMPING = 0.2
"""How fast λ falls with S."""

CANCELLED = 1e-3
"""A merge up to this share of the mean of adapters that do not overlap may be rounding alone."""


@dataclass
class Sums:
    """The sums of a rule's λ, by the number of adapters, module by module; and the terms of S, by
    what counts as one module."""

    rule: ScaleRule
    by_ratio: bool
    """Whether merges are as large as the adapters, not as these with their weights."""
    given: dict[int, list[float]] = field(default_factory=dict)
    usual: dict[int, list[float]] = field(default_factory=dict)
    merged: dict[int, list[float]] = field(default_factory=dict)
    moved: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self,
        stacks: Sequence[Stack],
        blocks: tuple[Sequence[Tensor], Sequence[Tensor]],
        sizes: Sequence[float | None],
    ) -> None:
        """Count modules in. blocks: the diagonal blocks of their Grams, scalings in those of B,
        as `ops.block_gram` has them. sizes: ||M||_Sq of every module as it is, or None where the
        rule takes no norms."""
        size_of = iter(sizes)
        for s, norms, squares in _adapters(stacks, blocks, self.rule.order or 2):
            true = 2.0 ** sum(s.powers)
            for name, own, energy in zip(s.names, norms.tolist(), squares.tolist()):
                self.count(name, s.weights, own, energy, s.b.d, next(size_of), true)

    def count(
        self,
        name: str,
        weights: Sequence[float],
        norms: Sequence[float],
        squares: Sequence[float],
        rows: int,
        size: float | None,
        true: float = 1.0,
    ) -> None:
        """Count a module of m rows in. norms, squares: ||τ_i||_Sq and ||τ_i||_F^2 of its adapters.
        size: of its merge. true: what all of these are multiplied by, the squares twice."""
        count, weights = len(weights), [abs(w) for w in weights]
        mean = math.fsum(weights) / count
        size_beside = true * math.sqrt(math.fsum(squares) / count / rows)
        self.moved.setdefault(_module(name), []).append(size_beside)
        total = math.fsum((w * norm) ** 2 for w, norm in zip(weights, norms))
        given = true * math.sqrt(total / count) / mean if self.rule.order else 1.0
        self.given.setdefault(count, []).append(given)
        self.usual.setdefault(count, []).append(given if self.by_ratio else given * mean)
        self.merged.setdefault(count, []).append(true * (size or 0.0))

    def plain(self) -> list[dict[Any, list[float]]]:
        """What was counted, for `take`."""
        return [self.given, self.usual, self.merged, self.moved]

    def take(self, plain: Sequence[Mapping[Any, list[float]]]) -> None:
        """Count in what others have counted."""
        for own, more in zip(self.plain(), plain):
            for key, values in more.items():
                own.setdefault(key, []).extend(values)

    def damping(self) -> float:
        """d of all modules."""
        return damping(math.fsum(math.fsum(x) / len(x) for x in self.moved.values()))

    def scales(self) -> Mapping[int, float]:
        """λ by the number of adapters that a module has. Merges of which the rule takes no
        norms, or that rounding leaves of adapters that cancel, count as large as the adapters."""
        found, damped = {}, self.rule.constant * self.damping()
        for count in sorted(self.given):
            given, usual, merged = (
                math.fsum(x[count]) for x in (self.given, self.usual, self.merged)
            )
            size = merged if merged > CANCELLED * usual / count else usual
            found[count] = damped * given / size if size else damped
        return found


def rounded(scale: float) -> float:
    return float(f"{scale:.{DIGITS}g}")


def damping(moved: float) -> float:
    """d for S."""
    return 1 / (1 + DAMPING * moved)


def _module(name: str) -> str:
    """What counts as one module: an expert stands for all of its layer."""
    return re.sub(r"\bexperts\.\d+\b", "experts", name)


def _adapters(
    stacks: Sequence[Stack], blocks: tuple[Sequence[Tensor], Sequence[Tensor]], order: int
) -> Iterable[tuple[Stack, Tensor, Tensor]]:
    """Stacks with ||τ_i||_Sq and ||τ_i||_F^2 of their modules' adapters, [P, T]."""
    counts = [len(s.names) for s in stacks]

    def norms(members: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        rows = [[side[k].view(counts[k], -1) for k in members] for side in blocks]
        a, b = (torch.cat(side).double() for side in rows)
        ranks, sizes = stacks[members[0]].a.ranks, [counts[k] for k in members]
        of_size, frobenius = (schatten.of_adapters(a, b, ranks, q) for q in (order, 2))
        return [*zip(of_size.split(sizes), frobenius.square().split(sizes))]

    parts = alike(s.a.ranks for s in stacks)
    found = in_order(parts, in_threads(norms, parts, blocks[0][0].device))
    return ((s, *pair) for s, pair in zip(stacks, found))
