"""Writes a safetensors file tensor by tensor, so that none of them has to be kept.

The header stands before the data but names shapes that may not be known before the last tensor
is computed, so room for the longest possible header is left at the start and filled with spaces
(which the format allows). Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from . import flush
from .buffers import bytes_of
from .input_file import InputFile
from .lazy import LazyTensor, pieces
from .marker import MARK
from .safetensors_file import DTYPE_NAMES, METADATA

__all__ = ["SafetensorsWriter", "copy_file", "write", "write_tensor"]

_OURS = {"format": "pt"} | MARK

COPIED_BYTES = 1 << 30
"""Of a file beside the weights; the largest tokenizers have a hundredth of it."""


class SafetensorsWriter:
    """`largest` maps every key to the dtype and the largest shape its tensor may have. spare: bytes
    that are left for `describe`. placed: whether these are the shapes, so that every tensor has its
    place, in this order, from the start. attached: whether such a file is there already, begun by
    another process.

    Use as a context manager; the file is complete when the block ends without an error.
    """

    def __init__(
        self,
        path: Path,
        largest: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        spare: int = 0,
        placed: bool = False,
        attached: bool = False,
    ) -> None:
        end = sum(dtype.itemsize * math.prod(shape) for dtype, shape in largest.values())
        entries = [_entry(k, dtype, shape, end, end) for k, (dtype, shape) in largest.items()]
        self._metadata = _metadata(_OURS)
        room = len(_header(self._metadata, entries)) + spare
        self._room = room + (-room % 8)
        self._entries: list[str] = []
        self._end = 0
        self._places: dict[str, tuple[int, int]] = {}
        if placed:
            begins = [(key, self.reserve(key, *row), self._end) for key, row in largest.items()]
            self._places = {key: (begin, end - begin) for key, begin, end in begins}
        self._is_attached = attached
        self._file = FileIO(path, "r+" if attached else "w")
        self._file.seek(8 + self._room)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """What the file says of itself, beside our mark."""
        self._metadata = _metadata({**metadata, **_OURS})

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor; it is written before this returns."""
        self.put(self.reserve(key, tensor.dtype, tensor.shape), tensor)

    def add_pieces(self, key: str, tensor: LazyTensor) -> None:
        """Append a tensor that is read piece by piece."""
        at = self.reserve(key, tensor.dtype, tensor.shape)
        for piece in pieces(tensor):
            self.put(at, piece)
            at += piece.nbytes

    def reserve(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
        """Where a tensor begins that is put there in parts; what is not put is zeros."""
        if self._places:
            begin, nbytes = self._places[key]
            if nbytes != dtype.itemsize * math.prod(shape):
                raise AssertionError(f"{key} has another shape than was planned")
            return begin
        begin = self._end
        self._end = begin + dtype.itemsize * math.prod(shape)
        self._entries.append(_entry(key, dtype, shape, begin, self._end))
        return begin

    def put(self, at: int, tensor: Tensor) -> None:
        """Write a part of what was reserved; it is written before this returns."""
        self._file.seek(8 + self._room + at)
        write_tensor(self._file, tensor)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None and not self._is_attached:
                header = _header(self._metadata, self._entries).ljust(self._room)
                if len(header) > self._room:
                    raise AssertionError("more tensors were added than there is room for")
                self._file.truncate(8 + self._room + self._end)
                self._file.seek(0)
                write(self._file, self._room.to_bytes(8, "little"))
                write(self._file, header)


def write_tensor(file: FileIO, tensor: Tensor) -> None:
    """Write a tensor's elements, row-major, at the file's position."""
    tensor = tensor.detach().cpu().contiguous()
    write(file, bytes_of(tensor))


def write(file: FileIO, data: memoryview | bytes) -> None:
    """Write all of it: a system call may take less than it is given."""
    view = memoryview(data).cast("B")
    size = len(view)
    while view:
        view = view[file.write(view) :]
    end = file.tell()
    if end // flush.STEP_BYTES != (end - size) // flush.STEP_BYTES:
        flush.begin_flush(file)


def copy_file(file: InputFile, target: Path) -> None:
    """Write the bytes of a file to another, a piece at a time; refused above COPIED_BYTES."""
    with FileIO(target, "w") as copy:
        for data in file.chunks(COPIED_BYTES):
            write(copy, data)


def _entry(key: str, dtype: torch.dtype, shape: Sequence[int], start: int, end: int) -> str:
    """A tensor in the header, as JSON: a string is a tenth of what a dict of lists weighs."""
    place = f'"shape":[{",".join(map(str, shape))}],"data_offsets":[{start},{end}]'
    return f'{json.dumps(key)}:{{"dtype":"{DTYPE_NAMES[dtype]}",{place}}}'


def _metadata(texts: Mapping[str, str]) -> str:
    return f"{json.dumps(METADATA)}:{json.dumps(texts)}"


def _header(metadata: str, entries: Sequence[str]) -> bytes:
    return f"{{{','.join([metadata, *entries])}}}".encode()
