"""Merges whose kernels compute nothing: what they cost is the host's share."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from domerge_fast import _C
from domerge_fast.bench.workloads import Workload

USUAL = 0x3F
"""A byte of which float32 and float64 numbers near 1 are made."""


class Stubs:
    """The C++ extension, with kernels for a workload of adapters alike that fill with one number
    what the host looks at. seconds: what they took themselves, of their thread's CPU time."""

    def __init__(self, workload: Workload) -> None:
        self.seconds = 0.0
        self._ranks = [member.rank for member in workload.members]
        self._rank = sum(self._ranks)
        stubs = {
            "gram": self._gram,
            "block_gram": self._block_gram,
            "orthogonalize": self._orthogonalize,
            "apply": self._apply,
            "apply_decouple": self._apply_decouple,
            "block_products": self._block_products,
            "block_largest": lambda problems, out, threads: None,
            "largest": lambda data, counts, dtypes, out, threads: fill([out], 8 * len(data)),
        }
        timed = {name: self._timed(stub) for name, stub in stubs.items()}
        self.extension = SimpleNamespace(Problems=_C.Problems, **timed)

    def _timed(self, stub: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.thread_time()
            found = stub(*arguments)
            self.seconds += time.thread_time() - begin
            return found

        return call

    def _gram(self, problems: _C.Problems, out: Sequence[int], wide: bool, threads: int) -> None:
        fill(out, self._rank**2 * (8 if wide else 4))

    def _block_gram(self, problems: _C.Problems, out: Sequence[int], threads: int) -> None:
        fill(out, 8 * sum(r * r for r in self._ranks))

    def _orthogonalize(
        self, grams: Any, ranks: Any, counts: Any, out: Sequence[int], *_: Any
    ) -> None:
        fill(out, 4 * self._rank**2)

    def _apply(self, problems: Any, coefficients: Any, *arguments: Any) -> None:
        fill(arguments[-2:-1], len(coefficients))

    def _apply_decouple(self, problems: Any, coefficients: Any, *arguments: Any) -> None:
        norms, finite, _ = arguments[-3:]
        fill(norms, 8 * len(self._ranks))
        fill([finite], len(coefficients))

    def _block_products(
        self, x: Sequence[int], y: Sequence[int], ranks: Any, out: int, _: int
    ) -> None:
        fill([out], 8 * len(x) * len(self._ranks) ** 2)


def fill(addresses: Sequence[int], size: int) -> None:
    for address in addresses:
        ctypes.memset(address, USUAL, size)
