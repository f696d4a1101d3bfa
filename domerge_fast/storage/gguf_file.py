"""A GGUF file: a strictly checked header, and tensors read from disk on demand.

It is read by hand and within bounds, as the safetensors header is: it comes from anywhere, and is
neither mapped nor trusted. Read are little-endian files of the versions 2 and 3. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import DomergeError
from . import json_file
from .input_file import InputFile, Refuse
from .safetensors_file import FileTensor
from .tensor_file import TensorFile

__all__ = ["ALIGNMENT", "DTYPES", "MAGIC", "GgufFile"]

MAGIC = b"GGUF"
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""By the numbers that GGML has for them."""

ALIGNMENT = 32
"""Bytes; where a file states no other, every tensor begins at a multiple."""

_VERSIONS = (2, 3)
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_TEXT, _ARRAY = 8, 9
_MOST_ALIGNMENT = 1 << 16
_MOST_HEADER = json_file.INDEX_BYTES
_MOST_DIMENSIONS = 4
_LEAST_PAIR = 13
"""Bytes of a key and its value, or of a tensor, at least."""
_AGAIN = "download or convert it again"


@dataclass(frozen=True)
class _Info:
    """A tensor as the header has it: dimensions from the innermost one, GGML's number for the type,
    and the byte of the data section where it begins."""

    dimensions: tuple[int, ...]
    kind: int
    begin: int


class _Damaged(ValueError):
    """``str(error)`` says in a few words what is wrong."""


class GgufFile(TensorFile):
    """metadata: what the file says of itself, once `read_header` has run; arrays are tuples."""

    def __init__(self, path: Path, refuse: Refuse) -> None:
        super().__init__(path, refuse)
        self.metadata: Mapping[str, object] = {}
        self._infos: dict[str, _Info] = {}
        self._alignment = ALIGNMENT

    def read_header(self) -> None:
        """Refuses a file that cannot be read, or whose header is not what the format allows."""
        with self.input.opened() as file:
            try:
                self._read(_Cursor(self.input, file))
            except _Damaged as error:
                raise self._error(str(error)) from error

    def tensors(self) -> dict[str, FileTensor]:
        """The tensors by name, after `read_header`. Refuses types that are not float, and places
        that overlap, are not aligned or lie outside."""
        found = {name: self._tensor(name, info) for name, info in self._infos.items()}
        end = 0
        for name, x in sorted(found.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if not end <= x.begin < end + self._alignment:
                raise self._error(f"has a gap or an overlap in its data before {name!r}")
            end = x.begin + x.nbytes
        present = self.input.size - self.start
        if end > present:
            problem = f"is truncated: its header promises {end} bytes of data, {present} exist"
            raise self._error(problem)
        if present >= end + self._alignment:
            raise self._error(f"has {present - end} bytes no tensor owns")
        return found

    def _tensor(self, name: str, info: _Info) -> FileTensor:
        if info.kind not in DTYPES:
            problem = f"stores tensor {name!r} as GGML's type {info.kind}, not f32, f16 or bf16"
            raise self._error(problem, "convert it to one of these")
        if info.begin % self._alignment:
            raise self._error(f"gives tensor {name!r} a place that is not aligned")
        dtype, shape = DTYPES[info.kind], info.dimensions[::-1]
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self.input.size:
            raise self._error(f"is truncated: tensor {name!r} alone has {nbytes} bytes")
        return FileTensor(self, dtype, shape, info.begin, nbytes)

    def _read(self, cursor: _Cursor) -> None:
        if cursor.bytes(4) != MAGIC:
            raise _Damaged("is no GGUF file")
        if (version := cursor.number("I")) not in _VERSIONS:
            raise _Damaged(f"has the version {version}, not 2 or 3, or another order of bytes")
        tensors, pairs = cursor.count(), cursor.count()
        metadata: dict[str, object] = {}
        infos: dict[str, _Info] = {}
        for _ in range(pairs):
            key = cursor.text()
            if key in metadata:
                raise _Damaged(f"says {key!r} twice")
            metadata[key] = cursor.value(cursor.number("I"))
        for _ in range(tensors):
            name = cursor.text()
            if name in infos:
                raise _Damaged(f"has tensor {name!r} twice")
            infos[name] = cursor.info(name)
        self.metadata, self._infos = metadata, infos
        self._alignment = _alignment(metadata)
        self.start = -(-cursor.at // self._alignment) * self._alignment

    def _error(self, problem: str, remedy: str = _AGAIN) -> DomergeError:
        return self.input.refuse(f"{self.path.name} {problem}", remedy)


def _alignment(metadata: Mapping[str, object]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if type(found) is not int or not 8 <= found <= _MOST_ALIGNMENT or found & (found - 1):
        raise _Damaged(f"has the alignment {str(found)[:40]}")
    return found


class _Cursor:
    """A place in the header of an opened file, which is read a stretch at a time."""

    def __init__(self, input: InputFile, file: int) -> None:
        self._input, self._file = input, file
        self._most = min(input.size, _MOST_HEADER)
        self._data = bytearray()
        self.at = 0

    def bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > self._most:
            raise _Damaged("is truncated, or has a header that is too long to be real")
        if end > len(self._data):
            self._extend(end)
        found = bytes(self._data[self.at : end])
        self.at = end
        return found

    def _extend(self, end: int) -> None:
        begin = len(self._data)
        more = bytearray(min(self._most, max(end, 2 * begin, 1 << 16)) - begin)
        self._input.fill(self._file, [(begin, [memoryview(more)])])
        self._data += more

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def count(self) -> int:
        """Of pairs or tensors that are still to come."""
        found = self.number("Q")
        if found * _LEAST_PAIR > self._most:
            raise _Damaged(f"counts {found} entries, more than it has room for")
        return found

    def text(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged("has a text that is not UTF-8") from error

    def value(self, kind: int) -> object:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise _Damaged(f"has a value of the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self) -> tuple[object, ...]:
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT and 8 * count <= self._most:
            return tuple([self.text() for _ in range(count)])
        if kind not in _NUMBERS or count > self._most:
            raise _Damaged("has an array of arrays, or of what is not known, or too long a one")
        return struct.unpack(f"<{count}{_NUMBERS[kind]}", self.bytes(count * _size(kind)))

    def info(self, name: str) -> _Info:
        dimensions = self.number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise _Damaged(f"gives tensor {name!r} {dimensions} dimensions")
        sizes = tuple([self.number("Q") for _ in range(dimensions)])
        if math.prod(max(size, 1) for size in sizes) * 8 > 2**63 - 1:
            raise _Damaged(f"gives tensor {name!r} an impossible shape")
        return _Info(sizes, self.number("I"), self.number("Q"))


def _size(kind: int) -> int:
    return struct.calcsize(f"<{_NUMBERS[kind]}")
