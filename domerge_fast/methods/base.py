"""What a merge method is: a function on a group of stacks, written in ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Kind, Plan, Stack
from ..algebra.side import Side
from ..registry import usable
from .contract import Contract, Found, Needs, Reducible
from .groups import Groups
from .made import Made
from .thresholds import Counted

__all__ = [
    "UNCUT",
    "Based",
    "Chosen",
    "Cut",
    "Grams",
    "Halves",
    "Merge",
    "Method",
    "ScaleRule",
    "Settings",
    "bare_sides",
    "grams",
    "wide_grams",
]


@dataclass(frozen=True)
class Settings:
    """What every method is given: λ, the dtype of its results, where its ops run, for `prepare` the
    method that works inside this one, and the rank that results are cut to, if they are. counted:
    what is known of the updates of the adapters as they were read, where they are merged again.

    For merges in two parts: order, the Schatten norm of the merge that is wanted with what is
    found; whether it is to be `calibrated` (svc.py), and, for what is made, by which projection.
    """

    scale: float
    dtype: torch.dtype
    backend: str
    inner: Chosen | None = None
    order: int | None = None
    calibrated: bool = False
    projection: float = 1.0
    rank: int | None = None
    counted: Counted | None = None


Grams = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
Merge = Callable[
    [Sequence[Stack], Sequence[Tensor | None], Sequence[Tensor | None], Any, Settings],
    Made,
]
"""(stacks, grams_a, grams_b, options, settings) -> the merge of every stack, in its own units: what
`Stack.powers` took out comes back later.

The Grams are [R, R] in float32, of the scaled factors, None where `needs_grams(stack, options,
backend)` is false and nobody else wanted them. options is the method's frozen dataclass.
"""


@dataclass(frozen=True)
class ScaleRule:
    """How λ is found (scaling.py): by the Schatten norm of order q, times c; None: not by norms."""

    order: int | None = 16
    constant: float = 0.72


@dataclass(frozen=True)
class Halves:
    """A merge in two parts, for what only the whole model tells: what is found from the Grams in
    R x R matrices, at λ = 1, and the factors that are made of it, in ops. It takes stacks of
    several modules; `Merge` takes those of one.

    find(stacks, grams_a, grams_b, options, settings) -> `Found` of every stack; make(stacks, found,
    options, settings) -> the merge. The Grams are those that `Merge` takes.
    """

    find: Callable[..., Sequence[Found]]
    make: Callable[..., Made]


@dataclass(frozen=True, eq=False)
class Based:
    """A module in a basis, ΔW = U merge(..) V^T: its stack there, and E_A [K_A, R] (None: V = I),
    E_B [K_B, R] with V^T = E_A A and U^T = E_B B^T (B without scalings)."""

    stack: Stack
    to_a: Tensor | None
    to_b: Tensor


@dataclass(frozen=True)
class Cut:
    """How far results are truncated; both None: not at all."""

    rank: int | None = None
    energy: float | None = None

    def __bool__(self) -> bool:
        return self.rank is not None or self.energy is not None


UNCUT = Cut()


def _nothing_needed(options: Any) -> Needs:
    return Needs()


def _no_grams(stack: Stack, options: Any, backend: str) -> bool:
    return False


def _usual_rule(options: Any, inner: Chosen | None) -> ScaleRule:
    return ScaleRule()


def _no_sum(options: Any) -> bool:
    return False


def _never(chosen: Chosen, kinds: Iterable[Kind], hindrance: str | None) -> bool:
    return False


def _by_size(options: Any) -> bool:
    return False


def _stacked(ranks: Sequence[int], options: Any) -> int:
    return sum(ranks)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    coefficients, takes(options): a method that lives in R x R, and what it needs for that;
    reduce(batches, options): what it has to know of the whole model first, from the Grams and the
    weights of all of its modules. core: the mathematics between orthonormal bases that its
    coefficients are made of (spectral/space.py), where there are such, through which gradients
    reach the weights. merge: any other, written in ops; in two `Halves`, where it can
    be had so.
    truncates: with neither rank nor energy given, cut to the largest rank of the adapters. dense:
    whether it makes Dense results; None: if its inner method does. inner: the option that names
    another method, which works inside this one; that one's options are given along with these.
    basis(stacks, options, settings): where it works on factors in another basis, these.
    sums(options): whether the result is λ sum_i w_i τ_i, but for a cut: then changes that are no
    product of factors are summed alike (adapters/differences.py).
    by_ratio(options): whether the result depends on the weights' ratios alone, not on their size.
    own_scale: whether λ is 1 where none is given, as for a sum or what brings its result to a norm
    itself; otherwise it is found from the adapters by rule(options, inner) (scaling.py). None: as
    for its inner method. taken(plan): for a row that stands for another, which it chooses for these
    adapters (auto.py).
    rank(ranks, options): what its factors' rank is at most, for adapters of these ranks.
    prepare(groups, options, settings): for a `merge` that may have to see the whole model first;
    returns the one to use. streams(chosen, kinds, hindrance): whether engine/streamed.py runs it on
    modules of these kinds; hindrance: what is in its way, in words. cost, source,
    needs: a few words each, for people who choose. why_not: why it cannot be used here, or None.
    """

    name: str
    summary: str
    options: type
    merge: Merge | Halves | None = None
    coefficients: Contract | None = None
    core: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None
    takes: Callable[[Any], Needs] = _nothing_needed
    reduce: Callable[[Groups[Sequence[Reducible]], Any], Any] | None = None
    needs_grams: Callable[[Stack, Any, str], bool] = _no_grams
    truncates: bool = False
    dense: bool | None = False
    inner: str | None = None
    basis: Callable[[Sequence[Stack], Any, Settings], Sequence[Based]] | None = None
    sums: Callable[[Any], bool] = _no_sum
    by_ratio: Callable[[Any], bool] = _by_size
    rank: Callable[[Sequence[int], Any], int] = _stacked
    prepare: Callable[[Groups[Sequence[Stack]], Any, Settings], Merge | Halves] | None = None
    streams: Callable[[Chosen, Iterable[Kind], str | None], bool] = _never
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


def bare_sides(stacks: Sequence[Stack]) -> list[Side]:
    """A of every stack, then B^T of every stack without scalings."""
    bare = [s.b.scaled((1.0,) * len(s.b.scales)) for s in stacks]
    return [*(s.a for s in stacks), *bare]


def wide_grams(
    stacks: Sequence[Stack], backend: str, bare: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Grams of A and of B^T in float64; bare: without scalings."""
    sides = bare_sides(stacks) if bare else [*(s.a for s in stacks), *(s.b for s in stacks)]
    found = ops.gram(sides, dtype=torch.float64, backend=backend)
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
