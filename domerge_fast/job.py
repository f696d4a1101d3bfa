"""A merge that is ready to run: adapters read and checked, what is done to which module settled."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import options
from ._version import __version__
from .adapters import Adapter, Kept, check_compatible, keep, one_spelling
from .adapters.names import PREFIX
from .adapters.plan import Plan
from .adapters.whole import COPY
from .backends import registry
from .engine import pipeline as engine
from .engine.interference import InterferenceSums
from .engine.progress_bar import shown
from .engine.work import Cut, Work
from .errors import OptionError
from .formats import FORMATS, load, tokenizer
from .formats.format import Format
from .formats.model.checkpoint import Checkpoint, open_checkpoint
from .formats.model.fit import originals
from .formats.peft import write as peft
from .formats.target import Target
from .merged import Merged
from .methods import choose
from .methods.base import Chosen, ScaleRule, Settings
from .methods.steps import POST, PRE
from .recipe import AUTO, Input, Recipe, check_scale, check_weights
from .results.report import ModuleReport, Report
from .storage.digests import Digests
from .storage.lazy import dtype_name

__all__ = ["Job", "Part", "Progress", "Source", "choose_device", "read", "versions"]

LOG = logging.getLogger(__name__)

Source = str | os.PathLike[str] | Adapter
Progress = bool | Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """Modules to which the same is done. said: of what was taken where nobody chose. auto: whether
    λ is found from the adapters. patterns: of the rules that made them a part."""

    plan: Plan
    work: Work
    said: tuple[str, ...]
    auto: bool
    patterns: tuple[str, ...]

    @property
    def passes(self) -> int:
        """How often it is gone through."""
        return 2 if self.work.twice else 1


@dataclass(frozen=True)
class Job:
    """recipe: what was asked, with all that was not filled in but the inputs' sums. parts: of the
    plan; the first has the modules that no rule asks another merge of. started: when."""

    recipe: Recipe
    plan: Plan
    parts: tuple[Part, ...]
    place: engine.Place
    target: Target
    form: Format
    notes: tuple[str, ...]
    started: float

    @classmethod
    def make(
        cls, asked: Recipe, sources: Iterable[Source], max_device_memory: int | str | None = None
    ) -> Job:
        """Reads headers and what adapters save whole; a few factors where `auto` chooses."""
        started, written = time.perf_counter(), _form(asked)
        loaded, renamed = read(sources, asked.base_model, asked.weights)
        of_modules = asked.of_modules(sorted({name for a in loaded for name in a.modules}))
        loaded = _without(loaded, {n for n, x in of_modules.items() if x.get("leave_out")})
        own = {n: _own(x["weights"], len(loaded)) for n, x in of_modules.items() if "weights" in x}
        plan = Plan.make(loaded, _weights(asked.weights, len(loaded)), own)
        if not plan.names:
            raise OptionError("rules", "every module is left out", "let one be merged")
        dtype = plan.dtype() if asked.dtype is None else getattr(torch, asked.dtype)
        most = options.size("max_device_memory", max_device_memory)
        place = engine.Place(choose_device(asked.device, loaded), most)
        backend = registry.choose(asked.backend, place.device.type)
        why = "asked for"
        if asked.backend == AUTO:
            forced = os.environ.get(registry.ENVIRONMENT)
            why = f"{registry.ENVIRONMENT} names it" if forced else "the first that runs there"
        LOG.info("backend %s on %s: %s", backend, place.device, why)
        parts = tuple(_parts(asked, plan, of_modules, dtype, backend))
        checkpoint = None if asked.base is None else open_checkpoint(Path(asked.base.name))
        kept = _kept(asked, plan, checkpoint)
        ranks = {n: r for part in parts for n, r in part.work.ranks(part.plan).items()}
        target, notes = _target(
            plan, dtype, asked, kept, {n: ranks[n] for n in plan.names}, checkpoint
        )
        said = [note for part in parts for note in part.said]
        recipe = dataclasses.replace(
            asked,
            adapters=tuple(Input(a.name) for a in loaded),
            weights=tuple(plan.weights),
            scale=_told_scale(asked, parts),
            whole=f"from:{loaded.index(kept.owner) + 1}" if kept.owner else asked.whole,
            backend=backend,
            device=str(place.device),
            dtype=dtype_name(dtype),
        )
        return cls(recipe, plan, parts, place, target, written, (*said, *renamed, *notes), started)

    def in_memory(self, progress: Progress = False) -> Merged:
        results: dict[str, tuple[Tensor, ...]] = {}

        def collect(name: str, *tensors: Tensor) -> None:
            results[name] = tuple(x.contiguous() for x in tensors)

        report = self._run(collect, False, progress)
        self.target.check_inputs()
        ordered = {name: results[name] for name in report.modules}
        return Merged(report, self.target, ordered, sources=tuple(self.plan.adapters))

    def written(
        self, path: Path, overwrite: bool, force: bool, progress: Progress = False
    ) -> Merged:
        """In a folder, which appears whole or not at all; the inputs' sums are in its card."""
        assert self.form.write
        with ExitStack() as stack:
            folder = stack.enter_context(self.form.write(path, self.target, overwrite, force))
            sums = stack.enter_context(Digests(self._files()))
            report = self._run(folder.add, True, progress)
            recipe = self._with_sums(sums)
            notes = (*report.notes, *folder.notes)
            report = dataclasses.replace(report, recipe=recipe, notes=notes)
            folder.finish(report)
            self.target.check_inputs()
        return Merged(report, self.target, {}, path)

    def _files(self) -> list[Any]:
        base = self.target.base.files if self.target.base else ()
        of_adapters = [file for a in self.plan.adapters for file in a.inputs]
        return [*dict.fromkeys(of_adapters), *(file.input for file in base)]

    def _with_sums(self, sums: Digests) -> Recipe:
        adapters = tuple(Input(a.name, sums.of(a.inputs)) for a in self.plan.adapters)
        base = self.recipe.base
        if base and self.target.base:
            files = sums.of(file.input for file in self.target.base.files)
            base = Input(base.name, files)
        return dataclasses.replace(self.recipe, adapters=adapters, base=base)

    def _run(self, sink: engine.Sink, to_host: bool, progress: Progress) -> Report:
        sums = InterferenceSums([a.name for a in self.plan.adapters])
        modules: dict[str, ModuleReport] = {}
        found: list[Mapping[int, float]] = []
        total = sum(part.passes * len(part.plan.names) for part in self.parts)
        with shown(progress, total) as show, torch.no_grad():
            before = 0
            for part in self.parts:
                tell = _shifted(show, before, total)
                self._log(part)
                outcome = engine.run(part.plan, part.work, self.place, sums, sink, to_host, tell)
                modules |= outcome.modules
                found.append(outcome.scales)
                before += part.passes * len(part.plan.names)
        scales = found[0]
        several = len(self.plan.adapters) <= engine.MOST_COMPARED
        told = self.form.notes(self.target, [m.rank for m in modules.values()])
        return Report(
            recipe=self.recipe,
            scale=scales[max(scales)] if scales else self.parts[0].work.settings.scale,
            scales=scales,
            versions=versions(),
            modules={name: modules[name] for name in self.plan.names},
            interference=sums.result() if several else None,
            seconds=time.perf_counter() - self.started,
            notes=(*self.notes, *_of_parts(self.parts[1:], found[1:]), *told),
        )

    def _log(self, part: Part) -> None:
        if LOG.isEnabledFor(logging.INFO):
            names, memory = part.plan.names, engine.memory(part.plan, self.place, part.work)
            method = part.work.method.method.name
            LOG.info("%d modules by %s, in %.0f MB of memory", len(names), method, memory / 1e6)


