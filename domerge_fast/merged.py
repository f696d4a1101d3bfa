"""What a user holds of a merge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .adapters import Adapter
from .adapters.adapter import called
from .algebra import powers
from .errors import AdapterError, OptionError
from .formats import FORMATS, load
from .formats.format import Format
from .formats.target import Target
from .options import folder, suggest
from .recipe import Input
from .results.report import Report
from .storage.digests import sha256

__all__ = ["Merged"]


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge. `results` holds A [R, n] and B [m, R] of every module, or ΔW [m, n] alone where it
    was kept dense, or nothing where the merge was streamed to `path`. R is the module's own rank;
    files are padded to one rank (formats/peft/write.py). sources: what was merged, where the result
    is in memory."""

    report: Report
    target: Target
    results: Mapping[str, tuple[Tensor, ...]]
    path: Path | None = None
    sources: tuple[Adapter, ...] = ()

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
        if self._form.dense:
            problem = f"the merge has the form {self._form.name!r}, which has no factors"
            raise OptionError("form", problem, "merge with form='adapter'")
        if self.path is None:
            a, b = self.results[name]
            return a, b
        return self._written.factors(name)

    @property
    def _form(self) -> Format:
        return FORMATS[self.report.recipe.form]

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
        if self._form.dense and self.path is None:
            return self.results[name][0]
        a, b = self.factors(name)
        return powers.product(name, a, b)

    def save(
        self, output: str | os.PathLike[str], overwrite: bool = False, force: bool = False
    ) -> None:
        """Write the folder of the merge's form, as a PEFT adapter or dense deltas: whole or not at
        all. overwrite, force: as for `merge`. OutputError if it cannot be."""
        report, form = self._with_sums(), self._form
        assert form.write
        with form.write(folder("output", output), self.target, overwrite, force) as written:
            for name in self.names:
                written.add(name, *([self.delta(name)] if form.dense else self.factors(name)))
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
