"""How a method goes through the whole model before it merges: group by group, adding up."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Groups", "Here", "Through"]

Group = TypeVar("Group")
Other = TypeVar("Other")
Sum = TypeVar("Sum")


class Groups(ABC, Generic[Group]):
    """Groups of the model's modules, gone through as often as need be."""

    @abstractmethod
    def summed(self, look: Callable[[Group], Sum], add: Callable[[Sum, Sum], Sum]) -> Sum | None:
        """look(group) of all groups, added up in their order; None where there are none. A sum
        consists of tensors, numbers, texts, and lists, tuples and dicts of these: groups may be
        looked at by several processes. It is not changed by `add`."""


@dataclass(frozen=True)
class Here(Groups[Group]):
    """Groups that are at hand."""

    groups: Iterable[Group]

    def summed(self, look: Callable[[Group], Sum], add: Callable[[Sum, Sum], Sum]) -> Sum | None:
        found = map(look, self.groups)
        first = next(found, None)
        return None if first is None else functools.reduce(add, found, first)


@dataclass(frozen=True)
class Through(Groups[Other], Generic[Group, Other]):
    """Groups as something makes them of others."""

    groups: Groups[Group]
    made: Callable[[Group], Other]

    def summed(self, look: Callable[[Other], Sum], add: Callable[[Sum, Sum], Sum]) -> Sum | None:
        return self.groups.summed(lambda group: look(self.made(group)), add)
