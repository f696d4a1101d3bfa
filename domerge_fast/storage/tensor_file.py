"""A file of tensors: a header that says where they are, and their data, read on demand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .buffers import bytes_of
from .input_file import InputFile, Refuse

__all__ = ["TensorFile"]


class Part(Protocol):
    """A tensor in the file: `begin` is its byte offset in the data section."""

    begin: int
    nbytes: int


class TensorFile:
    """One file; every read is of the file that was opened first, unchanged, or an error."""

    def __init__(self, path: Path, refuse: Refuse) -> None:
        self.input = InputFile(path, refuse)
        self.start = 0
        """Where the data section begins, in bytes."""

    @property
    def path(self) -> Path:
        return self.input.path

    def read(self, begin: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The tensor that starts at byte ``begin`` of the data section, in memory of its own."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        with self.input.opened() as file:
            self.input.fill(file, [(self.start + begin, [bytes_of(tensor)])])
        return tensor

    def peek(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes (begin, count) of the data section, a few each: one call of the system a place."""
        with self.input.opened() as file:
            return [os.pread(file, count, self.start + begin) for begin, count in places]

    def read_parts(self, parts: Iterable[tuple[Part, int]], memory: memoryview) -> None:
        """Read tensors to their places in memory; neighbours in the file by one system call."""
        runs: list[tuple[int, list[memoryview]]] = []
        end = -1
        for x, at in sorted(parts, key=lambda part: part[0].begin):
            if x.begin != end:
                runs.append((self.start + x.begin, []))
            runs[-1][1].append(memory[at : at + x.nbytes])
            end = x.begin + x.nbytes
        with self.input.opened() as file:
            self.input.fill(file, runs)
