"""A merge that is ready to run: what is done to which module, and what is written, settled."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import options, runtimes
from ._version import __version__
from .adapters import Adapter, Kept, keep
from .adapters.differences import Changes
from .adapters.plan import Plan
from .backends import registry
from .base import Base
from .engine import pipeline as engine
from .engine.changes import changes
from .engine.details import DetailSums
from .engine.interference import InterferenceSums, told
from .engine.passes import ALONE, Passes
from .engine.progress_bar import shown
from .engine.reader import Budget
from .errors import OptionError
from .formats import tokenizer
from .formats.choose import asked_for, check_holds, is_ragged, respelled
from .formats.format import Format
from .formats.merge_folder import MergeFolder
from .formats.model.checkpoint import Checkpoint
from .formats.model.fit import in_numbers
from .formats.names.refit import Refit
from .formats.peft import write as peft
from .formats.target import Target
from .merged import Merged, Results
from .methods.steps import PRE
from .methods.steps.base import Beside
from .parts import Part, parts_of, uncut
from .reading import Source, read, weights_of, without
from .recipe import AUTO, DETAILS, FULL, NORMS, Input, Recipe, check_weights
from .results.card import recipe_text
from .results.report import ModuleReports, Report, StackReport
from .storage.digests import Digests, Sums
from .storage.features_file import FeaturesFile
from .storage.input_file import InputFile
from .storage.lazy import dtype_name

__all__ = ["Done", "Job", "Progress", "choose_device", "target_of", "versions"]

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

    @classmethod
    def make(
        cls, asked: Recipe, sources: Iterable[Source], max_device_memory: int | str | None = None
    ) -> Job:
        """Reads headers and what adapters save whole; a few factors where `auto` chooses."""
        started = time.perf_counter()
        _check_form(asked)
        asked, runtime = runtimes.settled(asked)
        base = Base(asked)
        loaded, renamed = read(sources, asked.base_model, asked.weights, base.whole)
        written, of_format = runtimes.format_of(asked, loaded, runtime)
        every = sorted({name for a in loaded for name in a.modules}) if asked.rules else []
        of_modules = asked.of_modules(every)
        loaded = without(loaded, {n for n, x in of_modules.items() if x.get("leave_out")})
        own = {n: _own(x["weights"], len(loaded)) for n, x in of_modules.items() if "weights" in x}
        plan = Plan.make(loaded, weights_of(asked.weights, len(loaded)), own)
        if not plan.names:
            raise OptionError("rules", "every module is left out", "let one be merged")
        dtype = plan.dtype() if asked.dtype is None else getattr(torch, asked.dtype)
        most = options.size("max_device_memory", max_device_memory)
        budget = Budget(choose_device(asked.device, loaded), most)
        backend = registry.choose(asked.backend, budget.device.type)
        why = "asked for"
        if asked.backend == AUTO:
            forced = os.environ.get(registry.ENVIRONMENT)
            why = f"{registry.ENVIRONMENT} names it" if forced else "by evidence (docs/kernels.md)"
        LOG.info("backend %s on %s: %s", backend, budget.device, why)
        features = _features(asked)
        names = tuple(a.name for a in loaded)
        beside = Beside(names, features, asked.features_energy)
        before = tuple(PRE[name].bound(beside) for name in asked.pre)
        made = parts_of(asked, plan, of_modules, dtype, backend)
        parts = tuple(replace(x, work=replace(x.work, pre=before)) for x in made)
        checkpoint = base.of(written)
        origin = base.origin(plan.described)
        kept = keep(plan.adapters, plan.weights, asked.whole, origin)
        works = [(part.plan, part.work) for part in parts]
        changed = changes(plan, works, kept, origin, dtype, written.dense)
        of_parts = [part.work.ranks(part.plan) for part in parts]
        ranks = {n: r for own in of_parts for n, r in own.items()}
        ranks = ranks if len(parts) == 1 else {n: ranks[n] for n in plan.names}
        parts, matrices = uncut(parts, written, runtime)
        target, refit, notes = target_of(
            plan, dtype, asked, kept, ranks, checkpoint, written, changed, matrices
        )
        target, fitted = runtimes.written_for(runtime, written, target)
        if written.needs_base:
            target = in_numbers(target)
        by_part = (note for part in parts for note in part.said)
        said = (*by_part, *renamed, *of_format, *notes, *fitted)
        recipe = dataclasses.replace(
            asked,
            adapters=tuple(Input(a.name) for a in loaded),
            weights=tuple(plan.weights),
            scale=_told_scale(asked, parts),
            format=written.name,
            whole=f"from:{loaded.index(kept.owner) + 1}" if kept.owner else asked.whole,
            backend=backend,
            device=str(budget.device),
            dtype=dtype_name(dtype),
        )
        target = dataclasses.replace(target, recipe_bytes=_recipe_bytes(recipe, target))
        return cls(recipe, plan, parts, budget, target, written, refit, said, started, features)

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


def _told_scale(asked: Recipe, parts: Sequence[Part]) -> float | str | None:
    """What repeats the scale; parts may have their own where none was asked for."""
    if len(parts) > 1:
        return asked.scale
    return AUTO if parts[0].auto else parts[0].work.settings.scale


def _features(asked: Recipe) -> FeaturesFile | None:
    """What layers are given, where a step takes it."""
    if asked.features is None:
        return None
    if all(PRE[name].of is None for name in asked.pre):
        raise OptionError("features", "no step takes them", "add 'osrm_project' to pre")
    return FeaturesFile(Path(asked.features.name))


def _check_form(asked: Recipe) -> None:
    """What can be told before an adapter is read."""
    row = asked_for(asked)
    if row.needs_base and asked.base is None:
        raise OptionError("form", f"{asked.form!r} needs the base model", "give its folder as base")
    if asked.format or row.dense:
        is_ragged(asked, row)


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


def _own(weights: Sequence[float], count: int) -> tuple[float, ...]:
    return tuple(check_weights(weights, count))


def target_of(
    plan: Plan,
    dtype: torch.dtype,
    asked: Recipe,
    kept: Kept,
    ranks: Mapping[str, int],
    base: Checkpoint | None,
    row: Format,
    changed: Changes,
    matrices: Collection[str] = (),
) -> tuple[Target, Refit | None, tuple[str, ...]]:
    """What the merge is written as, how it gets its modules, and what has to be said of it.
    matrices: the modules that are no factors there."""
    merging = [adapter for adapter, weight in zip(plan.adapters, plan.weights) if weight != 0]
    files, notes = tokenizer.files(merging, kept)
    target = peft.target(plan, dtype, asked.base_model, kept, ranks, is_ragged(asked, row))
    dense = {n: dataclasses.replace(target.layouts[n], dense=True) for n in matrices}
    layouts = target.layouts if not dense else {**target.layouts, **dense}
    target = dataclasses.replace(target, layouts=layouts, changes=changed)
    target, refit, told = respelled(row, plan.adapters, target, asked.base_model)
    check_holds(row, target)
    styles = tuple(a.style for a in merging if a.style and a.style.format == row.name)
    target = dataclasses.replace(target, copied=files, base=base, styles=styles)
    return target, refit, (*kept.notes, *changed.notes, *notes, *told)


def _recipe_bytes(recipe: Recipe, target: Target) -> int:
    """What a recipe takes at most as a text within JSON, with the sums of its inputs, which it does
    not have yet."""
    of_base = target.base.known_by if target.base else []
    names = [file.path.name for file in (*target.files, *of_base)]
    names += [os.path.basename(recipe.features.name)] if recipe.features else []
    sums = sum(len(json.dumps({name: "0" * 64})) + 40 for name in names)
    bare = dataclasses.replace(recipe, base=recipe.base and Input(recipe.base.name))
    return len(json.dumps(recipe_text(bare))) + 2 * sums


def versions() -> dict[str, str]:
    """Versions of what a merge depends on."""
    return {
        "domerge-fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def choose_device(device: str, adapters: Sequence[Adapter]) -> torch.device:
    if device == "auto":
        homes = {device for a in adapters for device in a.devices}
        return homes.pop() if len(homes) == 1 else torch.device("cpu")
    try:
        probe = torch.zeros(1, device=device)
        probe.item()
    except (RuntimeError, AssertionError) as error:
        remedy = "use 'cpu', or 'cuda:0' where torch sees a GPU"
        raise OptionError("device", f"torch cannot use {device!r} here", remedy) from error
    return probe.device
