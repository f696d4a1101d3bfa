"""What a user holds of a merge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .adapters import Adapter
from .adapters.adapter import called
from .algebra import powers
from .errors import AdapterError, OptionError
from .formats import load
from .formats.choose import asked_for
from .formats.format import Format
from .formats.names.refit import Refit, back
from .formats.target import Target
from .options import folder, suggest
from .recipe import Input
from .results.report import Report
from .storage.digests import sha256

__all__ = ["Merged", "Results"]


class Results(Mapping[str, tuple[Tensor, ...]]):
    """What a merge made of every module, by name and in this order. The modules of a batch are in
    one piece of memory, and each one's tensors are made when they are asked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._batches: list[tuple[Sequence[str], tuple[Tensor, ...]]] = []

    def add(self, batches: Iterable[tuple[Sequence[str], tuple[Tensor, ...]]]) -> None:
        """Names and tensors of one module, or with P before their shapes of P."""
        for names, tensors in batches:
            alone = tensors[0].dim() == 2
            kept = tuple([x.contiguous() for x in tensors]) if alone else tensors
            self._batches.append((names, kept))

    @cached_property
    def _places(self) -> dict[str, tuple[tuple[Tensor, ...], int]]:
        return {name: (own, k) for names, own in self._batches for k, name in enumerate(names)}

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        tensors, k = self._places[name]
        return tensors if tensors[0].dim() == 2 else tuple([x[k] for x in tensors])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge. `results` holds A [R, n] and B [m, R] of every module, or ΔW [m, n] alone where it
    was kept dense, or nothing where the merge was streamed to `path`. R is the module's own rank;
    files are padded to one rank (formats/peft/write.py). sources: what was merged, where the result
    is in memory. refit: how files get their modules, where their format has others."""

    report: Report
    target: Target
    results: Mapping[str, tuple[Tensor, ...]]
    path: Path | None = None
    sources: tuple[Adapter, ...] = ()
    refit: Refit | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The merged modules, in order."""
        return tuple(self.report.modules)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [R, n] and B [m, R] with ΔW = B A, in the output dtype; scaling is 1.

        Read from the written file where the merge was streamed. OptionError for an unknown name,
        or a merge of a form that holds none.
        """
        self._check(name)
        if self._format.dense:
            problem = f"the merge has the form {self._format.form!r}, which has no factors"
            raise OptionError("form", problem, "merge with form='adapter'")
        if self.path is None:
            a, b = self.results[name]
            return a, b
        if self._back is None:
            return self._written.factors(name)
        sources = dict.fromkeys(part.source for part in self._back.parts[name])
        return self._back.made(name, {x: self._written.factors(x) for x in sources})

    @cached_property
    def _back(self) -> Refit | None:
        """How the modules of the merge are made of those that were written."""
        return self.refit and back(self.refit, self._written)

    @property
    def _format(self) -> Format:
        return asked_for(self.report.recipe)

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
        if self._format.dense and self.path is None:
            return self.results[name][0]
        a, b = self.factors(name)
        return powers.product(name, a, b)

    def save(
        self, output: str | os.PathLike[str], overwrite: bool = False, force: bool = False
    ) -> None:
        """Write the merge in its form and format, whole or not at all. overwrite, force:
        as for `merge`. OutputError if it cannot be."""
        report, row = self._with_sums(), self._format
        assert row.write
        with row.write(folder("output", output), self.target, overwrite, force) as written:
            add = self.refit.sink(written.add) if self.refit else written.add
            for name in self.names:
                add(name, *([self.delta(name)] if row.dense else self.factors(name)))
            written.finish(report)

    def _with_sums(self) -> Report:
        """The report with the sums of the files that were merged, where these are as they were."""
        if not self.sources:
            return self.report
        found, notes = [], list(self.report.notes)
        for k, adapter in enumerate(self.sources):
            try:
                found.append(Input(adapter.name, {f.path.name: sha256(f) for f in adapter.inputs}))
            except AdapterError:
                found.append(Input(adapter.name))
                notes.append(f"{called(k, adapter)}: its files have changed, and have no sums here")
        recipe = dataclasses.replace(self.report.recipe, adapters=tuple(found))
        return dataclasses.replace(self.report, recipe=recipe, notes=tuple(notes))
