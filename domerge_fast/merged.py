"""Merged modules, and the adapter they make."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from . import precision
from .adapters import Adapter, Kept, LazyTensor, load
from .errors import OptionError
from .options import suggest
from .report import Report
from .storage.input_file import InputFile


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
    its own rank."""

    config: Mapping[str, object]
    layouts: Mapping[str, Layout]
    whole: Kept
    dtype: torch.dtype
    inputs: frozenset[Path]
    files: tuple[InputFile, ...] = ()
    copied: tuple[InputFile, ...] = ()
    ragged: bool = False

    def check_inputs(self) -> None:
        """Raise AdapterError if a file of an adapter is not any more what it was when loaded."""
        for file in self.files:
            file.check()

    @property
    def carried(self) -> Mapping[str, LazyTensor]:
        """The tensors that are written whole, by the keys PEFT writes."""
        return self.whole.tensors

    @property
    def rank(self) -> int | None:
        """The rank that every module is written with; None for its own."""
        largest = max(layout.largest_rank for layout in self.layouts.values())
        return None if self.ragged else largest


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge. `results` holds A [R, n] and B [m, R] of every module, or ΔW [m, n] alone where it
    was kept dense, or nothing where the merge was streamed to `path`. R is the module's own rank;
    files are padded to one rank (outputs/peft.py)."""

    report: Report
    target: Target
    results: Mapping[str, tuple[Tensor, ...]]
    path: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The merged modules, in order."""
        return tuple(self.report.modules)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [R, n] and B [m, R] with ΔW = B A, in the output dtype; scaling is 1.

        Read from the written file where the merge was streamed. OptionError for an unknown name,
        or a merge of another form than "adapter".
        """
        self._check(name)
        if self._form != "adapter":
            problem = f"the merge has the form {self._form!r}, which has no factors"
            raise OptionError("form", problem, "merge with form='adapter'")
        if self.path is None:
            a, b = self.results[name]
            return a, b
        return self._written.factors(name)

    @property
    def _form(self) -> str:
        return str(self.report.options.get("form", "adapter"))

    def _check(self, name: str) -> None:
        if name not in self.report.modules:
            problem = f"no merged module is called {name!r}"
            raise OptionError("name", problem, suggest(name, self.names))

    @cached_property
    def _written(self) -> Adapter:
        if self.path is None:
            raise AttributeError("this merge is in memory")
        return load(self.path)

    def delta(self, name: str) -> Tensor:
        """ΔW = B A [m, n] in float32, out x in whatever way the base stores its weight.

        DomergeError where float32 holds the factors but not their product.
        """
        self._check(name)
        if self._form == "deltas" and self.path is None:
            return self.results[name][0]
        a, b = self.factors(name)
        return precision.product(name, a, b)

    def save(
        self, output: str | os.PathLike[str], overwrite: bool = False, force: bool = False
    ) -> None:
        """Write the folder of the merge's form, a PEFT adapter or dense deltas: whole or not at
        all. overwrite, force: as for `merge`. OutputError if it cannot be."""
        from .outputs.deltas import DeltaFolder
        from .outputs.peft import PeftFolder

        if self._form == "deltas":
            with DeltaFolder(Path(output), self.target, overwrite, force) as deltas:
                for name in self.names:
                    deltas.add(name, self.delta(name))
                deltas.finish(self.report)
            return
        with PeftFolder(Path(output), self.target, overwrite, force) as folder:
            for name in self.names:
                folder.add(name, *self.factors(name))
            folder.finish(self.report)
