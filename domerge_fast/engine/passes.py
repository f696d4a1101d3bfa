"""How a plan's modules are gone through: by this process alone, or shared with others.

A plan is cut into units, lists of names. A pass goes through all of them once; what is found of a
unit is kept, and read in the units' order when the pass is over, so that sums do not depend on who
looked at which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..adapters.plan import Plan

__all__ = ["ALONE", "Pass", "Passes"]


class Pass(Protocol):
    """Once through all units of a plan."""

    def rounds(self, rather: Sequence[int] = ()) -> Iterator[Iterable[int]]:
        """The numbers of the units that this process takes. Another round is asked for when all of
        the last one is done; there is none when all units are done. rather: those that this
        process takes first, if they are free."""
        ...

    def done(self, unit: int, found: Any) -> None:
        """Keep what was found of a unit: tensors, numbers, texts, and lists, tuples and dicts of
        these."""
        ...

    def results(self) -> Iterator[Any]:
        """What was found of all units, in their order, when the rounds are over."""
        ...


class Passes(Protocol):
    """Passes through a model, which all who share in it begin in the same order."""

    def units(self, plan: Plan) -> Sequence[Sequence[str]]:
        """The plan's modules in order, some to a unit."""
        ...

    def begin(self, units: Sequence[Sequence[str]], writes: bool = False) -> Pass:
        """The next pass. writes: whether the sink is given what becomes of the modules in it."""
        ...


@dataclass
class _Alone:
    count: int
    found: list[Any] = field(default_factory=list)

    def rounds(self, rather: Sequence[int] = ()) -> Iterator[Iterable[int]]:
        yield range(self.count)

    def done(self, unit: int, found: Any) -> None:
        self.found.append(found)

    def results(self) -> Iterator[Any]:
        return iter(self.found)


class _ByOne:
    def units(self, plan: Plan) -> Sequence[Sequence[str]]:
        return [plan.names]

    def begin(self, units: Sequence[Sequence[str]], writes: bool = False) -> Pass:
        return _Alone(len(units))


ALONE: Passes = _ByOne()
"""All modules in one unit, by this process."""
