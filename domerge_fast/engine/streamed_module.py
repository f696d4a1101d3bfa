"""A module whose adapters are read in batches: what its descents and its sums have so far, the
update that they make, and what the sink takes of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Plan, Stack
from ..adapters.stack import near_one
from ..algebra import powers
from ..methods.base import Dense
from ..methods.side_report import SideReports
from ..methods.spectral import schatten
from ..methods.streamed.descent import Descent, Rule, blocks
from ..methods.streamed.mean import Mean
from ..results.report import StackReport
from .finish import Result, beside_unit, cut_dense
from .group import not_finite
from .work import Work

__all__ = ["Module", "Update", "finished", "report"]


@dataclass(frozen=True, eq=False)
class Update:
    """ΔW [m, n] of a module at λ = 1 over 2^power, in float32, and for its report. size: its
    Schatten norm, where λ is found."""

    name: str
    adapters: tuple[int, ...]
    delta: Tensor
    power: int
    size: float | None
    rows_a: list[float] | None
    rows_b: list[float] | None
    norms: list[float]

    @property
    def count(self) -> int:
        return len(self.adapters)

    @property
    def rows(self) -> int:
        return self.delta.shape[0]


@dataclass(eq=False)
class Module:
    """A module while it is gone through. weights: near 1. own: ||τ_i|| in the norm of λ and
    ||τ_i||_F^2 of the adapters so far, [2, t] each; moved: ||Bhat_i Ahat_i||_F."""

    name: str
    owners: tuple[int, ...]
    weights: list[float]
    a: Descent
    b: Descent
    mean: Mean
    own: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan, name: str, options: Any, device: torch.device) -> Module:
        kind = plan.kinds[name]
        rule = Rule(options.gamma, options.steps, options.tol)
        a, b = (
            Descent(d, rule if options.orthogonalize and options.sides in ("both", side) else None)
            for d, side in ((kind.n, "A"), (kind.m, "B"))
        )
        mean = Mean.fresh(kind.m, kind.n, options.decouple, device)
        return cls(name, plan.owners[name], near_one(kind.weights), a, b, mean)

    @property
    def descents(self) -> tuple[Descent, Descent]:
        return self.a, self.b

    @property
    def done(self) -> bool:
        return self.a.done and self.b.done

    @property
    def unit(self) -> int:
        """log2 of what updates are given in."""
        return self.a.power + self.b.power

    @property
    def gap(self) -> float:
        """The larger one of both sides, of the objective."""
        return max(x.gap / x.after if x.after > 0 else 0.0 for x in self.descents)

    @property
    def passes(self) -> int:
        return max(x.passes for x in self.descents)

    @property
    def given(self) -> tuple[list[float], list[float]]:
        """||τ_i||_Sq and ||τ_i||_F^2."""
        sizes, squares = torch.cat(self.own, 1)
        return sizes.tolist(), squares.tolist()

    def at(self, stack: Stack) -> range:
        """The places of a stack's adapters among the module's."""
        first = bisect_left(self.owners, stack.adapters[0])
        return range(first, first + len(stack.adapters))

    def measure(self, plan: Plan, stack: Stack) -> None:
        norms = [x.measure(side) for x, side in zip(self.descents, (stack.a, stack.b))]
        if not all(bool(x.isfinite().all()) for x in norms):
            raise not_finite(plan, stack)

    def step(self, stack: Stack) -> None:
        for x, side in zip(self.descents, (stack.a, stack.b)):
            if not x.done:
                x.step(side, self.at(stack))

    def settle(self) -> None:
        for x in self.descents:
            if not x.done:
                x.settle()

    def add(self, stack: Stack, order: int | None) -> None:
        """In the last pass. order: of the norm that λ takes, None where none of the adapters is
        wanted."""
        at = self.at(stack)
        a, b = (x.moved(side, at) for x, side in zip(self.descents, (stack.a, stack.b)))
        self.moved.append(self.mean.add(a, b, self.weights[at.start : at.stop]))
        if order is not None:
            pair = zip((stack.a, stack.b), self.descents)
            wide = [blocks(side, x.power).double() for side, x in pair]
            grams_a, grams_b = (x @ x.mT for x in wide)
            found = [schatten.schatten(grams_b, grams_a, q).cpu() for q in (order, 2)]
            self.own.append(torch.stack([found[0], found[1].square()]))

    def merge(self, work: Work) -> Update:
        options = work.method.options
        delta = self.mean.result(options.renormalize)
        top = float(powers.magnitude(delta))
        power = math.frexp(top)[1]
        delta = powers.times(delta, -power).float()
        size = None
        if work.rule and work.rule.order:
            size = math.ldexp(_schatten(delta, work.rule.order), power)
        norms = torch.cat(self.moved)
        if not options.decouple and self.own:
            norms = torch.cat(self.own, 1)[1].sqrt()
        return Update(
            self.name,
            self.owners,
            delta,
            power + self.unit,
            size,
            self.a.row if self.a.rule else None,
            self.b.row if self.b.rule else None,
            powers.times(norms, self.unit).tolist(),
        )


def _schatten(delta: Tensor, order: int) -> float:
    wide = delta.double()
    gram = wide @ wide.T if delta.shape[0] <= delta.shape[1] else wide.T @ wide
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return float(schatten.schatten(gram[None], unit[None], order))


def finished(merge: Update, work: Work, scale: float) -> Result:
    """What the sink takes of a module, at a λ."""
    scale, dtype = scale * work.settings.scale, work.settings.dtype
    part, of_scale = math.frexp(scale)
    name, delta, power = merge.name, part * merge.delta, merge.power + of_scale
    a_side, b_side = (rows and SideReports([rows]) for rows in (merge.rows_a, merge.rows_b))
    made = Dense(delta, a_side or None, b_side or None, [merge.norms])
    if work.deltas and not work.cut:
        return Result((powers.scaled(name, delta, power),), made, min(delta.shape))
    kept: Sequence[float] = ()
    energy: Sequence[float] = ()
    if work.cut:
        cut = cut_dense(name, made, work.cut)
        a, b, kept = cut.a, cut.b, cut.kept
        energy = [math.ldexp(x, 2 * power) for x in cut.energy]
        if work.restores_norms and merge.count > 1 and 0 < kept[0] < 1:
            b = b * kept[0] ** -0.5
    elif name in work.matrices:
        a, b, dtype = torch.eye(delta.shape[1], device=delta.device), delta, torch.float32
    else:
        a, b = beside_unit(delta, work.settings.backend)
    rank = min(*a.shape, len(b))
    if work.deltas:
        whole = powers.scaled(name, powers.product(name, a, b), power)
        return Result((whole,), made, rank, kept, energy)
    half = power // 2
    tensors = powers.fitted(name, a, b, (half, power - half), dtype)
    return Result(tensors, made, rank, kept, energy)


def report(plan: Plan, merge: Update, result: Result) -> StackReport:
    names = tuple(plan.adapters[i].name for i in merge.adapters)
    sides = result.made.a_side, result.made.b_side
    norms = [merge.norms] if merge.norms else [()]
    return StackReport((merge.name,), names, result.rank, *sides, norms, result.kept, result.energy)
