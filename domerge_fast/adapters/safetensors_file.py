"""A safetensors file: a strictly checked header, and tensors mapped from disk on demand.

The header is read once and by hand (8-byte length, JSON, data), because a file of 37,000 tensors
is then open in a fraction of a second. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import AdapterError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_AGAIN = "download or save the adapter again"


class SafetensorsFile:
    """One file, mapped as a whole at the first read and unmapped by ``release`` (once no tensor
    that was read from it is alive). Mapping keeps no file descriptor, so thousands of files can be
    open at once.
    """

    def __init__(self, path: Path, adapter: str):
        self.path = path
        self._adapter = adapter
        self._state = (0, 0)
        self._data = 0
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def tensors(self) -> dict[str, FileTensor]:
        """The tensors by key. The file does not hold on to them, because they do to the file.

        Raises AdapterError if the file cannot be read, is truncated, or has a header that is not
        exactly what the format allows.
        """
        try:
            with self.path.open("rb") as stream:
                self._state = _state(os.fstat(stream.fileno()))
                header, self._data = self._read_header(stream)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})", "check the file") from error
        return self._check_entries(header)

    def read(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor that starts at byte ``begin`` of the data section: mapped, not copied."""
        begin += self._data
        if begin % dtype.itemsize:
            # Old writers did not pad the header, and torch cannot view unaligned elements.
            size = math.prod(shape) * dtype.itemsize
            return self._view(torch.uint8)[begin : begin + size].clone().view(dtype).view(shape)
        # One call: slicing and reshaping instead costs three times as much for small factors.
        return self._view(dtype).as_strided(shape, _strides(shape), begin // dtype.itemsize)

    def peek(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes (begin, count) of the data section, a few each: one call of the system a place."""
        try:
            with self.path.open("rb", buffering=0) as stream:
                if _state(os.fstat(stream.fileno())) != self._state:
                    raise self._error("changed since it was loaded", "load the adapter again")
                file, data = stream.fileno(), self._data
                return [os.pread(file, count, data + begin) for begin, count in places]
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})", "check the file") from error

    def release(self) -> None:
        """Let go of the mapping; the next read maps again (about 10 us)."""
        self._views = {}

    def _view(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole file as a vector of one dtype."""
        views = self._views
        if torch.uint8 not in views:
            views[torch.uint8] = self._map()
        if dtype not in views:
            whole = views[torch.uint8]
            views[dtype] = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
        return views[dtype]

    def _map(self) -> torch.Tensor:
        try:
            if _state(self.path.stat()) != self._state:
                raise self._error("changed since it was loaded", "load the adapter again")
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})", "check the file") from error
        return torch.from_file(str(self.path), False, self._state[0], dtype=torch.uint8)

    def _read_header(self, stream: BinaryIO) -> tuple[dict[str, Any], int]:
        size = self._state[0]
        start = stream.read(8)
        if start == b"version ":
            raise self._error("is a git-lfs pointer, not the weights", "run 'git lfs pull'")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise self._error("is truncated or no safetensors file", _AGAIN)
        if length > _MAX_HEADER:
            raise self._error(f"has a header of {length} bytes, too long to be real", _AGAIN)
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        except ValueError as error:
            raise self._error(f"has a corrupt header ({error})", _AGAIN) from error
        if not isinstance(header, dict):
            raise self._error("has a corrupt header (not a JSON object)", _AGAIN)
        return header, 8 + length

    def _check_entries(self, header: dict[str, Any]) -> dict[str, FileTensor]:
        header.pop("__metadata__", None)
        tensors = {key: self._entry(key, entry) for key, entry in header.items()}
        position = 0
        by_place = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes))
        for key, tensor in by_place:
            if tensor.begin != position:
                raise self._error(f"has a gap or an overlap in its data before {key!r}", _AGAIN)
            position = tensor.begin + tensor.nbytes
        present = self._state[0] - self._data
        if position > present:
            problem = f"is truncated: its header promises {position} bytes of data, {present} exist"
            raise self._error(problem, _AGAIN)
        if position < present:
            raise self._error(f"has {present - position} bytes no tensor owns", _AGAIN)
        return tensors

    def _entry(self, key: str, entry: Any) -> FileTensor:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._error(f"describes tensor {key!r} wrongly", _AGAIN) from error
        if not isinstance(shape, list) or not _are_sizes(*shape, begin, end):
            raise self._error(f"gives tensor {key!r} an impossible shape or place", _AGAIN)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            problem = f"stores tensor {key!r} as unknown dtype {dtype!r}"
            raise self._error(problem, "save it as float32, float16 or bfloat16")
        torch_dtype = _DTYPES[dtype]
        nbytes = math.prod(shape) * torch_dtype.itemsize
        if end - begin != nbytes:
            problem = f"gives tensor {key!r} {end - begin} bytes where its shape needs {nbytes}"
            raise self._error(problem, _AGAIN)
        return FileTensor(self, torch_dtype, tuple(shape), begin, nbytes)

    def _error(self, problem: str, remedy: str) -> AdapterError:
        return AdapterError(self._adapter, None, f"{self.path.name} {problem}", remedy)


@dataclass(slots=True, eq=False)  # not frozen: that would double the time to load 37,000 of them
class FileTensor:
    """A tensor in a safetensors file; ``begin`` is its byte offset in the data section."""

    file: SafetensorsFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def read(self) -> torch.Tensor:
        return self.file.read(self.begin, self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        before = self.nbytes // self.shape[0] * start
        return self.file.read(self.begin + before, self.dtype, (stop - start, *self.shape[1:]))


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _are_sizes(*values: Any) -> bool:
    return set(map(type, values)) == {int} and min(values) >= 0


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return tuple(strides)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result
