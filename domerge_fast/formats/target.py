"""What a merge is to be written as, whatever its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Kept, LazyTensor
from ..storage.input_file import InputFile
from .model.checkpoint import Checkpoint

__all__ = ["Layout", "Target"]


@dataclass(frozen=True)
class Layout:
    """How a merged module is stored: `inputs` is the stored shape of A without its rank, and
    `largest_rank` what its rank is at most."""

    name: str
    kind: str
    m: int
    inputs: tuple[int, ...]
    largest_rank: int

    def stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [k, n] and B [m, k] in the shapes of the files."""
        ones = (1,) * (len(self.inputs) - 1)
        return a.reshape(-1, *self.inputs), b.reshape(*b.shape, *ones)


@dataclass(frozen=True)
class Target:
    """What the merged adapter is written as: PEFT config fields that do not depend on ranks,
    the layout of every module, and what is kept of the tensors that adapters save whole. `inputs`
    are the folders of the adapters, which are never written to, `files` what was read of them;
    `copied` are files that are written as they are. `ragged`: whether every module is written with
    its own rank. base: the base model, where it was given."""

    config: Mapping[str, object]
    layouts: Mapping[str, Layout]
    whole: Kept
    dtype: torch.dtype
    inputs: frozenset[Path]
    files: tuple[InputFile, ...] = ()
    copied: tuple[InputFile, ...] = ()
    ragged: bool = False
    base: Checkpoint | None = None

    def check_inputs(self) -> None:
        """Raise AdapterError if a file of an adapter is not any more what it was when loaded."""
        for file in self.files:
            file.check()

    @property
    def carried(self) -> Mapping[str, LazyTensor]:
        """The tensors that are written whole, by the keys PEFT writes."""
        return self.whole.tensors

    @cached_property  # asked for with every module
    def rank(self) -> int | None:
        """The rank that every module is written with; None for its own."""
        largest = max(layout.largest_rank for layout in self.layouts.values())
        return None if self.ragged else largest
