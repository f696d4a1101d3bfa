"""Thresholds of |τ_i| that keep a given number of its entries: exact order statistics.

The 31 bits of |τ_i| are counted in two passes, of a module or of the whole model: how often each
value of the upper 16 occurs, then of the lower 15 behind those that hold the position. What is
counted first does not depend on the position: it may be kept (`Counted`) for other ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.entry_rules import HIGH_BITS, LOW_BITS
from ..errors import OptionError
from .groups import Groups

__all__ = ["Bands", "Counted", "Positions", "bands"]

Positions = Callable[[int], tuple[int, int]]
"""Of N entries by ascending |τ|: the first and the last that are kept; first > last: none."""

Bands = dict[int, tuple[float, float]]
"""The least and the largest |τ_i| that is kept, by the adapter's position in the plan."""

MOST = 1 << 17
"""Thresholds that are kept, some 250 bytes each."""

Of = tuple[tuple[str, tuple[int, ...], tuple[int, int]], ...]
"""Modules, each with its adapters and the powers of two that were taken out of their factors."""

Counts = tuple[Of, dict[int, Tensor]]
"""How often values occur among the bits of |τ_i|, by adapter, over all of these modules."""


@dataclass(frozen=True, eq=False)
class Counted:
    """What is known of the updates of adapters that stay what they are: how often the upper bits of
    |τ_i| occur, by module and adapter, and up to MOST thresholds that were found. Takes 12 bytes
    for each value of the upper bits that occurs, of 2^16, which are a few thousand."""

    upper: dict[tuple[Of, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: dict[tuple[Of, int, int], float] = field(default_factory=dict)

    def keep(self, of: Of, at: Mapping[int, int], found: Mapping[int, float]) -> None:
        """Thresholds at positions, by adapter."""
        if len(self.values) + len(found) > MOST:
            self.values.clear()
        self.values.update({(of, i, at[i]): value for i, value in found.items()})

    def of_upper(self, stack: Stack, backend: str) -> Tensor:
        """Counts of the upper bits [T, 2^16], in a pass where one is not known."""
        keys: list[tuple[Of, int]] = [((_key(stack),), i) for i in stack.adapters]
        if any(key not in self.upper for key in keys):
            counts = ops.entry_counts(stack.a, stack.b, backend=backend).cpu()
            for key, row in zip(keys, counts):
                there = row.nonzero()[:, 0]
                self.upper[key] = there.int(), row[there]
        found = torch.zeros(len(keys), 1 << HIGH_BITS, dtype=torch.int64)
        for row, key in zip(found, keys):
            there, counts = self.upper[key]
            row[there.long()] = counts
        return found


def bands(
    groups: Groups[Sequence[Stack]],
    positions: Positions,
    backend: str,
    counted: Counted | None = None,
) -> Bands:
    """Over all entries of the groups, which are gone through two or three times. counted: what is
    known of them, and is kept; a threshold takes one pass then, one that was found before none."""
    counted = counted or Counted()
    of, upper = _counts(groups, lambda s: counted.of_upper(s, backend))
    totals = {i: int(row.sum()) for i, row in upper.items()}
    wanted = {i: positions(count) for i, count in totals.items()}

    def values(at: Mapping[int, int]) -> dict[int, float]:
        if any((of, i, k) not in counted.values for i, k in at.items()):
            counted.keep(of, at, _values(groups, upper, at, backend))
        return {i: counted.values[of, i, k] for i, k in at.items()}

    low = values({i: min(w[0], totals[i] - 1) for i, w in wanted.items()})
    high = dict.fromkeys(totals, math.inf)
    if any(last < totals[i] - 1 for i, (_, last) in wanted.items()):
        high = values({i: max(w[1], 0) for i, w in wanted.items()})
    return {
        i: (low[i], high[i]) if first <= last else (math.inf, math.inf)
        for i, (first, last) in wanted.items()
    }


def _key(stack: Stack) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    return stack.name, stack.adapters, stack.powers


def _counts(groups: Groups[Sequence[Stack]], of: Callable[[Stack], Tensor]) -> Counts:
    """of(stack) -> counts [T, any]; these of all stacks."""

    def counted(s: Stack) -> Counts:
        return (_key(s),), dict(zip(s.adapters, of(s)))

    found = groups.summed(lambda stacks: reduce(_added, map(counted, stacks)), _added)
    return found or ((), {})


def _added(one: Counts, other: Counts) -> Counts:
    (of, found), (more, rows) = one, other
    if sum(of[0][2]) != sum(more[0][2]):
        problem = f"module {more[0][0]!r} is larger or smaller than others beyond float32"
        raise OptionError("scope", problem, "seek the largest entries in each tensor")
    return of + more, found | {i: found[i] + row if i in found else row for i, row in rows.items()}


def _values(
    groups: Groups[Sequence[Stack]],
    upper: Mapping[int, Tensor],
    at: Mapping[int, int],
    backend: str,
) -> dict[int, float]:
    """The |τ_i| at position at[i] of the ascending ones."""
    places = {i: _place(row, at[i]) for i, row in upper.items()}

    def behind(s: Stack) -> Tensor:
        prefixes = [places[i][0] for i in s.adapters]
        return ops.entry_counts(s.a, s.b, prefixes, backend=backend).cpu()

    _, lower = _counts(groups, behind)
    values = {}
    for i, (prefix, rest) in places.items():
        bits = prefix << LOW_BITS | _place(lower[i], rest)[0]
        values[i] = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    return values


def _place(counts: Tensor, position: int) -> tuple[int, int]:
    """The bin that holds a position, and the position within the bin."""
    before = counts.cumsum(0)
    at = int(torch.searchsorted(before, position, right=True))
    return at, position - (int(before[at - 1]) if at else 0)
