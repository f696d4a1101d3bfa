"""What a merge method is: a function on a group of stacks, written in ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Plan, Stack
from ..algebra.side import Side
from ..registry import usable
from ..results.report import SideReport


@dataclass(frozen=True)
class Settings:
    """What every method is given: λ, the dtype of its results, where its ops run, for `prepare` the
    method that works inside this one, and the rank that results are cut to, if they are.

    For `Halves`: order, the Schatten norm of the merge that is wanted with what is found; whether
    it is to be `calibrated` (svc.py), and, for what is made, by which projection.
    """

    scale: float
    dtype: torch.dtype
    backend: str
    inner: Chosen | None = None
    order: int | None = None
    calibrated: bool = False
    projection: float = 1.0
    rank: int | None = None


@dataclass(frozen=True, eq=False)
class Factors:
    """A merged module: ΔW = B A with A [R, n] and B [m, R], and how it came about.

    norms: ||ΔW_i||_F of the stack's adapters, where the method worked them out.
    """

    a: Tensor
    b: Tensor
    a_side: SideReport | None = None
    b_side: SideReport | None = None
    norms: Sequence[float] | None = None

    def times(self, power_a: int, power_b: int) -> Factors:
        return replace(self, **_sized(self, power_a, power_b))


@dataclass(frozen=True, eq=False)
class Dense:
    """A merged module that is no product of thin factors: ΔW [m, n] in float32."""

    delta: Tensor
    a_side: SideReport | None = None
    b_side: SideReport | None = None
    norms: Sequence[float] | None = None

    def times(self, power_a: int, power_b: int) -> Dense:
        return replace(self, **_sized(self, power_a, power_b))

    @property
    def reports(self) -> tuple[SideReport | None, SideReport | None, Sequence[float] | None]:
        return self.a_side, self.b_side, self.norms


def _sized(made: Factors | Dense, power_a: int, power_b: int) -> dict[str, Any]:
    """What is reported of adapters whose A is 2^power_a, and whose B 2^power_b times as large."""
    norms = made.norms and [2.0 ** (power_a + power_b) * norm for norm in made.norms]
    return {
        "a_side": made.a_side and made.a_side.times(power_a),
        "b_side": made.b_side and made.b_side.times(power_b),
        "norms": norms,
    }


Merged = Sequence[Factors | Dense]
Grams = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
Merge = Callable[
    [Sequence[Stack], Sequence[Tensor | None], Sequence[Tensor | None], Any, Settings],
    Merged,
]
"""(stacks, grams_a, grams_b, options, settings) -> the merge of every stack, in its own units: what
`Stack.powers` took out comes back later.

The Grams are [R, R] in float32, of the scaled factors, None where `needs_grams(stack, options)` is
false and nobody else wanted them. options is the method's frozen dataclass.
"""


@dataclass(frozen=True)
class ScaleRule:
    """How λ is found (scaling.py): by the Schatten norm of order q, times c; None: not by norms."""

    order: int | None = 16
    constant: float = 0.72


@dataclass(frozen=True)
class Halves:
    """A merge in two parts, for what only the whole model tells: what is found from the Grams in
    R x R matrices, at λ = 1, and the factors that are made of it.

    find(stacks, grams_a, grams_b, options, settings) -> `Found` of every stack; make(stacks, found,
    options, settings) -> the merge. wide: the Grams that are taken are those of A and of B^T
    without scalings, in float64; otherwise those that `Merge` takes. calibrates: whether `find`
    can do what settings.calibrated asks for.
    """

    find: Callable[..., Sequence[Found]]
    make: Callable[..., Merged]
    wide: bool = False
    calibrates: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """What `Halves.find` found of a module. size: the Schatten norm of its merge at λ = 1, where
    one was wanted. overlaps: <ΔW, τ_i> and ||τ_i||^2 of every adapter, [2, T], where it was
    calibrated."""

    size: float | None = None
    overlaps: Tensor | None = None

    def kept(self) -> Found:
        """What is worth keeping until the whole model is known: what is R x R."""
        return self


def _no_grams(stack: Stack, options: Any) -> bool:
    return False


def _usual_rule(options: Any, inner: Chosen | None) -> ScaleRule:
    return ScaleRule()


def _by_size(options: Any) -> bool:
    return False


def _stacked(ranks: Sequence[int], options: Any) -> int:
    return sum(ranks)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    truncates: with neither rank nor energy given, cut to the largest rank of the adapters. dense:
    whether it makes Dense results; None: if its inner method does. inner: the option that names
    another method, which works inside this one; that one's options are given along with these.
    by_ratio(options): whether the result depends on the weights' ratios alone, not on their size.
    halves: the merge in two parts, where it can be had so. own_scale: whether λ is 1 where none is
    given, as for a sum or what brings its result to a norm itself; otherwise it is found from the
    adapters by rule(options, inner) (scaling.py). None: as for its inner method. taken(plan): for a
    row that stands for another, which it chooses for these adapters (auto.py).
    rank(ranks, options): what its factors' rank is at most, for adapters of these ranks.
    prepare(groups, options, settings): for a method that may have to see the whole model first;
    returns the merge to use. cost, source, needs: a few words each, for people who choose. why_not:
    why it cannot be used here, or None.
    """

    name: str
    summary: str
    options: type
    merge: Merge
    needs_grams: Callable[[Stack, Any], bool] = _no_grams
    truncates: bool = False
    dense: bool | None = False
    inner: str | None = None
    by_ratio: Callable[[Any], bool] = _by_size
    rank: Callable[[Sequence[int], Any], int] = _stacked
    prepare: Callable[[Iterable[Sequence[Stack]], Any, Settings], Merge] | None = None
    halves: Halves | None = None
    own_scale: bool | None = False
    rule: Callable[[Any, Chosen | None], ScaleRule] = _usual_rule
    taken: Callable[[Plan], Any] | None = None
    cost: str = ""
    source: str = ""
    needs: str = ""
    why_not: Callable[[], str | None] = usable


