"""Memory for groups of tensors that is used again once nobody holds any of them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .. import _C

__all__ = [
    "Buffers",
    "InTurn",
    "Lying",
    "Matrix",
    "Pieces",
    "Run",
    "aligned",
    "are_row_major",
    "as_tensor",
    "bytes_of",
    "packed",
    "places",
    "spread",
]

EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
"""What tells in C where tensors lie; None of older versions of torch."""

Run = tuple[int, int, int]
"""Numbers at equal distances: the first, the distance, and how many."""

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: a cache line, and the widest vector."""


HUGE_BITS = 21
"""Pieces are made of whole huge pages, and larger ones of whole eighths of a power of two, so that
those for one group serve the next."""


class Pieces:
    """Pieces of memory, made as they are needed and handed back by themselves.

    A piece is free again when the last tensor that shares it is gone, views and results that are
    views among them: whatever outlives its group keeps its memory, and nothing is put over it.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, nbytes: int) -> tuple[Tensor, memoryview]:
        """A piece of at least so many bytes as a vector of bytes that belongs to its views, and as
        what files are read into (only while one of them is alive)."""
        memory = self._fitting(nbytes)
        lease = (ctypes.c_char * len(memory)).from_buffer(memory)
        weakref.finalize(lease, self._hand_back, memory).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8), memoryview(memory)

    def _fitting(self, nbytes: int) -> mmap.mmap:
        """A free piece of that size or up to twice as large; or a new one, and then the free ones,
        of sizes that are not asked for any more, are given up."""
        step = 1 << max(HUGE_BITS, nbytes.bit_length() - 3)
        nbytes = -(-nbytes // step) * step
        fitting = [memory for memory in self._free if nbytes <= len(memory) <= 2 * nbytes]
        if not fitting:
            self._free.clear()
            return self._new(nbytes)
        found = min(fitting, key=len)
        self._free.remove(found)
        return found

    def _new(self, nbytes: int) -> mmap.mmap:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Filled for the first time, small pages take longer than the reading. A kernel may not
            # have large ones.
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _hand_back(self, memory: mmap.mmap) -> None:
        self._free.append(memory)


class Lying(NamedTuple):
    """A row-major matrix in a piece of memory, of which a tensor is made only if somebody asks for
    one: that takes a hundred times as long as to say where it lies. memory: the piece as a vector
    of the dtype. at: where the matrix begins in it, in elements."""

    memory: Tensor
    address: int
    at: int
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return True

    def tensor(self) -> Tensor:
        # One call: slicing and reshaping instead costs three times as much for small factors.
        return self.memory.as_strided(self.shape, (self.shape[1], 1), self.at)


Matrix = Tensor | Lying


def as_tensor(x: Matrix) -> Tensor:
    """As a tensor, without gradients."""
    if isinstance(x, Lying):
        return x.tensor()
    return x.detach() if x.requires_grad else x


class InTurn(Sequence[Any]):
    """What several lists have at some positions, of one position after the other. at: int64."""

    def __init__(self, columns: Sequence[list[Any]], at: bytes) -> None:
        self.columns, self.at = columns, at
        self._at = memoryview(at).cast("q")

    @overload
    def __getitem__(self, k: int) -> Any: ...
    @overload
    def __getitem__(self, k: slice) -> list[Any]: ...
    def __getitem__(self, k: int | slice) -> Any:
        width = len(self.columns)
        places = range(width * len(self._at))[k]
        if isinstance(places, int):
            position, column = divmod(places, width)
            return self.columns[column][self._at[position]]
        assert places.step == 1
        begin, end = places.start // width, -(-places.stop // width)
        rows = [column[at] for at in self._at[begin:end] for column in self.columns]
        return rows[places.start % width :][: len(places)]

    def __iter__(self) -> Iterator[Any]:
        rows = (map(column.__getitem__, self._at) for column in self.columns)
        return itertools.chain.from_iterable(zip(*rows))

    def __len__(self) -> int:
        return len(self.columns) * len(self._at)


def places(matrices: Sequence[Matrix], width: int) -> bytes | None:
    """Where row-major matrices without gaps begin, as `packed`; None unless all are such, on one
    device, and each has the dtype and the shape of the one `width` before it."""
    if EXCHANGE and (found := _asked_in_c(matrices, width)) is not None:
        return found
    dtypes, shapes = ([getattr(x, name) for x in matrices] for name in ("dtype", "shape"))
    times = len(matrices) // width
    if (
        not all(len(shape) == 2 for shape in shapes[:width])
        or dtypes != dtypes[:width] * times
        or shapes != shapes[:width] * times
        or not all(x.is_contiguous() for x in matrices)
        or len({x.device for x in matrices}) > 1
    ):
        return None
    return packed([x.data_ptr() for x in matrices])


def are_row_major(tensors: Sequence[Tensor]) -> bool:
    """Whether all are row-major matrices without gaps."""
    if EXCHANGE:
        return _asked_in_c(tensors, 0) is not None
    return {(x.dim(), x.is_contiguous()) for x in tensors} == {(2, True)}


def _asked_in_c(matrices: Sequence[Matrix], width: int) -> bytes | None:
    types = Tensor, torch.nn.Parameter
    if isinstance(matrices, InTurn):
        return _C.places_in_turn(EXCHANGE, types, matrices.columns, matrices.at)
    return _C.places(EXCHANGE, types, list(matrices), width)


def packed(addresses: Sequence[int]) -> bytes:
    """As kernels are handed them."""
    return struct.pack(f"={len(addresses)}Q", *addresses)


def spread(runs: Sequence[Run], inner: Sequence[int] = (0,)) -> bytes:
    """The numbers of one run after the other, each with all of `inner` added to it, as
    `packed`."""
    return _C.spread(runs, inner)


class Buffers:
    """What groups of tensors are read into: pieces of at least `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.apart: dict[object, Tensor] = {}
        """Matrices in columns, of the last group (see `read_group`)."""
        self._pieces = Pieces()

    def take(self) -> tuple[Tensor, memoryview]:
        """One of `Pieces`."""
        return self._pieces.take(self.size)


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes up in a piece."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor in the host's memory, which has to outlive the result."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
