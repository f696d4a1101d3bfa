"""A merge by `do` of adapters that are read in batches (engine/streamed.py), which goes on with
more adapters and lives in a folder (disk.py).

The folder holds what is added up of every module, 4 (m^2 + n^2) + 4 m n bytes, and a few numbers
for each adapter. Adapters that are added descend against the sum of those before, which stay where
they are and are not read: f is known all the same, and so is what is left to its optimum. Only
where that is above `tol` of f all adapters of a module are gone through again, from the S that is
there. The adapters stay where they were: their headers are read with every add and save.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import options
from ..adapters import Adapter
from ..adapters.whole import AUTO
from ..engine import streamed as engine
from ..engine.progress_bar import shown
from ..engine.streamed_module import Past
from ..errors import AdapterError, OptionError, OutputError
from ..job import Job, Progress
from ..merged import Merged
from ..parts import Part
from ..planning import plan_job
from ..reading import opened
from ..recipe import Recipe, check_weights
from ..storage.folder import whole_output
from ..storage.lazy import LazyTensor
from ..storage.stream import SafetensorsWriter
from . import disk
from .making import asked_of
from .sources import listed, loaded, place
from .streamed_state import STREAMED, Addition, StreamedState

__all__ = ["Addition", "Streamed"]

ROOM = 0.1
"""Of `tol`: where descents stop, so that adapters can follow before it is reached."""
_SIDE = ("norms", "numbers", "sums", "diagonal")
_MODULE = ("directions", "weights", "magnitudes", "present", "own", "moved")
FIELDS = (*(f"{side}.{field}" for side in "ab" for field in _SIDE), *_MODULE)
"""Of `Past.tensors`."""


class Streamed:
    """The merge in a folder; from `start` or `open`."""

    def __init__(self, folder: Path, state: StreamedState) -> None:
        self.folder = folder
        self._state = state

    @classmethod
    def start(
        cls,
        folder: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        whole: str = AUTO,
        overwrite: bool = False,
        force: bool = False,
        **method_options: Any,
    ) -> Streamed:
        """A merge of no adapters yet, written to a new folder. overwrite, force: as for `merge`.

        method_options: those of `do`, but that a penalty other than "squared", a gamma of 0 and
        other directions take all adapters at once, and are refused. base_model, whole: as of
        `merge`. Raises OptionError or OutputError.
        """
        for name in method_options:
            if name in {f.name for f in dataclasses.fields(Recipe)} or name == "descent":
                raise OptionError(name, "is no option of a start", "leave it out, or give it later")
        given = {"method": "do", "descent": "streamed", "base_model": base_model, "whole": whole}
        recipe = Recipe.make(**given, report="norms", **method_options)
        recipe.chosen.method.streams(recipe.chosen, (), None)
        made = cls(options.folder("folder", folder), StreamedState(recipe))
        with whole_output(made.folder, disk.replacing(overwrite, force)) as fresh:
            made._state.write(fresh)
        return made

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Streamed:
        """The merge that was started in this folder, with all that was added. OptionError."""
        path = options.folder("folder", folder)
        return cls(path, StreamedState.read(path))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that were added, in order."""
        return tuple(x["name"] for x in self._state.adapters)

    @property
    def additions(self) -> tuple[Addition, ...]:
        """What was added at once, in order."""
        return self._state.additions

    def add_all(
        self,
        adapters: Iterable[str | os.PathLike[str]],
        weights: Sequence[float] | None = None,
        *,
        device: str = "auto",
        progress: Progress = False,
    ) -> Addition:
        """Add adapters, all or none; afterwards the folder is up to date, also with what others
        have added to it since it was opened.

        adapters: folders or files, which stay where they are. weights: None is 1 for each. device,
        progress: as of `merge`. Raises AdapterError, for one that was added before
        and is gone or has changed, OptionError or OutputError, and the folder is as it was.
        """
        sources = tuple(adapters) if not isinstance(adapters, (str, os.PathLike)) else adapters
        new = opened(sources)
        if not new:
            raise OptionError("adapters", "there are none", "give at least one")
        places = [place(x) for x in sources]
        for adapter, where in zip(new, places):
            if where is None:
                raise AdapterError(adapter.name, None, "is in memory", "save it, and give its path")
        given = check_weights(weights, len(new), each="weight")
        if 0 in given:
            raise OptionError("weight", "0 adds nothing", "give another, or leave the adapter out")
        with whole_output(self.folder, disk.replacing(True, True)) as fresh:
            state = self._current()
            known = _loaded(state)
            whole = (*(state.recipe.weights or ()), *given)
            recipe = dataclasses.replace(state.recipe, weights=whole)
            job = plan_job(dataclasses.replace(recipe, device=device), [*known, *new])
            addition = self._grow(job, state, fresh, progress)
            names = [x.name for x in job.plan.adapters[len(known) :]]
            job.check_inputs()
            state = StreamedState(
                recipe,
                (*state.adapters, *listed(names, places, new)),
                {name: len(job.plan.owners[name]) for name in job.plan.names},
                (*state.additions, addition),
            )
            state.write(fresh)
        self._state = state
        return addition

    def merged(self, *, scale: float | str | None = None, **asked: Any) -> Merged:
        """The merge, in memory. scale, asked: as of `save`."""
        return self._job(scale, asked).in_memory()

    def save(
        self,
        output: str | os.PathLike[str],
        *,
        scale: float | str | None = None,
        overwrite: bool = False,
        force: bool = False,
        **asked: Any,
    ) -> Merged:
        """Write the merge, as `merge(..., output=)` does, whole or not at all, with its card and
        report. Of the adapters no factors are read but for their files' sums.

        scale, overwrite, force: as of `merge`. asked: rank, energy, ragged, form, format, runtime,
        base and dtype, as of `merge`. Raises as that does.
        """
        path = options.folder("output", output)
        return self._job(scale, asked).written(path, overwrite, force)

    def _current(self) -> StreamedState:
        """What the folder holds now. OutputError if that is not this merge any more."""
        state, known = StreamedState.read(self.folder), self._state
        count = len(known.adapters)
        first = (state.recipe.weights or ())[:count] or None
        same = dataclasses.replace(state.recipe, weights=first)
        if state.adapters[:count] == known.adapters and same == known.recipe:
            return state
        problem = "was started anew by someone else, and is as they left it"
        raise OutputError(str(self.folder), problem, "open it again, then add once more")

    def _grow(self, job: Job, state: StreamedState, fresh: Path, progress: Progress) -> Addition:
        """Write what is kept of every module, with the adapters of the job that are new."""
        part, plan = _part(job), job.plan
        known, again, passes, left, few = len(state.adapters), 0, 0, 0.0, False
        before = self._past(job, state, part)
        shapes = {
            f"{name}.{field}": shape
            for name in plan.names
            for field, shape in _shapes(*_size(job, name), len(plan.owners[name])).items()
        }
        given = part.work, job.budget, _order(part), known, before, ROOM
        with (
            SafetensorsWriter(fresh / disk.TENSORS, shapes) as writer,
            shown(progress, len(plan.names)) as show,
            torch.no_grad(),
        ):
            for done, module in enumerate(engine.gone_through(plan, *given), 1):
                again += module.past is None and module.owners[0] < known
                passes, left = max(passes, module.passes), max(left, module.gap)
                few |= module.few
                for key, tensor in module.kept.tensors.items():
                    writer.add(f"{module.name}.{key}", tensor)
                show(done, len(plan.names))
        return Addition(len(plan.adapters) - known, again, passes, left, few)

    def _past(self, job: Job, state: StreamedState, part: Part) -> engine.Found:
        """What there is of a module. OptionError where the adapters that are new make others of
        the modules."""
        refuse, known = disk.refusing(self.folder), len(state.adapters)
        owned = {n: sum(i < known for i in own) for n, own in job.plan.owners.items()}
        if {n: count for n, count in owned.items() if count} != dict(state.modules):
            problem = "has modules that are called otherwise, or are cut otherwise, with these"
            raise refuse(problem, "start again with all adapters")
        tensors: Mapping[str, LazyTensor] = {}
        if state.modules:
            tensors = disk.tensors(STREAMED, self.folder, refuse).tensors()

        def found(name: str) -> Past | None:
            if name not in state.modules:
                return None
            keys = {field: f"{name}.{field}" for field in FIELDS}
            own = {field: tensors[key].read() for field, key in keys.items() if key in tensors}
            apart, device = part.work.method.options.decouple, job.budget.device
            try:
                past = Past.of(*_size(job, name), own, apart, device)
                if past.count != state.modules[name]:
                    raise ValueError("another number of adapters")
            except (KeyError, ValueError, RuntimeError) as error:
                problem = f"{disk.TENSORS} is damaged ({name!r}: {error})"
                raise refuse(problem, STREAMED.remedy) from error
            return past

        return found

    def _job(self, scale: float | str | None, asked: Mapping[str, Any]) -> Job:
        """The merge of all that was added, ready to run."""
        state = self._state
        if not state.adapters:
            problem = f"nothing was added to {str(self.folder)!r} yet"
            raise OptionError("folder", problem, "add adapters first")
        recipe = dataclasses.replace(asked_of(state.recipe, asked), scale=scale)
        recipe = Recipe.of_plain(recipe.plain())
        job = plan_job(recipe, _loaded(state))
        part = _part(job)
        before = self._past(job, state, part)

        def modules() -> Iterator[engine.Module]:
            given, device = part.work.method.options, job.budget.device
            for name in job.plan.names:
                yield engine.Module.of(job.plan, name, given, device, before(name))

        last = state.additions[-1]
        note = (
            f"do read the adapters in batches, added in {len(state.additions)} goes: what is left "
            f"to its descents' optimum is estimated as {engine.estimated(last.left, last.few)}"
        )
        done = dataclasses.replace(part, done=modules)
        return dataclasses.replace(job, parts=(done,), notes=(*job.notes, note))


def _loaded(state: StreamedState) -> Sequence[Adapter]:
    return loaded(state.adapters, "added", "add")


def _part(job: Job) -> Part:
    (part,) = job.parts
    return part


def _order(part: Part) -> int:
    """Of the norm of adapters that λ takes, whether it is found or not."""
    return part.work.method.rule.order or 2


def _size(job: Job, name: str) -> tuple[int, int]:
    kind = job.plan.kinds[name]
    return kind.m, kind.n


def _shapes(m: int, n: int, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Of `FIELDS`, at most."""
    wide, narrow = torch.float64, torch.float32
    sides = {
        f"{side}.{field}": x
        for side, d in (("a", n), ("b", m))
        for field, x in zip(
            _SIDE, ((wide, (count,)), (wide, (7,)), (narrow, (d, d)), (narrow, (d,)))
        )
    }
    rest = (
        (narrow, (m, n)),
        (wide, (2,)),
        (wide, (n,)),
        (wide, (n,)),
        (wide, (2, count)),
        (wide, (count,)),
    )
    return sides | dict(zip(_MODULE, rest))
