"""A module whose adapters are read in batches: what its descents and its sums have so far, what is
kept of them for more adapters, the update that they make, and what the sink takes of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Plan, Stack
from ..adapters.stack import near_one
from ..algebra import powers
from ..methods.made import Dense
from ..methods.side_report import SideReports
from ..methods.spectral import schatten
from ..methods.streamed.descent import Descent, Rule, blocks
from ..methods.streamed.mean import Mean
from ..methods.streamed.sums import Kept
from ..results.report import StackReport
from .finish import Result, beside_unit, cut_dense
from .group import not_finite
from .work import Work

__all__ = ["Module", "Past", "Update", "finished", "report"]


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


@dataclass(frozen=True, eq=False)
class Past:
    """What is kept of a module whose first adapters were merged. power: log2 of the unit of their
    weights; own, moved: as of `Module`, [2, t] and [t]."""

    a: Kept
    b: Kept
    mean: Mean
    own: Tensor
    moved: Tensor
    power: int

    @property
    def count(self) -> int:
        return len(self.moved)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """For `of`: 4 (m^2 + n^2) + 4 m n bytes."""
        mean = self.mean
        found = {f"{side}.{k}": x for side in "ab" for k, x in getattr(self, side).tensors.items()}
        weights = torch.tensor([mean.weight, self.power], dtype=torch.float64)
        found |= {"directions": mean.directions.float(), "weights": weights}
        if mean.apart:
            found |= {"magnitudes": mean.magnitudes, "present": mean.present}
        return {**found, "own": self.own, "moved": self.moved}

    @classmethod
    def of(
        cls, m: int, n: int, tensors: Mapping[str, Tensor], apart: bool, device: torch.device
    ) -> Past:
        """From `tensors`. KeyError or ValueError where that is not what they are."""
        a, b = (
            Kept.of(d, {k[2:]: x for k, x in tensors.items() if k.startswith(side)}, device)
            for d, side in ((n, "a."), (m, "b."))
        )
        mean = Mean.fresh(m, n, apart, device)
        mean.directions += tensors["directions"].to(device)
        if apart:
            mean.magnitudes += tensors["magnitudes"].to(device)
            mean.present += tensors["present"].to(device)
        mean.weight, power = tensors["weights"].tolist()
        return cls(a, b, mean, tensors["own"], tensors["moved"], int(power))


@dataclass(eq=False)
class Module:
    """A module while it is gone through. weights: near 1. own: ||τ_i|| in the norm of λ and
    ||τ_i||_F^2 of the adapters so far, [2, t] each; moved: ||Bhat_i Ahat_i||_F. past: of its first
    adapters; as long as there is one, it takes the others alone."""

    name: str
    owners: tuple[int, ...]
    weights: list[float]
    power: int
    a: Descent
    b: Descent
    mean: Mean
    past: Past | None = None
    own: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        plan: Plan,
        name: str,
        options: Any,
        device: torch.device,
        past: Past | None = None,
        share: float = 1.0,
    ) -> Module:
        """share: as of `Rule`."""
        kind = plan.kinds[name]
        rule = Rule(options.gamma, options.steps, options.tol, share)
        moves = [options.orthogonalize and options.sides in ("both", side) for side in "AB"]
        a, b = (
            Descent(d, rule if moving else None, before)
            for d, moving, before in zip(
                (kind.n, kind.m), moves, (past.a, past.b) if past else (None, None)
            )
        )
        mean = Mean.fresh(kind.m, kind.n, options.decouple, device)
        power = math.frexp(max(map(abs, kind.weights)))[1]
        found = cls(name, plan.owners[name], near_one(kind.weights), power, a, b, mean, past)
        if past and past.count == len(found.owners):
            for x in found.descents:
                x.leave()
            found._take(past)
        return found

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
        after = [(x.gap, x.after) for x in self.descents]
        return max(gap / f if f > 0 else 0.0 for gap, f in after)

    @property
    def few(self) -> bool:
        return any(x.few for x in self.descents)

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
        if not self.past:
            return
        if not self.moved:
            self._take(self.past)
        late = self.done and not all(x.is_within for x in self.descents)
        if late or any(x.opened for x in self.descents):
            self._open()

    def _take(self, past: Past) -> None:
        """Begin with what there is of its first adapters, in its own units."""
        shift = past.a.power + past.b.power - self.unit
        self.mean = past.mean.times(past.power - self.power, shift)
        units = torch.tensor([[2.0**shift], [4.0**shift]], dtype=torch.float64)
        self.own, self.moved = [past.own * units], [past.moved * 2.0**shift]

    def _open(self) -> None:
        """Take all adapters from here on."""
        mean, self.past, self.own, self.moved = self.mean, None, [], []
        m, n = mean.directions.shape
        self.mean = Mean.fresh(m, n, mean.apart, mean.directions.device)
        for x in self.descents:
            x.open()

    @property
    def kept(self) -> Past:
        """For another one, with more adapters, when all is done."""
        own, moved = torch.cat(self.own, 1), torch.cat(self.moved)
        return Past(self.a.kept, self.b.kept, self.mean, own, moved, self.power)

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
