"""A safetensors file: a strictly checked header, and tensors read from disk on demand.

The header is read once and by hand (8-byte length, JSON, data), because a file of 37,000 tensors
is then open in a fraction of a second. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DomergeError
from . import json_file
from .buffers import Buffers, Lying, Matrix, aligned, as_tensor
from .input_file import Refuse
from .lazy import Columns, LazyTensor, MemoryTensor, Rows, Turned, apart
from .tensor_file import TensorFile

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "METADATA",
    "FileTensor",
    "SafetensorsFile",
    "block",
    "group_bytes",
    "matrix",
    "read_group",
]

METADATA = "__metadata__"
"""What a header has beside its tensors, if anything: a map of texts."""

DTYPES = {
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
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = json_file.INDEX_BYTES  # the limit of the safetensors library itself
_MOST_DIMENSIONS = 64
_MOST_BYTES = 2**63 - 1  # sizes and strides of torch are int64
_AGAIN = "download or save the adapter again"


class SafetensorsFile(TensorFile):
    def __init__(self, path: Path, refuse: Refuse) -> None:
        super().__init__(path, refuse)
        self.metadata: dict[str, str] = {}
        """What the file says of itself, once `tensors` has read it."""

    def tensors(self) -> dict[str, FileTensor]:
        """The tensors by key. The file does not hold on to them, because they do to the file.

        Refuses a file that cannot be read, is truncated, or has a header that is not exactly what
        the format allows.
        """
        with self.input.opened() as file:
            header = self._read_header(file)
        return self._check_entries(header)

    def head(self) -> bytes:
        """What stands before the data section."""
        data = bytearray(self.start)
        with self.input.opened() as file:
            self.input.fill(file, [(0, [memoryview(data)])])
        return bytes(data)

    def _read_header(self, file: int) -> dict[str, Any]:
        size = self.input.size
        start = bytearray(min(8, size))
        self.input.fill(file, [(0, [memoryview(start)])])
        if start == b"version ":
            raise self._error("is a git-lfs pointer, not the weights", "run 'git lfs pull'")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise self._error("is truncated or no safetensors file", _AGAIN)
        if length > _MAX_HEADER:
            raise self._error(f"has a header of {length} bytes, too long to be real", _AGAIN)
        data = bytearray(length)
        self.input.fill(file, [(8, [memoryview(data)])])
        self.start = 8 + length
        return self._parse(bytes(data))

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            header = json_file.parse(data)
        except json_file.BadJson as error:
            raise self._error(f"has a corrupt header ({error})", _AGAIN) from error
        if not isinstance(header, dict):
            raise self._error("has a corrupt header (not a JSON object)", _AGAIN)
        if data[:1] != b"{":
            raise self._error("has a corrupt header (it does not begin with '{')", _AGAIN)
        return header

    def _check_entries(self, header: dict[str, Any]) -> dict[str, FileTensor]:
        self._check_metadata(header.pop(METADATA, None))
        tensors = {key: self._entry(key, entry) for key, entry in header.items()}
        position = 0
        by_place = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes))
        for key, tensor in by_place:
            if tensor.begin != position:
                raise self._error(f"has a gap or an overlap in its data before {key!r}", _AGAIN)
            position = tensor.begin + tensor.nbytes
        present = self.input.size - self.start
        if position > present:
            problem = f"is truncated: its header promises {position} bytes of data, {present} exist"
            raise self._error(problem, _AGAIN)
        if position < present:
            raise self._error(f"has {present - position} bytes no tensor owns", _AGAIN)
        return tensors

    def _check_metadata(self, metadata: Any) -> None:
        if metadata is None:
            return
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            raise self._error(f"has a {METADATA} that is no map of texts", _AGAIN)
        self.metadata = metadata

    def _entry(self, key: str, entry: Any) -> FileTensor:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._error(f"describes tensor {key!r} wrongly", _AGAIN) from error
        sizes = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
        if not sizes or not _are_sizes(*shape, begin, end):
            raise self._error(f"gives tensor {key!r} an impossible shape or place", _AGAIN)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            problem = f"stores tensor {key!r} as unknown dtype {dtype!r}"
            raise self._error(problem, "save it as float32, float16 or bfloat16")
        torch_dtype = DTYPES[dtype]
        nbytes = math.prod(shape) * torch_dtype.itemsize
        if end - begin != nbytes:
            problem = f"gives tensor {key!r} {end - begin} bytes where its shape needs {nbytes}"
            raise self._error(problem, _AGAIN)
        if not nbytes and _overflows(shape, torch_dtype):
            raise self._error(f"gives tensor {key!r} an impossible shape or place", _AGAIN)
        return FileTensor(self, torch_dtype, tuple(shape), begin, nbytes)

    def _error(self, problem: str, remedy: str) -> DomergeError:
        return self.input.refuse(f"{self.path.name} {problem}", remedy)


@dataclass(slots=True, eq=False)  # not frozen: that would double the time to load 37,000 of them
class FileTensor:
    """A tensor in a safetensors file; ``begin`` is its byte offset in the data section."""

    file: TensorFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def __reduce__(self) -> tuple[type[FileTensor], tuple[object, ...]]:
        """By its fields alone: faster than a dataclass by itself, where there are thousands."""
        return FileTensor, (self.file, self.dtype, self.shape, self.begin, self.nbytes)

    def read(self) -> torch.Tensor:
        return self.file.read(self.begin, self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        begin = self.begin + self.nbytes // self.shape[0] * start
        return self.file.read(begin, self.dtype, (stop - start, *self.shape[1:]))


def block(x: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Some rows of a tensor as a tensor of their own: of a file they stay there, and what is made
    of others is not made before they are read."""
    if isinstance(x, Columns):
        return Columns(block(x.whole, start, stop), x.index, x.count)
    if isinstance(x, (MemoryTensor, Turned)):
        return MemoryTensor(x.read()[start:stop])
    if not isinstance(x, FileTensor):
        return Rows(x, start, stop)
    row = x.nbytes // x.shape[0]
    shape = (stop - start, *x.shape[1:])
    return FileTensor(x.file, x.dtype, shape, x.begin + row * start, row * (stop - start))


