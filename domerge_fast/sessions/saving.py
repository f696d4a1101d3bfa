"""Merges of what was prepared, written by the writer of every merge, many in one pass."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops, runtimes
from ..adapters.whole_sum import Sum
from ..algebra import powers
from ..engine.work import Cut, Work
from ..errors import FlatCut, OptionError, some
from ..job import Job, versions
from ..merged import Merged
from ..planning import plan_job
from ..reading import Source
from ..recipe import AUTO, Recipe
from ..results.report import ModuleReport, Report
from ..storage.digests import Digests
from .making import with_coefficients
from .prepared_merge import Made, PreparedMerge
from .stored import Kept

__all__ = ["Writing", "writing", "written"]


@dataclass(frozen=True, eq=False)
class Writing:
    """A merge on its way to a folder. recipe: what repeats it. kept: what it is a merge of."""

    job: Job
    recipe: Recipe
    merge: PreparedMerge
    kept: Kept
    notes: tuple[str, ...]

    def give(self, name: str, sink: Callable[..., None]) -> ModuleReport:
        """Give a module to a sink, in what its format holds."""
        a, bt = (x.detach() for x in self.merge.wide(name))
        a, b, kept, energy = self._cut(name, a.float(), bt.float().mT)
        if self._work.deltas:
            sink(name, powers.product(name, a, b).cpu())
        elif name in self._work.matrices:
            sink(name, a.cpu(), b.cpu())
        else:
            pair = powers.fitted(name, a, b, (0, 0), self.job.target.dtype)
            sink(name, *(x.cpu() for x in pair))
        names = [self.job.plan.adapters[i].name for i in self.kept.owners[name]]
        norms: Sequence[float | None] = self.kept.norms[name] or [None] * len(names)
        return ModuleReport(name, len(a), None, None, dict(zip(names, norms)), kept, energy)

    @property
    def _work(self) -> Work:
        return self.job.parts[0].work

    def _cut(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """The factors as far as they are written, the energy kept, and that before a cut."""
        cut, wide = self._work.cut, len(a) > min(a.shape[1], len(b))
        if not cut and (not wide or self._work.deltas or name in self._work.matrices):
            return a, b, 1.0, 0.0
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
            raise powers.refusal(name, torch.float32, "large")
        energy = float(((a @ a.T).double() * (b.T @ b).double()).sum()) if cut else 0.0
        a, b, kept = _truncated(name, self.recipe.method, a, b, cut, self._work.settings.backend)
        if cut and self.recipe.scale == AUTO and 0 < kept < 1 and len(self.kept.owners[name]) > 1:
            b = b * kept**-0.5
        return a, b, kept, energy

    def report(self, modules: Mapping[str, ModuleReport], seconds: float) -> Report:
        """Of what was given."""
        job, ranks = self.job, [m.rank for m in modules.values()]
        said = job.format.notes(job.target, ranks)
        of_runtimes = runtimes.notes(job.recipe.runtime, job.format, job.target, ranks)
        return Report(
            recipe=self.recipe,
            scale=self.kept.scale,
            scales=self.kept.scales,
            versions=versions(),
            modules=modules,
            interference=self.kept.interference,
            seconds=seconds,
            notes=(*job.notes, *self.notes, *said, *of_runtimes),
        )


def writing(kept: Kept, recipe: Recipe, kappa: Tensor, merge: PreparedMerge | Made) -> Writing:
    """What writes the merge at coefficients [modules, T or R], as a recipe asks. OptionError as of
    `merge`, and where tensors that adapters save whole are added up, and coefficients do not say
    with which weights."""
    assert isinstance(merge, PreparedMerge)
    names, count = tuple(kept.shapes), len(kept.adapters)
    job = _planned(recipe, kept.sources(), kappa, names, count)
    told = job.recipe
    if kappa.shape[-1] == count:
        plain = dataclasses.replace(told, weights=None, rules=recipe.rules)
        told = with_coefficients(plain, kappa, names)
    told = dataclasses.replace(told, scale=kept.scale)
    return Writing(job, told, merge, kept, tuple(_notes(kept, kappa)))


def _notes(kept: Kept, kappa: Tensor) -> Iterator[str]:
    """What a recipe does not say of a merge."""
    yield from kept.remarks
    if kappa.shape[-1] != len(kept.adapters):
        yield "single directions have coefficients of their own, which no recipe repeats"
    elif absent := [n for n, c in zip(kept.adapters, kappa.T) if bool((c == 0).any())]:
        yield (
            f"coefficients of {some(absent)} are 0: what was prepared still counts these "
            "adapters, a merge by this recipe leaves them out there"
        )
    if len(set(kept.scales.values())) > 1:
        yield "modules that fewer adapters have took another scale, which no recipe repeats"


def _planned(
    recipe: Recipe, sources: Sequence[Source], kappa: Tensor, names: Sequence[str], adapters: int
) -> Job:
    """What writing a merge at coefficients [modules, T or R] takes: an adapter with a coefficient 0
    has its rank, so the job is one of none. OptionError where tensors that adapters save whole are
    added up, and coefficients do not say with which weights."""
    whole = kappa.shape[-1] == adapters
    present = torch.where(kappa == 0, 1.0, kappa) if whole else torch.ones(len(names), adapters)
    job = plan_job(with_coefficients(recipe, present, names), sources)
    added = [key for key, tensor in job.target.carried.items() if isinstance(tensor, Sum)]
    if added and not (whole and bool(kappa.all()) and bool((kappa == kappa[0]).all())):
        problem = f"{added[0]!r}, saved whole by adapters, is added up with one weight for each"
        remedy = "give one coefficient for each adapter, none of them 0, or prepare whole='drop'"
        raise OptionError("kappa", problem, remedy)
    return job


def written(
    writings: Sequence[Writing], paths: Sequence[Path], overwrite: bool, force: bool
) -> list[Merged]:
    """Write each to its folder, all in one pass over the modules, which all have: each appears
    whole, and none where one cannot be made."""
    started = time.perf_counter()
    jobs = [x.job for x in writings]
    modules: list[dict[str, ModuleReport]] = [{} for _ in jobs]
    found = []
    with contextlib.ExitStack() as stack:
        folders, sinks = [], []
        for job, path in zip(jobs, paths):
            assert job.format.write
            folder = stack.enter_context(job.format.write(path, job.target, overwrite, force))
            folders.append(folder)
            sinks.append(job.refit.sink(folder.add) if job.refit else folder.add)
        sums = stack.enter_context(Digests(jobs[0].files))
        for name in jobs[0].plan.names:
            for x, sink, reports in zip(writings, sinks, modules):
                reports[name] = x.give(name, sink)
        for x, job, folder, reports, path in zip(writings, jobs, folders, modules, paths):
            report = x.report(reports, time.perf_counter() - started)
            recipe = job.with_sums(report.recipe, sums)
            notes = (*report.notes, *folder.notes)
            report = dataclasses.replace(report, recipe=recipe, notes=notes)
            folder.finish(report)
            job.check_inputs()
            found.append(Merged(report, job.target, {}, path, refit=job.refit))
    return found


def _truncated(
    name: str, method: str, a: Tensor, b: Tensor, cut: Cut, backend: str
) -> tuple[Tensor, Tensor, float]:
    try:
        pairs, shares = ops.truncate([(a, b)], rank=cut.rank, energy=cut.energy, backend=backend)
    except FlatCut as error:
        raise error.of(name, method) from None
    (a, b), kept = pairs[0], shares[0] if cut else 1.0
    return a, b, kept
