"""A weight that is stored quantized, as the numbers it stands for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ....storage.lazy import dtype_name
from ....storage.safetensors_file import FileTensor
from ....storage.tensor_file import TensorFile
from ..checkpoint import AGAIN, Checkpoint, refusal

__all__ = ["Dequantized", "Parts", "Scheme", "columns", "unpacked"]


class Dequantized(ABC):
    """In float32, computed whenever it is read; nothing is kept.

    place: the stored tensor whose file and order it has when it is written, as `written`. nbytes:
    as written.
    """

    def __init__(self, place: FileTensor, shape: tuple[int, ...], written: torch.dtype) -> None:
        self._place, self.shape, self.written = place, shape, written

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        return self.written.itemsize * math.prod(self.shape)

    @property
    def file(self) -> TensorFile:
        return self._place.file

    @property
    def begin(self) -> int:
        return self._place.begin

    def read(self) -> Tensor:
        return self.rows(0, self.shape[0])

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows; of the files, little more than their part is read."""


@dataclass(frozen=True)
class Parts:
    """What is stored of a quantized weight: tensors by what follows `stem` in their names. how: of
    the quantization, in config.json. written: the dtype that the weight is to have."""

    base: Checkpoint
    stem: str
    tensors: Mapping[str, FileTensor]
    how: Mapping[str, Any]
    written: torch.dtype

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def of(
        self, suffix: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None
    ) -> FileTensor:
        """OptionError unless it is there, in one of these dtypes, and in the shape if one is
        given."""
        found = self.tensors.get(suffix)
        if found is None:
            self.refuse(f"has no {self.stem + suffix!r}, which its quantized weight needs")
        if found.dtype not in dtypes or (shape is not None and found.shape != shape):
            stored = f"{dtype_name(found.dtype)} {list(found.shape)}"
            self.refuse(f"stores {self.stem + suffix!r} as {stored}, which its weight cannot have")
        return found

    def refuse(self, problem: str, remedy: str = AGAIN) -> NoReturn:
        raise refusal(self.base.folder, problem, remedy)


@dataclass(frozen=True)
class Scheme:
    """A way of quantizing. marks: suffixes by which a weight is known, each with all suffixes that
    its parts have. beside: last names of what serves activations only, or only training, and is
    dropped. read: the weight's own suffix, and it; OptionError for what is damaged or not known.
    check: what is wrong with what config.json says, if anything is."""

    marks: Mapping[str, tuple[str, ...]]
    read: Callable[[Parts], tuple[str, Dequantized]]
    beside: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], str | None] = lambda how: None


def columns(x: FileTensor, start: int, stop: int) -> Tensor:
    """Columns of a stored matrix [m, stop - start]; nothing else is read."""
    size, (rows, width) = x.dtype.itemsize, x.shape
    first, nbytes = x.begin + size * start, size * (stop - start)
    places = [(first + size * width * row, nbytes) for row in range(rows)]
    data = bytearray(b"".join(x.file.peek(places)))
    return torch.frombuffer(data, dtype=x.dtype).reshape(rows, stop - start)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers of 2, 4 or 8 bits in a matrix of integers [p, q], the lowest bits of an
    integer first: [p, q k] of uint8."""
    # Of one column, a transpose counts as contiguous, and cannot be seen as bytes.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return data
    mask = (1 << bits) - 1
    apart = [(data >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(apart, -1).flatten(1)