def _told_scale(asked: Recipe, parts: Sequence[Part]) -> float | str | None:
    """What repeats the scale; parts may have their own where none was asked for."""
    if len(parts) > 1:
        return asked.scale
    return AUTO if parts[0].auto else parts[0].work.settings.scale


def _form(asked: Recipe) -> Format:
    """The format that a merge of this form is written in."""
    row = FORMATS.choose("form", asked.form, lambda row: row.write is not None)
    if row.needs_base and asked.base is None:
        raise OptionError("form", f"{asked.form!r} needs the base model", "give its folder as base")
    if asked.ragged and row.dense and asked.energy is None:
        raise OptionError("ragged", f"{asked.form!r} has no ranks", "leave it out")
    return row


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


def read(
    sources: Iterable[Source], base_model: str | None, weights: Sequence[float] | None = None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, their modules under one name each, and what is to be said of that."""
    if isinstance(sources, (str, os.PathLike, Adapter)):
        raise OptionError("adapters", "is one adapter, not a list", "put it in a list: [adapter]")
    registry.check_environment()
    found = [_one(source) for source in sources]
    given = _weights(weights, len(found)) if found else None
    loaded, notes = one_spelling(found, base_model, given)
    check_compatible(loaded, base_model)
    named: dict[str, Adapter] = {}
    for adapter in loaded:
        numbered = (f"{adapter.name} ({k})" for k in itertools.count(2))
        names = itertools.chain([adapter.name], numbered)
        name = next(n for n in names if n not in named)
        named[name] = dataclasses.replace(adapter, name=name)
    return list(named.values()), notes


def _one(source: Source) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, os.PathLike)):
        return load(source)
    remedy = "give a folder, from_model(model, name) or from_tensors(factors)"
    raise OptionError("adapters", f"a {type(source).__name__} is not an adapter", remedy)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    checked = check_weights(weights, count)
    if not any(checked):
        raise OptionError("weights", "all are zero", "give at least one adapter a weight")
    return checked


def _own(weights: Sequence[float], count: int) -> tuple[float, ...]:
    return tuple(check_weights(weights, count))


def _without(adapters: Sequence[Adapter], left_out: set[str]) -> list[Adapter]:
    """The adapters without these modules; what is left is named one by one in their config."""
    if not left_out:
        return list(adapters)
    return [_less(adapter, left_out) for adapter in adapters]


def _less(adapter: Adapter, left_out: set[str]) -> Adapter:
    modules = {n: m for n, m in adapter.modules.items() if n not in left_out}
    copies = tuple(f"{PREFIX}{name}{COPY}" for name in left_out)
    carried = {k: t for k, t in adapter.carried.items() if not k.startswith(copies)}
    config = dataclasses.replace(adapter.config, target_modules=None, exclude_modules=None)
    return dataclasses.replace(adapter, modules=modules, carried=carried, config=config)


def _parts(
    asked: Recipe,
    plan: Plan,
    of_modules: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    backend: str,
) -> Iterator[Part]:
    """The modules by what is done to them, those that no rule asks another merge of first."""
    members: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name in sorted(plan.names, key=lambda n: bool(_other(of_modules.get(n, {})))):
        other = _other(of_modules.get(name, {}))
        members.setdefault(repr(other), (other, []))[1].append(name)
    order = {name: k for k, name in enumerate(plan.names)}
    for other, names in members.values():
        method, given = other.get("method", (asked.method, asked.options))
        cut = Cut(other.get("rank", asked.rank), other.get("energy", asked.energy))
        part = plan.only(sorted(names, key=order.__getitem__))
        patterns = tuple(r.modules for r in asked.rules if _other(r.asks).items() <= other.items())
        yield _part(asked, part, choose(method, given), cut, dtype, backend, patterns)


def _other(asks: Mapping[str, Any]) -> dict[str, Any]:
    """What makes modules a part of their own."""
    return {name: asks[name] for name in ("rank", "energy", "method") if name in asks}


def _part(
    asked: Recipe,
    plan: Plan,
    chosen: Chosen,
    cut: Cut,
    dtype: torch.dtype,
    backend: str,
    patterns: tuple[str, ...],
) -> Part:
    calibrated, said = asked.calibrated, []
    before = tuple(PRE[name] for name in asked.pre)
    after = tuple(POST[name] for name in asked.post if name in POST)
    alone = chosen.method.taken is not None
    own_scale = chosen.own_scale
    if chosen.method.taken:
        taken = chosen.method.taken(plan)
        chosen, calibrated = taken.chosen, calibrated or taken.calibrated
        said.append(taken.what)
    factor, rule = _scale(asked.scale, chosen, plan, asked.post)
    usual = _largest_rank(plan) if chosen.truncates or chosen.dense else Cut()
    cut = usual if chosen.truncates and not cut else cut
    work = Work(
        chosen,
        Settings(factor, dtype, backend, rank=cut.rank),
        cut,
        usual,
        before,
        after,
        deltas=FORMATS[asked.form].dense,
        narrowing=plan.wide,
        rule=rule,
        calibrated=calibrated,
        alone=alone,
    )
    if work.restores_norms:
        said.append("auto: every module has the norm that it had before the cut")
    auto = asked.scale == AUTO or (asked.scale is None and not own_scale)
    return Part(plan, work, tuple(said), auto, patterns)


def _scale(
    scale: float | str | None, chosen: Chosen, plan: Plan, post: Sequence[str]
) -> tuple[float, ScaleRule | None]:
    """λ, or the rule that it is found by: none where one adapter is merged, or a step sets the
    norm."""
    if scale is None:
        scale = 1.0 if chosen.own_scale else AUTO
    if scale != AUTO:
        return check_scale(scale), None
    alone = len({i for owners in plan.owners.values() for i in owners}) == 1
    if alone or "norm_match" in post:
        return 1.0, None
    return 1.0, chosen.rule


def _largest_rank(plan: Plan) -> Cut:
    """To the largest rank of an adapter."""
    return Cut(max(m.rank for name in plan.names for m in plan.modules(name)))


def _kept(asked: Recipe, plan: Plan, checkpoint: Checkpoint | None) -> Kept:
    """What is kept of the tensors that adapters save whole."""
    origin = None
    if checkpoint is not None:
        origin = originals({n: plan.module(n) for n in plan.names}, checkpoint)
    return keep(plan.adapters, plan.weights, asked.whole, origin)


def _target(
    plan: Plan,
    dtype: torch.dtype,
    asked: Recipe,
    kept: Kept,
    ranks: Mapping[str, int],
    base: Checkpoint | None,
) -> tuple[Target, tuple[str, ...]]:
    """What the merge is written as, and what has to be said of it."""
    merging = [adapter for adapter, weight in zip(plan.adapters, plan.weights) if weight != 0]
    files, notes = tokenizer.files(merging, kept)
    target = peft.target(plan, dtype, asked.base_model, kept, ranks, asked.ragged)
    return dataclasses.replace(target, copied=files, base=base), (*kept.notes, *notes)


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
