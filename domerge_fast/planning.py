"""From what is asked to a job: the adapters are opened, their modules planned, and what is done to
each and written is settled. Headers are read and what adapters save whole, and a few factors where
`auto` chooses.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import options, runtimes
from .adapters import Adapter, Kept, keep
from .adapters.differences import Changes
from .adapters.plan import Plan
from .backends import registry
from .base import Base
from .engine.changes import changes
from .engine.reader import Budget
from .errors import OptionError
from .formats import tokenizer
from .formats.choose import asked_for, check_holds, is_ragged, respelled
from .formats.format import Format
from .formats.model.checkpoint import Checkpoint
from .formats.model.fit import in_numbers
from .formats.names.refit import Refit
from .formats.peft import write as peft
from .formats.target import Target
from .job import Job
from .methods.steps import PRE
from .methods.steps.base import Beside
from .parts import Part, parts_of, uncut
from .reading import Source, read, weights_of, without
from .recipe import AUTO, Input, Recipe, check_weights
from .results.card import recipe_text
from .storage.features_file import FeaturesFile
from .storage.lazy import dtype_name

__all__ = ["choose_device", "plan_job", "target_of"]

LOG = logging.getLogger(__name__)

OfModules = Mapping[str, Mapping[str, Any]]
"""What rules ask of modules, by name."""


def plan_job(
    asked: Recipe, sources: Iterable[Source], max_device_memory: int | str | None = None
) -> Job:
    """The job that a recipe asks of these adapters. Errors as of `api.merge`."""
    started = time.perf_counter()
    _check_form(asked)
    asked, runtime = runtimes.settled(asked)
    base = Base(asked)
    loaded, renamed = read(sources, asked.base_model, asked.weights, base.whole)
    written, of_format = runtimes.format_of(asked, loaded, runtime)
    every = sorted({name for a in loaded for name in a.modules}) if asked.rules else []
    of_modules = asked.of_modules(every)
    loaded = without(loaded, {n for n, x in of_modules.items() if x.get("leave_out")})
    plan = _plan(asked, loaded, of_modules)
    dtype = plan.dtype() if asked.dtype is None else getattr(torch, asked.dtype)
    most = options.size("max_device_memory", max_device_memory)
    budget = Budget(choose_device(asked.device, loaded), most)
    backend = _backend(asked, budget, plan.dtype())
    features = _features(asked)
    parts = _parts(asked, plan, of_modules, dtype, backend, features)
    checkpoint = base.of(written)
    origin = base.origin(plan.described)
    kept = keep(plan.adapters, plan.weights, asked.whole, origin)
    works = [(part.plan, part.work) for part in parts]
    changed = changes(plan, works, kept, origin, dtype, written.dense)
    ranks = _ranks(plan, parts)
    parts, matrices = uncut(parts, written, runtime)
    target, refit, notes = target_of(
        plan, dtype, asked, kept, ranks, checkpoint, written, changed, matrices
    )
    target, fitted = runtimes.written_for(runtime, written, target)
    if written.needs_base:
        target = in_numbers(target)
    by_part = (note for part in parts for note in part.said)
    said = (*by_part, *renamed, *of_format, *notes, *fitted)
    recipe = replace(
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
    target = replace(target, recipe_bytes=partial(_recipe_bytes, recipe, target))
    return Job(recipe, plan, parts, budget, target, written, refit, said, started, features)


def _plan(asked: Recipe, loaded: Sequence[Adapter], of_modules: OfModules) -> Plan:
    count = len(loaded)
    asked_of = {name: x["weights"] for name, x in of_modules.items() if "weights" in x}
    own = {name: tuple(check_weights(weights, count)) for name, weights in asked_of.items()}
    plan = Plan.make(loaded, weights_of(asked.weights, count), own)
    if not plan.names:
        raise OptionError("rules", "every module is left out", "let one be merged")
    return plan


def _backend(asked: Recipe, budget: Budget, dtype: torch.dtype) -> str:
    """For factors of this dtype."""
    backend = registry.choose(asked.backend, budget.device.type)
    if backend == registry.AUTO:
        backend = registry.choose_all(budget.device.type, dtype)
    why = "asked for"
    if asked.backend == AUTO:
        forced = os.environ.get(registry.ENVIRONMENT)
        why = f"{registry.ENVIRONMENT} names it" if forced else "by evidence (docs/kernels.md)"
    LOG.info("backend %s on %s: %s", backend, budget.device, why)
    return backend


def _parts(
    asked: Recipe,
    plan: Plan,
    of_modules: OfModules,
    dtype: torch.dtype,
    backend: str,
    features: FeaturesFile | None,
) -> tuple[Part, ...]:
    """With the steps before a method told whose factors they get."""
    names = tuple(a.name for a in plan.adapters)
    beside = Beside(names, features, asked.features_energy)
    before = tuple(PRE[name].bound(beside) for name in asked.pre)
    made = parts_of(asked, plan, of_modules, dtype, backend)
    return tuple(replace(x, work=replace(x.work, pre=before)) for x in made)


def _ranks(plan: Plan, parts: Sequence[Part]) -> Mapping[str, int]:
    """Of what is written, by module, in the plan's order."""
    of_parts = [part.work.ranks(part.plan) for part in parts]
    if len(of_parts) == 1:
        return of_parts[0]
    ranks = {n: r for own in of_parts for n, r in own.items()}
    return {n: ranks[n] for n in plan.names}


def _check_form(asked: Recipe) -> None:
    """What can be told before an adapter is read."""
    row = asked_for(asked)
    if row.needs_base and asked.base is None:
        raise OptionError("form", f"{asked.form!r} needs the base model", "give its folder as base")
    if asked.format or row.dense:
        is_ragged(asked, row)


def _features(asked: Recipe) -> FeaturesFile | None:
    """What layers are given, where a step takes it."""
    if asked.features is None:
        return None
    if all(PRE[name].of is None for name in asked.pre):
        raise OptionError("features", "no step takes them", "add 'osrm_project' to pre")
    return FeaturesFile(Path(asked.features.name))


def _told_scale(asked: Recipe, parts: Sequence[Part]) -> float | str | None:
    """What repeats the scale; parts may have their own where none was asked for."""
    if len(parts) > 1:
        return asked.scale
    return AUTO if parts[0].auto else parts[0].work.settings.scale


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
    dense = {n: replace(target.layouts[n], dense=True) for n in matrices}
    layouts = target.layouts if not dense else {**target.layouts, **dense}
    target = replace(target, layouts=layouts, changes=changed)
    target, refit, told = respelled(row, plan.adapters, target, asked.base_model)
    check_holds(row, target)
    styles = tuple(a.style for a in merging if a.style and a.style.format == row.name)
    target = replace(target, copied=files, base=base, styles=styles)
    return target, refit, (*kept.notes, *changed.notes, *notes, *told)


def _recipe_bytes(recipe: Recipe, target: Target) -> int:
    """What a recipe takes at most as a text within JSON, with the sums of its inputs, which it does
    not have yet."""
    of_base = target.base.known_by if target.base else []
    names = [file.path.name for file in (*target.files, *of_base)]
    names += [os.path.basename(recipe.features.name)] if recipe.features else []
    sums = sum(len(json.dumps({name: "0" * 64})) + 40 for name in names)
    bare = replace(recipe, base=recipe.base and Input(recipe.base.name))
    return len(json.dumps(recipe_text(bare))) + 2 * sums


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
