"""Modules by the last part of what they are called, as those of one owner belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from itertools import repeat
from typing import TypeVar

__all__ = ["Parts"]

Value = TypeVar("Value")


class Parts:
    """owners: by the last part of a name, the owner, which is what comes before it, of every such
    module, with the module's place among all."""

    def __init__(self, names: Iterable[str]) -> None:
        found: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for k, (owner, _, last) in enumerate(map(str.rpartition, names, repeat("."))):
            found[last].setdefault(owner, k)
        self.owners: Mapping[str, Mapping[str, int]] = dict(found)
        self._known: dict[Hashable, object] = {}

    @cached_property
    def ambiguous(self) -> list[str]:
        """The outermost modules that end another one's name."""
        return sorted(last for last, own in self.owners.items() if "" in own and len(own) > 1)

    def once(self, key: Hashable, find: Callable[[], Value]) -> Value:
        """What is found of these modules, which is found once and is not changed."""
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]  # type: ignore[return-value]