def matrix(x: LazyTensor, index: int) -> LazyTensor:
    """One of the matrices of a tensor of three dimensions: of a file it stays there."""
    if not isinstance(x, FileTensor):
        return MemoryTensor(x.rows(index, index + 1)[0])
    size = x.nbytes // x.shape[0]
    return FileTensor(x.file, x.dtype, x.shape[1:], x.begin + size * index, size)


def group_bytes(wanted: Iterable[LazyTensor]) -> int:
    """What `read_group` needs of a buffer for these tensors."""
    return sum(_rooms(wanted))


def read_group(wanted: Sequence[LazyTensor | torch.Tensor], buffers: Buffers) -> list[Matrix]:
    """Factors as matrices [shape[0], the rest]: those of files in one buffer, every file opened
    once and read from front to back; those in memory as they are. A matrix of which `Columns` are
    wanted is read once, also if the group before had others of it. What is `Turned` is a view of
    what is stored; all else is row-major."""
    stored = [x.whole if type(x) is Turned else x for x in wanted]
    found = _read_group(stored, buffers)
    return [as_tensor(x).T if type(w) is Turned else x for x, w in zip(found, wanted)]


def _read_group(wanted: Sequence[LazyTensor | torch.Tensor], buffers: Buffers) -> list[Matrix]:
    places = list(itertools.accumulate(_rooms(wanted), initial=0))
    buffers.apart = _apart(wanted, buffers.apart)
    if not places[-1]:
        return [_in_memory(x, buffers) for x in wanted]
    in_files: dict[TensorFile, list[tuple[FileTensor, int]]] = defaultdict(list)
    for x, at in zip(wanted, places):
        if isinstance(x, FileTensor):
            in_files[x.file].append((x, at))
    whole, memory = buffers.take()
    for file, parts in in_files.items():
        file.read_parts(parts, memory)
    dtypes = {x.dtype for x in wanted if isinstance(x, FileTensor)}
    views, first = {dtype: whole.view(dtype) for dtype in dtypes}, whole.data_ptr()
    return [
        Lying(views[x.dtype], first + at, at // x.dtype.itemsize, _flat(x.shape))
        if isinstance(x, FileTensor)
        else _in_memory(x, buffers)
        for x, at in zip(wanted, places)
    ]


def _rooms(wanted: Iterable[LazyTensor | torch.Tensor]) -> list[int]:
    """What each takes of a buffer."""
    # Asked of every factor of a merge: `type` is no call.
    stored = [x.whole if type(x) is Turned else x for x in wanted]
    return [aligned(x.nbytes) if type(x) is FileTensor else 0 for x in stored]


def _apart(
    wanted: Sequence[LazyTensor | torch.Tensor], known: Mapping[object, torch.Tensor]
) -> dict[object, torch.Tensor]:
    """The columns of all matrices of which some are wanted."""
    found: dict[object, torch.Tensor] = {}
    for x in wanted:
        if isinstance(x, Columns) and (key := _matrix_of(x)) not in found:
            old = known.get(key)
            found[key] = apart(x.whole.read(), x.count) if old is None else old
    return found


def _matrix_of(x: Columns) -> object:
    """What columns of one matrix have in common: of a file, it may be known by several objects."""
    if isinstance(x.whole, FileTensor):
        return x.whole.file, x.whole.begin, x.whole.nbytes
    return x.whole


def _in_memory(x: LazyTensor | torch.Tensor, buffers: Buffers) -> torch.Tensor:
    if isinstance(x, Columns):
        return buffers.apart[_matrix_of(x)][x.index]
    # Detached only where that is needed: it takes as long as all else.
    x = x.tensor if isinstance(x, MemoryTensor) else x
    tensor = x if isinstance(x, torch.Tensor) else x.read()
    if tensor.requires_grad:
        tensor = tensor.detach()
    plain = tensor.ndim == 2 and tensor.is_contiguous()
    return tensor if plain else tensor.flatten(1).contiguous()


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a tensor as a matrix."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], math.prod(shape[1:]))


def _are_sizes(*values: Any) -> bool:
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _MOST_BYTES


def _overflows(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether torch could not even stride over a tensor without elements."""
    return math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MOST_BYTES