@dataclass(frozen=True)
class Chosen:
    """A method with its options, and the one inside it where it names one."""

    method: Method
    options: Any
    inner: Chosen | None = None

    @property
    def truncates(self) -> bool:
        return self.method.truncates or bool(self.inner and self.inner.truncates)

    @property
    def dense(self) -> bool:
        """Whether it makes Dense results."""
        if self.method.dense is None:
            return self.inner is not None and self.inner.dense
        return self.method.dense

    @property
    def own_scale(self) -> bool:
        """Whether λ is 1 where none is given."""
        if self.method.own_scale is None:
            return self.inner is not None and self.inner.own_scale
        return self.method.own_scale

    @property
    def rule(self) -> ScaleRule:
        """How λ is found."""
        return self.method.rule(self.options, self.inner)

    @property
    def by_ratio(self) -> bool:
        """Whether only the ratios of weights count."""
        inner = self.inner is not None and self.inner.by_ratio
        return inner or self.method.by_ratio(self.options)

    def rank(self, ranks: Sequence[int]) -> int:
        """What a merged module's factors have as rank at most, for adapters of these ranks."""
        if self.inner and not self.inner.dense:
            return self.inner.rank(ranks)
        return self.method.rank(ranks, self.options)

    def prepared(self, groups: Iterable[Sequence[Stack]], settings: Settings) -> Run:
        """The method as a function of stacks and their Grams. groups: of the whole model, gone
        through as often as need be."""
        row = self.method
        settings = replace(settings, inner=self.inner)
        merge = row.prepare(groups, self.options, settings) if row.prepare else row.merge
        return Run(self, merge, row.halves if merge is row.merge else None)


@dataclass(frozen=True)
class Run:
    """A method that has seen what it has to see, and merges group by group; in two parts, where it
    can be had so."""

    chosen: Chosen
    merge: Merge
    halves: Halves | None = None

    @property
    def wide(self) -> bool:
        """Whether it takes Grams in float64, of all stacks."""
        return self.halves is not None and self.halves.wide

    def wants_grams(self, stack: Stack) -> bool:
        return self.wide or self.chosen.method.needs_grams(stack, self.chosen.options)

    def find(
        self, stacks: Sequence[Stack], settings: Settings, known: Grams | None = None
    ) -> Sequence[Found]:
        """The first part. known: the stacks' Grams, where they are there already."""
        assert self.halves
        found = self._grams(stacks, settings) if known is None else known
        return self.halves.find(stacks, *found, self.chosen.options, settings)

    def make(self, stacks: Sequence[Stack], found: Sequence[Found], settings: Settings) -> Merged:
        """The second part."""
        assert self.halves
        return self.halves.make(stacks, found, self.chosen.options, settings)

    def __call__(
        self, stacks: Sequence[Stack], settings: Settings, known: Grams | None = None
    ) -> Merged:
        """Merge the stacks. known: their Grams, where they are there already."""
        if self.halves:
            return self.make(stacks, self.find(stacks, settings, known), settings)
        found = self._grams(stacks, settings) if known is None else known
        return self.merge(stacks, *found, self.chosen.options, settings)

    def _grams(self, stacks: Sequence[Stack], settings: Settings) -> Grams:
        if self.wide:
            return wide_grams(stacks, settings.backend)
        return grams(stacks, [self.wants_grams(s) for s in stacks], settings.backend)


def bare_sides(stacks: Sequence[Stack]) -> list[Side]:
    """A of every stack, then B^T of every stack without scalings."""
    bare = [Side(s.b.blocks, (1.0,) * len(s.b.blocks)) for s in stacks]
    return [*(s.a for s in stacks), *bare]


def wide_grams(stacks: Sequence[Stack], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Grams of A and of B^T without scalings in float64."""
    found = ops.gram(bare_sides(stacks), dtype=torch.float64, backend=backend)
    return found[: len(stacks)], found[len(stacks) :]


def grams(
    stacks: Sequence[Stack], wanted: Sequence[bool], backend: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Grams of both sides of the wanted stacks, None for the others."""
    chosen = [s for s, want in zip(stacks, wanted) if want]
    found = ops.gram([*(s.a for s in chosen), *(s.b for s in chosen)], backend=backend)
    a, b = iter(found[: len(chosen)]), iter(found[len(chosen) :])
    pairs = [(next(a), next(b)) if want else (None, None) for want in wanted]
    return [x for x, _ in pairs], [x for _, x in pairs]
