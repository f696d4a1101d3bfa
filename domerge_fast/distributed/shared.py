"""Passes through a model that several processes share: each takes units until none is left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import PrefixStore

from ..adapters.plan import Plan
from ..costs import cut
from .claims import Claims
from .group import Group
from .journal import Journal
from .places import Unit

__all__ = ["Shared", "SharedPass"]

PATIENCE = 5.0, 60.0
"""Seconds that others have for the last units, at least and where this process has done none."""
TIMES_LONGER = 4
"""Than the longest one here may a unit of another process take, before it is done here, too."""


class SharedPass:
    """One pass: see engine/passes.py. finds: what is found of a unit beside what `done` is told.
    reads: whether this process wants the results."""

    def __init__(
        self,
        group: Group,
        journal: Journal,
        name: str,
        costs: Sequence[float],
        beside: Callable[[Unit], Any] = lambda unit: None,
        reads: bool = True,
    ) -> None:
        self._group, self._journal, self._name = group, journal, name
        store = PrefixStore(name, group.store)
        self._claims = Claims(store, costs, journal.known(name))
        self._count, self._beside, self._reads = len(costs), beside, reads
        self._own: dict[int, tuple[Any, Any]] = {}
        self._taken: dict[int, float] = {}
        self._longest: float | None = None
        self.beside: list[tuple[Unit, Any]] = []
        """What was found beside, in the units' order, when the results have been read."""

    def rounds(self, rather: Sequence[int] = ()) -> Iterator[Iterable[int]]:
        yield self._each(self._claims.free(rather))
        for turn in itertools.count():
            if not (late := self._late()):
                return
            yield self._each(self._claims.again(late, turn))

    def done(self, unit: int, found: Any) -> None:
        entry = found, self._beside((self._name, unit))
        self._journal.put(self._name, unit, entry)
        self._claims.done(unit)
        if self._reads:
            self._own[unit] = entry
        took = time.monotonic() - self._taken[unit]
        self._longest = max(took, self._longest or 0.0)

    def results(self) -> Iterator[Any]:
        for unit in range(self._count) if self._reads else ():
            found, beside = self._own.get(unit) or self._journal.get(self._name, unit)
            self.beside.append(((self._name, unit), beside))
            yield found

    def _each(self, units: Iterable[int]) -> Iterator[int]:
        self._group.check()
        for unit in units:
            self._taken[unit] = time.monotonic()
            yield unit
            self._group.check()

    def _late(self) -> list[int]:
        """The units that others have had for too long; none when all are done."""
        least, usual = PATIENCE
        longest = usual if self._longest is None else max(least, TIMES_LONGER * self._longest)
        missing = []
        for _ in self._group.waits(longest):
            if not (missing := self._claims.missing()):
                break
        return missing


@dataclass
class Shared:
    """Passes (engine/passes.py) of a group. beside: what is found of a unit whose modules have been
    given to the sink."""

    group: Group
    journal: Journal
    unit_bytes: int
    beside: Callable[[Unit], Any]
    writing: list[SharedPass] = field(default_factory=list)
    """The passes in which modules are given to the sink, in their order."""
    _count: int = 0
    _costs: dict[str, float] = field(default_factory=dict)

    def units(self, plan: Plan) -> Sequence[Sequence[str]]:
        found = cut(plan, self.unit_bytes)
        self._costs = {names[0]: cost for names, cost in found}
        return [names for names, _ in found]

    def begin(self, units: Sequence[Sequence[str]], writes: bool = False) -> SharedPass:
        costs = [self._costs[names[0]] for names in units]
        name, self._count = f"{self._count}", self._count + 1
        if not writes:
            return SharedPass(self.group, self.journal, name, costs)
        reads = self.group.is_first
        made = SharedPass(self.group, self.journal, name, costs, self.beside, reads)
        self.writing.append(made)
        return made
