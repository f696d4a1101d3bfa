"""Merges whose kernels compute nothing: what they cost is the host's share."""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import domerge_fast
from domerge_fast import _C
from domerge_fast.backends import cpu, gpu
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
        self._extension = SimpleNamespace(Problems=_C.Problems, **timed)

    def on_cpu(self, patch: pytest.MonkeyPatch) -> None:
        """Takes the place of the CPU's kernels."""
        patch.setattr(cpu, "_C", self._extension)

    def on_gpu(self, patch: pytest.MonkeyPatch) -> None:
        """Takes the place of the CUDA backend's launches, which run on the CPU then, and of the
        CPU's kernels."""
        self.on_cpu(patch)
        stubs = {"gram": self._launched_gram, "orthogonalize": self._launched_descents}
        nothing = ("block_gram", "split", "apply", "roots", "apply_decouple", "largest")
        stubs |= dict.fromkeys(nothing, lambda *arguments: None)
        extension = ModuleType("domerge_fast._cuda")
        extension.__dict__.update(
            {name: self._timed(stub) for name, stub in stubs.items()},
            ON_HOST=True,
            gram_sizes=lambda: [16, 32, 64, 128],
            orthogonalize_sizes=lambda: [16, 32, 64, 96, 128, 192, 256],
            apply_sizes=lambda: [16, 32, 64, 128],
            apply_decouple_sizes=lambda: [16, 32, 64, 128, 256, 512],
            apply_columns=lambda size: 512,
            apply_decouple_columns=lambda size: 64,
            orthogonalize_scratch=lambda size, problems, frobenius: 1 << 20,
            apply_decouple_scratch=lambda size, tiles, rank: 1 << 20,
            takes_parts=lambda dtype, out_dtype: True,
            split_rows=lambda: 16,
            split_numbers=lambda rows, columns: rows * (-(-columns // 16) * 16 + 1),
            Decoupling=SimpleNamespace,
            TiledDescent=None,
            Updates=None,
        )
        backend = "domerge_fast.backends.gpu.cuda"
        patch.setattr(gpu, "cuda", None, raising=False)
        patch.setitem(sys.modules, extension.__name__, extension)
        patch.setattr(domerge_fast, "_cuda", extension, raising=False)
        patch.setitem(sys.modules, backend, sys.modules.get(backend))
        del sys.modules[backend]
        importlib.import_module(backend)

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

    def _launched_gram(self, *arguments: Any) -> None:
        _, _, tiles, count, *_, out, _ = arguments
        fill([out], 4 * (max(column(tiles, count, 7, 6)) + self._rank**2))

    def _launched_descents(self, size: int, work: int, count: int, *arguments: Any) -> None:
        _, out, stats, *_ = arguments
        fill([out], 4 * (max(column(work, count, 6, 4)) + self._rank**2))
        fill([stats], 8 * 5 * count)


def column(table: int, rows: int, width: int, k: int) -> Sequence[int]:
    """Of a table of int64 numbers at an address."""
    return (ctypes.c_int64 * (rows * width)).from_address(table)[k::width]


def fill(addresses: Sequence[int], size: int) -> None:
    for address in addresses:
        ctypes.memset(address, USUAL, size)
