"""From adapters to what is prepared of their merge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..adapters.adapter import called
from ..engine import pipeline as engine
from ..engine.interference import InterferenceSums, told
from ..engine.progress_bar import shown
from ..errors import AdapterError, OptionError
from ..formats import load
from ..job import Job, Progress
from ..planning import plan_job
from ..reading import Source
from ..recipe import DETAILS, NONE, Recipe
from .kinds.alike import Alike
from .making import WRITTEN
from .part import Part
from .prepared import Prepared
from .preparing import has_parts, prepared
from .sources import place

__all__ = ["prepare"]


def prepare(
    adapters: Iterable[Source],
    method: str,
    *,
    scale: float | str = 1.0,
    rank: int | None = None,
    pre: Sequence[str] = (),
    post: Sequence[str] = (),
    backend: str = "auto",
    device: str = "auto",
    whole: str = "auto",
    base_model: str | None = None,
    report: str = "full",
    features: str | os.PathLike[str] | None = None,
    features_energy: float | None = None,
    progress: Progress = False,
    **method_options: Any,
) -> Prepared:
    """Read adapters once, and keep all of their merge by `method` that weights do not change.

    adapters, method, pre, backend, device, whole, base_model, report, features, features_energy and
        the method's own options as of `merge`, without "details". post: "svc", after a spectral
        method.
    scale: λ; "auto" finds it once, at weights of 1.
    rank: what merges are cut to by a method that cuts by itself (svd); None: as in `merge`.
    progress: as of `merge`; modules are gone through three times where λ is found.

    Memory: the factors, in float32 for all methods but sums, R (m + n) numbers a module. Raises as
    `merge` does, and for what has no sum of factors as its merge: DoRA, changes of parameters
    beside factors, and factors whose sizes are beyond float32 products.
    """
    for name in method_options:
        if name == "weights_for" or name in {f.name for f in dataclasses.fields(Recipe)}:
            remedy = "give it to save" if name in WRITTEN else "leave it out"
            raise OptionError(name, "is no option of prepare", remedy)
    if report == DETAILS:
        problem = "'details' are of a merge, not of what merges are made from"
        raise OptionError("report", problem, "say full, norms or none")
    recipe = Recipe.make(
        method=method,
        scale=scale,
        rank=rank,
        pre=pre,
        post=post,
        backend=backend,
        device=device,
        whole=whole,
        base_model=base_model,
        report=report,
        features=features,
        features_energy=features_energy,
        **method_options,
    ).absolute()
    if isinstance(adapters, (str, os.PathLike)):
        raise OptionError("adapters", "is one adapter, not a list", "put it in a list: [adapter]")
    given = tuple(adapters)
    sources = tuple(load(x) if isinstance(x, (str, os.PathLike)) else x for x in given)
    job = plan_job(recipe, sources)
    _check(job, recipe)
    names = [a.name for a in job.plan.adapters]
    sums = InterferenceSums(names, told(recipe.report, len(names)))
    with torch.no_grad():
        return _of_job(recipe, sources, tuple(map(place, given)), job, sums, progress)


def _of_job(
    recipe: Recipe,
    sources: tuple[Adapter, ...],
    places: tuple[str | None, ...],
    job: Job,
    sums: InterferenceSums,
    progress: Progress,
) -> Prepared:
    work, plan = job.parts[0].work, job.plan
    keeps, gone = has_parts(work.method), 2 * len(plan.names) if work.twice else 0
    total = gone + keeps * len(plan.names)
    with shown(progress, total) as tell:
        scales = _scales(job, lambda done, _: tell(done, total)) if work.twice else {}
        given: list[Alike] = []
        parts: dict[str, Part] = {}
        if keeps:
            rest = job.budget.device, sums
            given, parts = prepared(plan, work, *rest, lambda done, _: tell(gone + done, total))
    alike = [dataclasses.replace(x, scale=_scale(x, scales, work.settings.scale)) for x in given]
    names = plan.names if keeps else ()
    return Prepared(
        recipe=recipe,
        method=work.method,
        sources=lambda: sources,
        places=places,
        adapters=tuple(a.name for a in plan.adapters),
        owners=plan.owners,
        shapes={name: (plan.module(name).m, plan.module(name).n) for name in plan.names},
        alike=tuple(alike),
        bases={name: parts[name].bases for name in names},
        norms={name: parts[name].norms for name in names},
        ranks={n: sum(x.ranks) for x in alike for n in x.names} or plan.ranks,
        interference=sums.result() if alike else None,
        scale=scales[max(scales)] if scales else work.settings.scale,
        scales=scales,
    )


def _scales(job: Job, progress: Callable[[int, int], None]) -> Mapping[int, float]:
    """λ by the number of adapters that have a module, found by a merge that is dropped."""
    given = job.plan, job.parts[0].work, job.budget, InterferenceSums((), NONE)
    return engine.run(*given, _dropped, False, progress).scales


def _scale(x: Alike, scales: Mapping[int, float], usual: float) -> Tensor:
    """λ of modules that are alike: 1 in search of another where one adapter alone has them."""
    own = scales.get(len(x.owners), 1.0) if scales else usual
    return torch.full((len(x.names),), own, dtype=torch.float64)


def _dropped(*_: object) -> None:
    """Of a merge that only finds λ."""


def _check(job: Job, recipe: Recipe) -> None:
    """AdapterError or OptionError for what is no merge of factors by coefficients."""
    part = job.parts[0]
    for k, adapter in enumerate(job.plan.adapters):
        if adapter.changed:
            problem = (
                f"{called(k, adapter)} changes {adapter.changed[0]!r} by no product of factors"
            )
            raise AdapterError(adapter.name, None, problem, "merge it as often as need be (merge)")
    work = part.work
    if work.post:
        problem = f"{recipe.post[-1]!r} is no part of what is prepared"
        raise OptionError("post", problem, "leave it out, or merge once for each weight (merge)")
    if work.calibrated and (work.calibrates_factors or work.method.truncates):
        problem = f"'svc' after {work.method.method.name!r} is not prepared"
        raise OptionError("post", problem, "leave it out, or take a spectral method, as 'tsvm'")
    if work.streamed:
        problem = "adapters that are read in batches are not prepared"
        raise OptionError("descent", problem, "prepare fewer, or give descent='whole'")
    if recipe.rank is not None and not part.work.method.truncates:
        problem = f"{part.work.method.method.name!r} does not cut by itself"
        raise OptionError("rank", problem, "give it to save")
