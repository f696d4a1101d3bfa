"""A merge that grows by one adapter at a time and lives in a folder: the method `opcm` for
adapters that are trained one after the other.

The folder is a session on disk (disk.py). It holds the running sum S of methods/opcm.py, as float32
factors of its numerical support under PEFT's keys, and what was added to it. `add` reads the sum
and one adapter, group by group, and replaces the folder whole or not at all; the folder is locked
from the first read, so that two who add at once come one after the other. Time, memory and disk do
not grow with the adapters that were added, only with the rank of their sum: min(m, n) at most, or
`rank`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .. import options, runtimes
from ..adapters import Adapter, check_compatible, keep, one_spelling
from ..adapters.adapter import called
from ..adapters.differences import check_none
from ..adapters.plan import Plan
from ..adapters.style import MODEL
from ..adapters.whole import AUTO, check_policy
from ..backends import registry
from ..engine import pipeline as engine
from ..engine.interference import InterferenceSums
from ..engine.progress_bar import shown
from ..engine.reader import Budget
from ..engine.work import Cut, Work
from ..errors import AdapterError, OptionError, OutputError, printable
from ..formats import load
from ..formats.peft import write as peft
from ..formats.peft.assemble import assemble
from ..formats.peft.config import read_config
from ..formats.target import Target
from ..job import Progress, versions
from ..merged import Merged
from ..methods import opcm
from ..methods.base import Chosen, Settings
from ..planning import choose_device
from ..recipe import DTYPES, NORMS, Input, Recipe, check_scale, check_weights
from ..results.report import ModuleReport, ModuleReports, Report, energy_kept
from ..storage.folder import whole_output
from ..storage.lazy import dtype_name
from ..storage.stream import SafetensorsWriter
from . import disk, kept_whole
from .running_sum import Scaled, Sink
from .state import SEQUENTIAL, State, Step

__all__ = ["Sequential"]


class Sequential:
    """The merge in a folder; from `start` or `open`."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.state = state

    @classmethod
    def start(
        cls,
        folder: str | os.PathLike[str],
        *,
        alpha: float = opcm.OpcmOptions.alpha,
        rank: int | None = None,
        base_model: str | None = None,
        whole: str = AUTO,
        overwrite: bool = False,
        force: bool = False,
    ) -> Sequential:
        """A merge of no adapters yet, written to a new folder. overwrite, force: as for `merge`.

        alpha: as the option of `opcm`. rank: truncate the running sum to this rank in every add;
        None: exact. base_model: says which base model all adapters belong to, where their configs
        disagree. whole: as in `merge`, but that tensors that differ are always refused; NAME is an
        adapter's folder, or its number in the order they are added. Raises OptionError or
        OutputError.
        """
        chosen = options.build(opcm.OpcmOptions, {"alpha": alpha}, "a sequential merge")
        if rank is not None:
            rank = options.check("rank", rank, int, low=1)
        options.text("base_model", base_model)
        state = State(chosen.alpha, rank, base_model, check_policy(whole))
        made = cls(options.folder("folder", folder), state)
        with whole_output(made.folder, disk.replacing(overwrite, force)) as fresh:
            made.state.write(fresh)
        return made

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Sequential:
        """The merge that was started in this folder, with all that was added. OptionError."""
        path = options.folder("folder", folder)
        return cls(path, State.read(path))

    def add(
        self,
        adapter: str | os.PathLike[str] | Adapter,
        weight: float = 1.0,
        *,
        backend: str = "auto",
        device: str = "auto",
        progress: Progress = False,
    ) -> Step:
        """Add an adapter, off the spectrum of what there is; afterwards the folder is up to date,
        also with what others have added to it since it was opened.

        Modules that it lacks stay as they are; modules that no adapter before it has are taken as
        they are. weight: may be negative. backend, device, progress: as in `merge`. Raises
        AdapterError, OptionError or OutputError, and the folder is as it was.
        """
        steps = self.add_all([adapter], [weight], backend=backend, device=device, progress=progress)
        return steps[0]

    def add_all(
        self,
        adapters: Iterable[str | os.PathLike[str] | Adapter],
        weights: Sequence[float] | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        progress: Progress = False,
    ) -> list[Step]:
        """Add adapters in order as `add` does, all or none of them. weights: None is 1 for each."""
        if isinstance(adapters, (str, os.PathLike, Adapter)):
            raise OptionError("adapters", "is one adapter, not a list", "say add for one")
        loaded = [x if isinstance(x, Adapter) else load(x) for x in adapters]
        if not loaded:
            raise OptionError("adapters", "there are none", "give at least one")
        _check_names(loaded)
        for one in loaded:
            check_none(one, "a merge that goes on")
        weights = check_weights(weights, len(loaded), each="weight")
        if 0 in weights:
            raise OptionError("weight", "0 adds nothing", "give another, or leave the adapter out")
        run = functools.partial(self._run, backend=backend, device=device, progress=progress)
        with whole_output(self.folder, disk.replacing(True, True)) as fresh:
            state = self._current()
            running = self._running(state, self.folder)
            calls = ["the sum so far"] * len(running)
            calls += [called(len(state.steps) + k, adapter) for k, adapter in enumerate(loaded)]
            together, notes = one_spelling([*running, *loaded], state.base_model, calls=calls)
            check_compatible(together, state.base_model)
            _check_modules(loaded)
            running, loaded = together[: len(running)], together[len(running) :]
            for new, weight in zip(loaded, weights):
                state = self._next(state, running, new, weight, notes, fresh, run)
                notes = []
                state.write(fresh)
                state = State.read(fresh)
                running = self._running(state, fresh)
        self.state = state
        return list(state.steps[-len(loaded) :])

    def _current(self) -> State:
        """What the folder holds now. OutputError if that is not this merge any more."""
        state, known = State.read(self.folder), self.state
        same = ("alpha", "rank", "base_model", "whole")
        if state.steps[: len(known.steps)] == known.steps and all(
            getattr(state, field) == getattr(known, field) for field in same
        ):
            return state
        problem = "was started anew by someone else, and is as they left it"
        raise OutputError(str(self.folder), problem, "open it again, then add once more")

    def _next(
        self,
        state: State,
        running: Sequence[Adapter],
        new: Adapter,
        weight: float,
        notes: Sequence[str],
        fresh: Path,
        run: Callable[[Plan, InterferenceSums, Sink], Mapping[str, ModuleReport]],
    ) -> State:
        """The state with one more adapter, of which there are notes already; its running sum is in
        the folder `fresh`."""
        sources = [*running, new]
        check_compatible(sources, state.base_model)
        plan = Plan.make(sources, [*[1.0] * len(running), weight])
        kept = kept_whole.kept(state, sources)
        target = peft.target(plan, torch.float32, state.base_model, kept)
        sums = InterferenceSums([source.name for source in sources], NORMS)
        path = fresh / f"next_{disk.TENSORS}"
        with SafetensorsWriter(path, dict(peft.largest(target))) as writer:
            sink = Sink(writer, target)
            modules = run(plan, sums, sink)
            for key, tensor in target.carried.items():
                writer.add_pieces(key, tensor)
        target.check_inputs()
        os.replace(path, fresh / disk.TENSORS)
        counted = sums.result()
        assert counted
        norm = abs(weight) * counted.norms[-1]
        notes = tuple(map(printable, (*notes, *kept_whole.left_out(state, kept, new))))
        step = Step(printable(new.name), weight, norm, energy_kept(modules.values()), notes)
        return dataclasses.replace(
            state,
            dtype=_shared_dtype(state.dtype, new),
            norm=math.sqrt(sink.energy),
            config=target.config,
            steps=(*state.steps, step),
            versions=versions(),
        )

    def merged(self, *, scale: float = 1.0, dtype: str | None = None) -> Merged:
        """The merged adapter g λ S, in memory. scale: λ. dtype: None takes that of the adapters.

        Raises OptionError, also if nothing was added yet.
        """
        report, target, results = self._result(scale, dtype)
        return Merged(report, target, dict(results))

    def save(
        self,
        output: str | os.PathLike[str],
        *,
        scale: float = 1.0,
        dtype: str | None = None,
        overwrite: bool = False,
        force: bool = False,
    ) -> Merged:
        """Write the merged adapter as a PEFT folder, module by module: whole or not at all.
        overwrite, force: as for `merge`.

        Raises OptionError or OutputError.
        """
        report, target, results = self._result(scale, dtype)
        Merged(report, target, results).save(output, overwrite, force)
        return Merged(report, target, {}, options.folder("output", output))

    def _running(self, state: State, place: Path) -> list[Adapter]:
        """S as an adapter of scaling 1, from the file in a folder; none before the first add."""
        if not state.steps:
            return []
        name = str(self.folder)
        file = disk.tensors(SEQUENTIAL, place, functools.partial(AdapterError, name, None))
        config = read_config(state.config, name)
        inputs = (file.input,)
        return [assemble(name, config, file.tensors(), lambda module, rank: 1.0, inputs)]

    def _run(
        self,
        plan: Plan,
        sums: InterferenceSums,
        sink: Sink,
        backend: str,
        device: str,
        progress: Progress,
    ) -> Mapping[str, ModuleReport]:
        budget = Budget(choose_device(device, plan.adapters))
        settings = Settings(1.0, torch.float32, registry.choose(backend, budget.device.type))
        chosen = Chosen(opcm.SUM, opcm.OpcmOptions(self.state.alpha))
        work = Work(chosen, settings, Cut(self.state.rank))
        with shown(progress, len(plan.names)) as show, torch.no_grad():
            found = engine.run(plan, work, budget, sums, engine.one_by_one(plan, sink), True, show)
        return ModuleReports(plan.names, found.modules)

    def _result(self, scale: float, dtype: str | None) -> tuple[Report, Target, Scaled]:
        """g λ S: its factors are read from the folder when they are asked for."""
        started = time.perf_counter()
        scale = check_scale(scale)
        running, steps = self._running(self.state, self.folder), self.state.steps
        if not running:
            problem = f"nothing was added to {str(self.folder)!r} yet"
            raise OptionError("folder", problem, "add an adapter first")
        word = options.choose("dtype", dtype or self.state.dtype, DTYPES)
        plan = Plan.make(running, [1.0])
        kept = keep(running, plan.weights)
        target = peft.target(plan, getattr(torch, word), self.state.base_model, kept)
        gain = scale * opcm.gain([step.norm for step in steps], self.state.norm)
        report = Report(
            recipe=Recipe(
                method="opcm",
                options={"alpha": self.state.alpha},
                adapters=tuple(Input(step.adapter) for step in steps),
                weights=tuple(step.weight for step in steps),
                scale=scale,
                rank=self.state.rank,
                backend="torch",
                device="cpu",
                dtype=word,
                base_model=self.state.base_model,
            ),
            scale=scale,
            versions=versions(),
            modules={
                name: ModuleReport(name, plan.rank(name), None, None, {}, 1.0, 0.0)
                for name in plan.names
            },
            interference=None,
            seconds=time.perf_counter() - started,
            notes=(
                *(note for step in steps for note in step.notes),
                *kept_whole.missing(self.state),
                *runtimes.notes(None, peft.PEFT, target, plan.ranks.values()),
            ),
        )
        return report, target, Scaled(running[0], gain, target.dtype)


def _check_names(adapters: Sequence[Adapter]) -> None:
    """AdapterError for names that a PEFT folder, which is what is saved, does not have."""
    for adapter in adapters:
        if adapter.style and adapter.style.names != MODEL:
            problem = f"has the format {adapter.style.format!r}, which cannot grow one by one"
            raise AdapterError(adapter.name, None, problem, "merge all at once, by opcm")


def _check_modules(adapters: Iterable[Adapter]) -> None:
    """AdapterError for parameters that are adapted as they are: the sum is kept by modules."""
    for adapter in adapters:
        for module in adapter.modules.values():
            if module.slice:
                problem = f"adapts the parameter {module.parameter!r} (target_parameters)"
                remedy = "merge all adapters at once (merge)"
                raise AdapterError(adapter.name, None, problem, remedy)


def _shared_dtype(so_far: str | None, new: Adapter) -> str:
    dtypes = {dtype_name(module.dtype) for module in new.modules.values()}
    dtypes |= {so_far} if so_far else set()
    return dtypes.pop() if len(dtypes) == 1 else "float32"
