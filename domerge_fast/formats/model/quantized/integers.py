"""Integers of few bits packed into words, with a factor and a zero for every group of a row's
numbers: W = s (q - z). GPTQ, AWQ and compressed-tensors differ in how they pack. Sources: arXiv
2210.17323 and 2306.00978; the tensors that GPTQModel 7, AutoAWQ and compressed-tensors 0.20 save.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ....storage.safetensors_file import FileTensor
from ..checkpoint import FLOATS, ORIGINAL
from .dequantized import Dequantized, Parts, Scheme, columns, unpacked

__all__ = ["AWQ", "GPTQ", "Grouped"]

_WORD = 32
_MARKS = {".qweight": (".qweight", ".qzeros", ".scales", ".g_idx")}
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight numbers is in a word of AWQ's."""


class Grouped(Dequantized):
    """[m, n]. groups: of each column, where they are not runs of equally many."""

    groups: Tensor | None = None

    @abstractmethod
    def numbers(self, start: int, stop: int) -> Tensor:
        """q of some rows, [k, n], unsigned."""

    @abstractmethod
    def factors(self, start: int, stop: int) -> Tensor:
        """s of their groups, [k, g]."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> Tensor:
        """z of their groups, [k, g], or what stands for it, of one number."""

    def rows(self, start: int, stop: int) -> Tensor:
        made = self.numbers(start, stop).float()
        s, z = self.factors(start, stop).float(), self.zeros(start, stop).float()
        if self.groups is not None:
            z = z[:, self.groups] if z.numel() > 1 else z
            return made.sub_(z).mul_(s[:, self.groups])
        grouped = made.reshape(len(made), s.shape[1], -1)
        grouped.sub_(z[..., None]).mul_(s[..., None])
        return made


class _Gptq(Grouped):
    """Words [n bits / 32, m] of columns, zeros [g, m bits / 32], factors [g, m]."""

    def __init__(self, parts: Parts) -> None:
        self._words = parts.of(".qweight", torch.int32)
        self._factors = parts.of(".scales", *FLOATS)
        self._zeros = parts.of(".qzeros", torch.int32)
        shapes = (self._words.shape, self._factors.shape, self._zeros.shape)
        if {*map(len, shapes)} != {2} or 0 in shapes[1]:
            _refuse(parts)
        (words, m), (count, out), (_, of_zeros) = shapes
        self._bits, left = divmod(of_zeros * _WORD, out)
        if left or self._bits not in (2, 4, 8) or out != m or shapes[2][0] != count:
            _refuse(parts)
        n = words * _WORD // self._bits
        super().__init__(self._words, (m, n), parts.written)
        self._added = 0 if "gptq_v2" in _formats(parts.how) else 1
        self._parts = parts
        if ".g_idx" in parts:
            of_columns = parts.of(".g_idx", torch.int32, torch.int64, shape=(n,)).read().long()
            if n and not 0 <= int(of_columns.min()) <= int(of_columns.max()) < count:
                _refuse(parts)
            runs = n % count == 0 and torch.equal(of_columns, torch.arange(n) // (n // count))
            self.groups = None if runs else of_columns
        elif n % count:
            _refuse(parts)

    def numbers(self, start: int, stop: int) -> Tensor:
        return unpacked(columns(self._words, start, stop).T, self._bits)

    def factors(self, start: int, stop: int) -> Tensor:
        return columns(self._factors, start, stop).T

    def zeros(self, start: int, stop: int) -> Tensor:
        each = _WORD // self._bits
        first = start // each
        found = unpacked(columns(self._zeros, first, -(-stop // each)), self._bits)
        found = found[:, start - first * each : stop - first * each].T
        if self._added and bool((found == (1 << self._bits) - 1).any()):
            # Programs differ in whether one more is then the largest plus one, or 0.
            stem = self._parts.stem
            problem = f"stores zeros in {stem + '.qzeros'!r} that programs read in two ways"
            self._parts.refuse(problem, ORIGINAL)
        return found.int() + self._added


class _Awq(Grouped):
    """Words [n, m / 8] of rows, zeros [g, m / 8], factors [g, m]."""

    def __init__(self, parts: Parts) -> None:
        self._words = parts.of(".qweight", torch.int32)
        self._factors = parts.of(".scales", *FLOATS)
        self._zeros = parts.of(".qzeros", torch.int32)
        if len(self._words.shape) != 2 or len(self._factors.shape) != 2:
            _refuse(parts)
        (n, words), (count, m) = self._words.shape, self._factors.shape
        if words * 8 != m or not count or n % count or self._zeros.shape != (count, words):
            _refuse(parts)
        super().__init__(self._words, (m, n), parts.written)

    def numbers(self, start: int, stop: int) -> Tensor:
        return self._apart(self._words, start, stop)

    def factors(self, start: int, stop: int) -> Tensor:
        return columns(self._factors, start, stop).T

    def zeros(self, start: int, stop: int) -> Tensor:
        return self._apart(self._zeros, start, stop)

    def _apart(self, words: FileTensor, start: int, stop: int) -> Tensor:
        first = start // 8
        found = unpacked(columns(words, first, -(-stop // 8)), 4)
        found = found.reshape(len(found), -1, 8)[..., _AWQ_PLACES].flatten(1)
        return found[:, start - first * 8 : stop - first * 8].T


def _refuse(parts: Parts) -> NoReturn:
    shapes = ", ".join(f"{x} {list(t.shape)}" for x, t in parts.tensors.items())
    parts.refuse(
        f"stores {parts.stem!r} in shapes that do not belong together ({shapes})", ORIGINAL
    )


def _formats(how: Mapping[str, Any]) -> list[Any]:
    """Stored zeros are one less in GPTQ's first format, which is meant where none is stated."""
    return [x for key in ("checkpoint_format", "format") if (x := how.get(key)) is not None]


def _check_gptq(how: Mapping[str, Any]) -> str | None:
    formats = _formats(how)
    if len({*map(str, formats)}) > 1 or not {*map(str, formats)} <= {"gptq", "gptq_v2"}:
        return f"checkpoint_format={' and '.join(map(str, formats))[:40]}"
    if how.get("pack_dtype") not in (None, "int32"):
        return f"pack_dtype={str(how['pack_dtype'])[:40]}"
    return None


def _check_awq(how: Mapping[str, Any]) -> str | None:
    for key, known in (("version", "gemm"), ("bits", 4), ("zero_point", True)):
        if how.get(key, known) != known:
            return f"{key}={str(how[key])[:40]}"
    return None


GPTQ = Scheme(_MARKS, lambda parts: (".weight", _Gptq(parts)), check=_check_gptq)
AWQ = Scheme(_MARKS, lambda parts: (".weight", _Awq(parts)), check=_check_awq)
