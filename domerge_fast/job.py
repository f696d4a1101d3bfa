"""A merge that is ready to run: what is done to which module and what is written is settled
(planning.py)."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from . import runtimes
from ._version import __version__
from .adapters.plan import Plan
from .engine import pipeline as engine
from .engine.details import DetailSums
from .engine.interference import InterferenceSums, told
from .engine.passes import ALONE, Passes
from .engine.progress_bar import shown
from .engine.reader import Budget
from .formats.format import Format
from .formats.merge_folder import MergeFolder
from .formats.names.refit import Refit
from .formats.target import Target
from .merged import Merged, Results
from .parts import Part
from .recipe import DETAILS, FULL, NORMS, Input, Recipe
from .results.report import ModuleReports, Report, StackReport
from .storage.digests import Digests, Sums
from .storage.features_file import FeaturesFile
from .storage.input_file import InputFile

__all__ = ["Done", "Job", "Progress", "versions"]

LOG = logging.getLogger(__name__)

Progress = bool | Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Done:
    """What merging the parts of a job has told: of their modules, λ by part, interference, and what
    is to be said."""

    stacks: Sequence[StackReport]
    scales: Sequence[Mapping[int, float]]
    sums: InterferenceSums
    notes: Sequence[str]


@dataclass(frozen=True)
class Job:
    """recipe: what was asked, with all that was not filled in but the inputs' sums. parts: of the
    plan; the first has the modules that no rule asks another merge of. refit: how what is written
    gets its modules, where the format has others. started: when. verify: whether a sample of the
    modules is held against the reference."""

    recipe: Recipe
    plan: Plan
    parts: tuple[Part, ...]
    budget: Budget
    target: Target
    format: Format
    refit: Refit | None
    notes: tuple[str, ...]
    started: float
    features: FeaturesFile | None = None
    verify: bool = False

    def in_memory(self, progress: Progress = False) -> Merged:
        results = Results(self.plan.names)
        report = self.report(self.merge(results.add, False, progress))
        self.check_inputs()
        sources = tuple(self.plan.adapters)
        return Merged(report, self.target, results, sources=sources, refit=self.refit)

    def written(
        self, path: Path, overwrite: bool, force: bool, progress: Progress = False
    ) -> Merged:
        """In a folder, which appears whole or not at all; the inputs' sums are in its card."""
        assert self.format.write
        with ExitStack() as stack:
            folder = stack.enter_context(self.format.write(path, self.target, overwrite, force))
            sums = stack.enter_context(Digests(self.files))
            add = self.refit.sink(folder.add) if self.refit else folder.add
            done = self.merge(engine.one_by_one(self.plan, add), True, progress)
            report = self.report_beside(folder, done, sums)
            folder.finish(report)
            self.check_inputs()
        return Merged(report, self.target, {}, path, refit=self.refit)

    @property
    def files(self) -> list[InputFile]:
        """All that is read of adapters, and what the base is known by."""
        base = self.target.base.known_by if self.target.base else ()
        of_adapters = [file for a in self.plan.adapters for file in a.inputs]
        of_features = [self.features.input] if self.features else []
        return [*dict.fromkeys(of_adapters), *base, *of_features]

    def check_inputs(self) -> None:
        """Refuse files that have changed meanwhile."""
        self.target.check_inputs()
        if self.features:
            self.features.input.check()

    def sums(self) -> InterferenceSums:
        """For what is counted of the adapters: of those read in batches no two are compared."""
        names = [a.name for a in self.plan.adapters]
        report = told(self.recipe.report, len(names))
        if report == FULL and any(part.work.streamed for part in self.parts):
            report = NORMS
        detailed = report == FULL and self.recipe.report == DETAILS
        details = DetailSums.of(self.plan.names, len(names)) if detailed else None
        return InterferenceSums(names, report, details)

    def report_beside(self, folder: MergeFolder, done: Done, sums: Sums) -> Report:
        """What is written beside the modules of a folder."""
        report = self.report(done)
        recipe = self.with_sums(report.recipe, sums)
        return dataclasses.replace(report, recipe=recipe, notes=(*report.notes, *folder.notes))

    def with_sums(self, recipe: Recipe, sums: Sums) -> Recipe:
        """The recipe with the sums of these files."""
        adapters = tuple(Input(a.name, sums.of(a.inputs)) for a in self.plan.adapters)
        base = recipe.base
        if base and self.target.base:
            files = sums.of(self.target.base.known_by)
            base = Input(base.name, files)
        features = recipe.features
        if features and self.features:
            features = Input(features.name, sums.of([self.features.input]))
        return dataclasses.replace(recipe, adapters=adapters, base=base, features=features)

    def merge(
        self, sink: engine.Sink, to_host: bool, progress: Progress, passes: Passes = ALONE
    ) -> Done:
        """Give all modules to the sink, or those that this process gets where it shares them with
        others; the rest as of `engine.run`."""
        sums = self.sums()
        stacks: list[StackReport] = []
        notes = [*self.notes]
        found: list[Mapping[int, float]] = []
        total = sum(part.passes * len(part.plan.names) for part in self.parts)
        with shown(progress, total) as show, torch.no_grad():
            before = 0
            for part in self.parts:
                tell = show if len(self.parts) == 1 else _shifted(show, before, total)
                self._log(part)
                outcome = part.run(self.budget, sums, sink, to_host, tell, self.verify, passes)
                stacks += outcome.modules
                found.append(outcome.scales)
                notes += outcome.notes
                before += part.passes * len(part.plan.names)
        return Done(stacks, found, sums, notes)

    def report(self, done: Done) -> Report:
        """Of all parts, when these are merged."""
        scales, *others = done.scales
        modules, details = ModuleReports(self.plan.names, done.stacks), done.sums.details
        ranks = modules.ranks
        said = self.format.notes(self.target, ranks)
        of_runtimes = runtimes.notes(self.recipe.runtime, self.format, self.target, ranks)
        return Report(
            recipe=self.recipe,
            scale=scales[max(scales)] if scales else self.parts[0].work.settings.scale,
            scales=scales,
            versions=versions(),
            modules=modules,
            interference=done.sums.result(),
            seconds=time.perf_counter() - self.started,
            notes=(*done.notes, *_of_parts(self.parts[1:], others), *said, *of_runtimes),
            energies=details.merged_energies if details else None,
        )

    def _log(self, part: Part) -> None:
        if LOG.isEnabledFor(logging.INFO):
            names, needed = part.plan.names, part.memory(self.budget)
            method = part.work.method.method.name
            LOG.info("%d modules by %s, in %.0f MB of memory", len(names), method, needed / 1e6)


def _shifted(
    show: Callable[[int, int], None], before: int, total: int
) -> Callable[[int, int], None]:
    """Of a part of the modules, as what comes before it is done."""
    return lambda done, _: show(before + done, total)


def _of_parts(parts: Sequence[Part], found: Sequence[Mapping[int, float]]) -> Iterator[str]:
    """What has to be said of the modules that rules ask another merge of."""
    for part, scales in zip(parts, found):
        scale = scales[max(scales)] if scales else part.work.settings.scale
        what = f"{len(part.plan.names)} modules ({', '.join(part.patterns)}) by themselves"
        yield f"{what}: {part.work.method.method.name}, scale {scale:g}"


def versions() -> dict[str, str]:
    """Versions of what a merge depends on."""
    return {
        "domerge-fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
