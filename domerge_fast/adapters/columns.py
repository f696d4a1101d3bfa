"""What is said of many modules: one thing for all, or by kind, without an entry for each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["OfKinds", "Same", "alike"]

Kind = TypeVar("Kind")
Value = TypeVar("Value")

MOST_CODES = 1 << 31
"""Numbers of rows are made fewer before there may be more of them."""


class Same(Mapping[str, Value]):
    """One value for all of these names."""

    def __init__(self, names: Mapping[str, object], value: Value) -> None:
        self.names, self.value = names, value

    def __getitem__(self, name: str) -> Value:
        if name not in self.names:
            raise KeyError(name)
        return self.value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class OfKinds(Mapping[str, Value], Generic[Kind, Value]):
    """The values of modules' kinds."""

    def __init__(self, kinds: Mapping[str, Kind], values: Mapping[Kind, Value]) -> None:
        self.kinds, self.of_kinds = kinds, values

    def __getitem__(self, name: str) -> Value:
        return self.of_kinds[self.kinds[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def every(self) -> Collection[Value]:
        """Those that there are."""
        return self.of_kinds.values()


def alike(columns: Sequence[Tensor], counts: Sequence[int]) -> tuple[list[int], Tensor]:
    """Rows of whole numbers by their contents: the first row of every kind, and the kind of each.

    columns: [N] each in int64, of numbers below its count.
    """
    code, size = torch.zeros_like(columns[0]), 1
    for column, count in zip(columns, counts):
        if size * count > MOST_CODES:
            code = torch.unique(code, return_inverse=True)[1]
            size = len(code)
        code, size = code * count + column, size * count
    found, which = torch.unique(code, return_inverse=True)
    order = torch.arange(len(code))
    first = torch.full((len(found),), len(code)).scatter_reduce(0, which, order, "amin")
    return first.tolist(), which
