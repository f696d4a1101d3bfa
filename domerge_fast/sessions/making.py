"""Merges at given coefficients that are made anew, and recipes that say coefficients."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..job import Job
from ..merged import Merged
from ..methods.thresholds import Counted
from ..options import suggest
from ..planning import plan_job
from ..reading import Source
from ..recipe import Recipe, Rule

__all__ = ["WRITTEN", "asked_of", "made", "made_all", "with_coefficients"]

WRITTEN = ("rank", "energy", "ragged", "form", "format", "runtime", "base", "dtype")
"""What is asked of a merge only when it is written."""


def asked_of(recipe: Recipe, asked: Mapping[str, Any]) -> Recipe:
    """The recipe with what is asked when its merge is written. OptionError."""
    for name in asked:
        if name not in WRITTEN:
            raise OptionError(name, "save has no such option", suggest(name, WRITTEN))
    own = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    given = own.pop("options")
    return Recipe.make(**{**own, **given, **asked})


def with_coefficients(recipe: Recipe, kappa: Tensor, names: Sequence[str]) -> Recipe:
    """The recipe of a merge with coefficients [modules, T]: weights, or a rule for each module
    where these differ."""
    rows = [tuple(row) for row in kappa.tolist()]
    if len(set(rows)) == 1:
        return dataclasses.replace(recipe, weights=rows[0])
    rules = tuple(
        Rule(glob.escape(name), weights=row) if any(row) else Rule(glob.escape(name), True)
        for name, row in zip(names, rows)
    )
    return dataclasses.replace(recipe, weights=(1.0,) * len(rows[0]), rules=(*recipe.rules, *rules))


def made(
    recipe: Recipe,
    sources: Sequence[Source],
    kappa: Tensor,
    names: Sequence[str],
    counted: Counted,
) -> Merged | None:
    """The merge at coefficients [modules, T], in memory: dense where its method is; None where all
    are 0. counted: what is known of the adapters' updates, and is kept."""
    if kappa.requires_grad:
        problem = f"no gradient goes through {recipe.method!r}"
        raise OptionError("kappa", problem, "detach it, or prepare 'core' with it inside")
    if not bool(kappa.any()):
        return None
    form = "deltas" if recipe.chosen.dense and not recipe.chosen.truncates else "adapter"
    asked = dataclasses.replace(with_coefficients(recipe, kappa, names), form=form, dtype="float32")
    return _job(asked, sources, counted).in_memory()


def made_all(
    recipe: Recipe,
    sources: Sequence[Source],
    kappas: Tensor,
    names: Sequence[str],
    counted: Counted,
    paths: Sequence[Path],
    overwrite: bool,
    force: bool,
    remarks: tuple[str, ...] = (),
) -> list[Merged]:
    """The merges at coefficients [N, modules, T], written one after the other. counted: as of
    `made`. remarks: for their cards."""
    found = []
    for kappa, path in zip(kappas, paths):
        job = _job(with_coefficients(recipe, kappa, names), sources, counted)
        job = dataclasses.replace(job, notes=(*job.notes, *remarks))
        found.append(job.written(path, overwrite, force))
    return found


def _job(recipe: Recipe, sources: Sequence[Source], counted: Counted) -> Job:
    """Told what is known of the updates, unless a step or an outer method makes others of them."""
    job = plan_job(recipe, sources)
    if recipe.pre or recipe.chosen.inner:
        return job
    parts = []
    for part in job.parts:
        settings = dataclasses.replace(part.work.settings, counted=counted)
        work = dataclasses.replace(part.work, settings=settings)
        parts.append(dataclasses.replace(part, work=work))
    return dataclasses.replace(job, parts=tuple(parts))
