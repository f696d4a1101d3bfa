"""Memory for groups of tensors that is used again once nobody holds any of them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

__all__ = ["Buffers", "aligned", "bytes_of"]

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: a cache line, and the widest vector."""


class Buffers:
    """Pieces of memory of `size` bytes, made as they are needed and handed back by themselves.

    A piece is free again when the last tensor that shares it is gone, views and results that are
    views among them: whatever outlives its group keeps its memory, and nothing is read over it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[mmap.mmap] = []

    def take(self) -> tuple[Tensor, memoryview]:
        """A piece as a vector of bytes that belongs to its views, and as what files are read into
        (only while one of them is alive)."""
        memory = self._free.pop() if self._free else self._new()
        lease = (ctypes.c_char * self.size).from_buffer(memory)
        weakref.finalize(lease, self._hand_back, memory).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8), memoryview(memory)

    def _new(self) -> mmap.mmap:
        memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Filled for the first time, small pages take longer than the reading. A kernel may not
            # have large ones.
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _hand_back(self, memory: mmap.mmap) -> None:
        self._free.append(memory)


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes up in a piece."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor in the host's memory, which has to outlive the result."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
