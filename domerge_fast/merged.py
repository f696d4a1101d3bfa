"""Merged modules, and the adapter they make."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapter, LazyTensor, load
from .errors import OptionError
from .options import suggest
from .report import Report


@dataclass(frozen=True)
class Layout:
    """How a merged module is stored: `inputs` is the stored shape of A without its rank."""

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
    the layout of every module, and the tensors that are carried along unchanged. `inputs` are the
    folders of the adapters, which are never written to."""

    config: Mapping[str, object]
    layouts: Mapping[str, Layout]
    carried: Mapping[str, LazyTensor]
    dtype: torch.dtype
    inputs: frozenset[Path]


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged adapter. `pairs` holds A [R, n] and B [m, R] of every module, or nothing where
    the merge was streamed to `path`."""

    report: Report
    target: Target
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    path: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The merged modules, in order."""
        return tuple(self.report.modules)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [R, n] and B [m, R] with ΔW = B A, in the output dtype; scaling is 1.

        Read from the written file where the merge was streamed. OptionError for an unknown name.
        """
        if name not in self.report.modules:
            problem = f"no merged module is called {name!r}"
            raise OptionError("name", problem, suggest(name, self.names))
        if self.path is None:
            return self.pairs[name]
        return self._written.factors(name)

    @cached_property
    def _written(self) -> Adapter:
        if self.path is None:
            raise AttributeError("this merge is in memory")
        return load(self.path)

    def delta(self, name: str) -> Tensor:
        """ΔW = B A [m, n] in float32, out x in whatever way the base stores its weight."""
        a, b = self.factors(name)
        return b.float() @ a.float()

    def save(self, output: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a PEFT adapter folder: whole or not at all. OutputError if it cannot be."""
        from .outputs.peft import PeftFolder

        with PeftFolder(Path(output), self.target, overwrite) as folder:
            for name in self.names:
                folder.add(name, *self.factors(name))
            folder.finish(self.report)
