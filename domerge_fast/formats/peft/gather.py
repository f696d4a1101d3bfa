"""The factors of a parameter's matrices, kept until all that will come are there: PEFT stores them
as two tensors (parameters.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from ..target import Layout

__all__ = ["Gathered", "joined"]

_ALONE = (1 << 15) - 1
"""Elements that torch copies in one thread."""

Pair = tuple[Tensor, Tensor]


class Gathered:
    """layouts: of all modules that will come; those that are no matrices of parameters are left
    out."""

    def __init__(self, layouts: Iterable[Layout], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._missing = Counter(x.parameter for x in layouts if x.is_numbered)
        self._found: dict[str, dict[int, Pair]] = {}

    def add(self, layout: Layout, a: Tensor, b: Tensor) -> dict[int, Pair] | None:
        """A [k, n] and B [m, k] of one matrix; all of its parameter's, by number, once they are
        there."""
        assert layout.slice
        assert layout.slice.index is not None
        name = layout.parameter
        pair = a.to(self._dtype), b.to(self._dtype)
        self._found.setdefault(name, {})[layout.slice.index] = pair
        self._missing[name] -= 1
        return None if self._missing[name] else self._found.pop(name)


def joined(pairs: dict[int, Pair], count: int, rank: int) -> Pair:
    """A [r E, n] and B [m, r E] of E matrices, each padded to rank r with zeros."""
    a, b = next(iter(pairs.values()))
    nothing = a[:0], b[:, :0]
    rows, columns = a.new_empty(count, rank, a.shape[1]), b.new_empty(count, len(b), rank)
    for e in range(count):
        a, b = pairs.get(e, nothing)
        _copy(rows[e, : len(a)], a)
        _copy(columns[e, :, : len(a)], b)
        rows[e, len(a) :] = 0
        columns[e, :, len(a) :] = 0
    return rows.flatten(0, 1), columns.view(count, -1).T.contiguous().view(len(b), -1)


def _copy(target: Tensor, source: Tensor) -> None:
    """A few rows at a time: torch shares a larger copy among threads, which takes many times as
    long where other threads work."""
    step = max(1, _ALONE // max(1, source.shape[1]))
    for start in range(0, len(source), step):
        target[start : start + step] = source[start : start + step]
