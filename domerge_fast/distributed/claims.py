"""Who takes which unit: whoever is free takes the most costly one that is left."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch.distributed import Store

__all__ = ["Claims"]


class Claims:
    """The units of one pass, as one of several processes sees them. store: of this pass alone.
    costs: of the units, by which all order them alike. known: those that are done already, as far
    as this process knows; one that it does not know of is done again, which changes nothing."""

    def __init__(self, store: Store, costs: Sequence[float], known: Collection[int]) -> None:
        self._store, self._known = store, set(known)
        self._order = sorted(range(len(costs)), key=lambda k: (-costs[k], k))

    def free(self, rather: Sequence[int] = ()) -> Iterator[int]:
        """Units that nobody else takes, until there are none. rather: which come first."""
        for k in rather:
            if self._take(k):
                yield k
        while (at := self._store.add("next", 1) - 1) < len(self._order):
            if self._take(self._order[at]):
                yield self._order[at]

    def again(self, units: Sequence[int], turn: int) -> Iterator[int]:
        """Units that others have taken and not done, each by one process more in every turn."""
        for k in units:
            if self._store.add(f"again/{turn}/{k}", 1) == 1:
                yield k

    def done(self, unit: int) -> None:
        self._store.set(f"done/{unit}", "")
        self._known.add(unit)

    def missing(self) -> list[int]:
        """The units that are not done."""
        left = [k for k in self._order if k not in self._known]
        self._known.update(k for k in left if self._store.check([f"done/{k}"]))
        return [k for k in left if k not in self._known]

    def _take(self, unit: int) -> bool:
        return unit not in self._known and self._store.add(f"taken/{unit}", 1) == 1
