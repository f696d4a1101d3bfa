"""Takes a plan group by group through a method: read ahead, compute, write behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adapters.plan import Plan, Stack
from ..algebra.host import Rows
from ..backends.layout import recycled
from ..methods.contract import Found
from ..methods.groups import Groups, Here
from ..methods.running import Run, prepared
from ..recipe import FULL, NONE
from ..results.report import StackReport
from . import interference, precision, stops
from .first_pass import FirstPass
from .group import Group, measured
from .interference import InterferenceSums
from .merging import Merged, merged
from .passes import ALONE, Passes
from .progress_bar import untold
from .reader import Budget, Reader
from .scaled import Scaled
from .verifying import Verified, Verifying
from .work import Work
from .writer import Batch, Sink, Writer

__all__ = ["Batch", "Outcome", "Progress", "Sink", "one_by_one", "run", "survey"]

LOG = logging.getLogger(__name__)

Sum = TypeVar("Sum")
Progress = Callable[[int, int], None]


def one_by_one(plan: Plan, add: Callable[..., None]) -> Sink:
    """The sink that calls add(name, *tensors) for every module, in the plan's order."""
    place = {name: k for k, name in enumerate(plan.names)}

    def sink(batches: Sequence[Batch]) -> None:
        rows = [
            row
            for names, tensors in batches
            for row in zip(names, *([x] if x.dim() == 2 else x.unbind() for x in tensors))
        ]
        for name, *own in sorted(rows, key=lambda row: place[row[0]]):
            add(name, *own)

    return sink


def run(
    plan: Plan,
    work: Work,
    budget: Budget,
    sums: InterferenceSums,
    sink: Sink,
    to_host: bool,
    progress: Progress,
    passes: Passes = ALONE,
    verify: bool = False,
) -> Outcome:
    """Merge every module of the plan and give it to the sink.

    to_host: whether the sink wants the results in the host's memory, and lets go of them: it works
    in another thread then, and at once otherwise. passes:
    who else merges the plan; the sink and progress are told of what is merged here. verify: whether
    a sample of the modules is held against the reference. Raises AdapterError for a factor with NaN
    or Inf, before its module reaches the sink; OptionError for a module that is too large for the
    budget; DomergeError for a result that the dtype cannot hold, or that is not the reference's.
    """
    scaled = Scaled.of(plan, work)
    work = scaled.work
    of_all, sums = sums, sums.fresh()
    units = passes.units(plan)
    total = len(plan.names) * (2 if work.twice else 1)
    done = total - len(plan.names)
    recycling = recycled() if to_host else contextlib.nullcontext()
    with (
        recycling,
        Reader.opened(plan, budget, to_host) as reader,
        Writer.opened(sink, budget.device, reader.streams, to_host) as writer,
    ):
        method = prepared(work.method, _EveryGroup(reader, scaled, passes, units), work.inner)
        verifying = Verifying(plan, scaled, method) if verify else None
        first, seen = _gone_through(reader, scaled, method, sums, progress, passes, units)
        merging = passes.begin(units, writes=True)
        for chosen in merging.rounds(seen):
            noted = _Noted.fresh(sums)
            for stacks, last in reader.portions(work, units, chosen):
                if first:
                    given = reader, stacks, scaled, method, first
                    group, found = _seen_before(*given, sums.fresh())
                else:
                    group, found = _looked_at(plan, stacks, scaled, method, noted.sums), None
                if not work.in_batches(method):
                    group = group.apart()
                results = merged(scaled, method, group, found, first)
                verified = verifying.check(stacks, results, first) if verifying else {}
                shares = _shares(noted.sums, group, results)
                noted.reports += _reports(plan, results, shares, verified)
                writer.write([(s.names, r.tensors) for s, _, r in results])
                count = _modules(stacks)
                done += count
                _log(plan, stacks, "merged", done - total + len(plan.names))
                _tell(progress, done - count, done, total)
                if last is not None:
                    writer.after(merging.done, last, noted.plain())
                    noted = _Noted.fresh(sums)
                del stacks, group, results  # before another group is read
            writer.wait()
    reports: list[StackReport] = []
    for plain in merging.results():
        of_unit, counted = plain
        reports += map(StackReport.of_plain, of_unit)
        sums.take(counted)
    of_all.take(sums.plain())
    said = stops.notes(work.method, reports, sums.apart)
    return Outcome(reports, first.scales if first else {}, said)


def _tell(progress: Progress, begin: int, end: int, total: int) -> None:
    """Of every module from one count to another, where somebody is told."""
    for done in range(begin, end) if progress is not untold else ():
        progress(done + 1, total)


def _modules(stacks: Sequence[Stack]) -> int:
    return sum(len(s.names) for s in stacks)


def _log(plan: Plan, stacks: Sequence[Stack], what: str, done: int) -> None:
    if LOG.isEnabledFor(logging.DEBUG):
        names = [name for s in stacks for name in s.names]
        nbytes = sum(map(plan.factor_bytes, names))
        counts = len(names), what, nbytes / 1e6, done, len(plan.names)
        LOG.debug("%d modules %s, %.1f MB of factors; %d of %d are done", *counts)


@dataclass
class _Noted:
    """Of a unit: the reports of its modules, and what is counted of them."""

    sums: InterferenceSums
    reports: list[StackReport] = field(default_factory=list)

    @classmethod
    def fresh(cls, sums: InterferenceSums) -> _Noted:
        return cls(sums.fresh())

    def plain(self) -> tuple[Any, ...]:
        return [x.plain() for x in self.reports], self.sums.plain()


def _gone_through(
    reader: Reader,
    scaled: Scaled,
    method: Run,
    sums: InterferenceSums,
    progress: Progress,
    passes: Passes,
    units: Sequence[Sequence[str]],
) -> tuple[FirstPass | None, list[int]]:
    """What only the whole model tells, where that is needed, and the units that were gone through
    here."""
    work, plan = scaled.work, reader.plan
    if not work.twice:
        return None, []
    first, done, seen = FirstPass(work, method, scaled.of_weights), 0, list[int]()
    looking = passes.begin(units)
    for chosen in looking.rounds():
        noted = _Noted.fresh(sums)
        for stacks, last in reader.portions(work, units, chosen):
            group = _looked_at(plan, stacks, scaled, method, noted.sums)
            first.add(replace(group, stacks=scaled.weighted(group.stacks)))
            count = _modules(stacks)
            done += count
            _log(plan, stacks, "looked at", done)
            _tell(progress, done - count, done, 2 * len(plan.names))
            if last is not None:
                looking.done(last, (first.noted(), noted.sums.plain()))
                seen.append(last)
                noted = _Noted.fresh(sums)
            del stacks, group  # before another group is read
    for found, counted in looking.results():
        first.note(found)
        sums.take(counted)
    first.settle()
    return first, seen


def _looked_at(
    plan: Plan, stacks: Sequence[Stack], scaled: Scaled, method: Run, sums: InterferenceSums
) -> Group:
    """The group, counted into the sums."""
    work = scaled.work
    # λ, too, is found from Grams where these are not too large.
    of_all = sums.report == FULL or (
        work.rule is not None and len(plan.adapters) <= interference.MOST_COMPARED
    )
    wide, backend = work.wide_grams(method), work.settings.backend
    wanted = [of_all or (not work.pre and method.wants_grams(s, backend)) for s in stacks]
    return measured(plan, stacks, wanted, sums, backend, wide, method.bare)


def _seen_before(
    reader: Reader,
    stacks: Sequence[Stack],
    scaled: Scaled,
    method: Run,
    first: FirstPass,
    uncounted: InterferenceSums,
) -> tuple[Group, Sequence[Found | None]]:
    """The group as it was when the model was gone through, and what was found of it; where that was
    by another process, it is looked at again, with sums that nobody counts."""
    plan = reader.plan
    if not all(map(first.has, stacks)):
        group = _looked_at(plan, stacks, scaled, method, uncounted)
        first.add(replace(group, stacks=scaled.weighted(group.stacks)))
    given, norms, found = [], [], []
    for stack in stacks:
        at = 0
        while at < len(stack.names):
            seen = first.take(stack.names[at])
            end = at + (1 if seen.count is None else seen.count)
            part = stack.of_modules(at, end) if end - at < len(stack.names) else stack
            part = part.each()[0] if seen.count is None else part
            if seen.diagonals is not None:
                part = precision.centred(plan, part, seen.diagonals)
            given.append(part)
            norms.append(seen.norms)
            found.append(seen.found)
            at = end
    nothing: list[Tensor | None] = [None] * len(given)
    return Group(given, (nothing, nothing), norms, [None] * len(given)), found


@dataclass(frozen=True)
class Outcome:
    """The modules' reports, and the λ that was found, by the number of adapters a module has.
    notes: what has to be said of it, a sentence each."""

    modules: Sequence[StackReport]
    scales: Mapping[int, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _EveryGroup(Groups[Sequence[Stack]]):
    """The model's groups of modules as the method sees them, read once more on every pass; one a
    stack, but where the method takes batches."""

    reader: Reader
    scaled: Scaled
    passes: Passes
    units: Sequence[Sequence[str]]

    def summed(
        self, look: Callable[[Sequence[Stack]], Sum], add: Callable[[Sum, Sum], Sum]
    ) -> Sum | None:
        work, looking = self.scaled.work, self.passes.begin(self.units)
        for chosen in looking.rounds():
            found: Sum | None = None
            for stacks, last in self.reader.portions(work, self.units, chosen, apart=False):
                more = look(self._seen(stacks))
                found = more if found is None else add(found, more)
                if last is not None:
                    looking.done(last, found)
                    found = None
        return Here(looking.results()).summed(lambda x: x, add)

    def _seen(self, stacks: Sequence[Stack]) -> Sequence[Stack]:
        work = self.scaled.work
        wanted, uncounted = [False] * len(stacks), InterferenceSums((), NONE)
        group = measured(self.reader.plan, stacks, wanted, uncounted, work.settings.backend)
        if work.pre or not work.method.method.coefficients:
            group = group.apart()
        return work.before(self.scaled.weighted(group.stacks))


def survey(
    plan: Plan, budget: Budget, backend: str, sums: InterferenceSums, progress: Progress
) -> None:
    """Only the Grams, only counted into `sums`."""
    done = 0
    with Reader.opened(plan, budget) as reader:
        for stacks in reader.groups(None):
            measured(plan, stacks, [True] * len(stacks), sums, backend)
            count = _modules(stacks)
            done += count
            _tell(progress, done - count, done, len(plan.names))


def _shares(
    sums: InterferenceSums, group: Group, results: Sequence[Merged]
) -> Sequence[Sequence[Sequence[float]]]:
    """The share of every adapter that the merge keeps, by module of each result; () where that is
    not told."""
    if not sums.details:
        return [()] * len(results)
    powers = {name: s.powers for s in group.stacks for name in s.names}
    return [
        sums.details.add_merged(stack, powers[stack.name], result.tensors)
        for stack, _, result in results
    ]


def _reports(
    plan: Plan,
    results: Sequence[Merged],
    shares: Sequence[Sequence[Sequence[float]]],
    verified: Mapping[str, Verified],
) -> Iterator[StackReport]:
    names_of: dict[tuple[int, ...], tuple[str, ...]] = {}
    for (stack, given, result), kept in zip(results, shares):
        if stack.adapters not in names_of:
            names_of[stack.adapters] = tuple([plan.adapters[i].name for i in stack.adapters])
        made = result.made
        norms = made.norms or given
        if made.norms and given[0]:
            # Where sizes are far apart, the smallest may vanish in the method's float32 sums alone.
            found, known = Rows.of(made.norms).tensor, Rows.of(given).tensor
            norms = Rows(torch.where(found != 0, found, known))
        yield StackReport(
            stack.names,
            names_of[stack.adapters],
            result.rank,
            made.a_side,
            made.b_side,
            norms,
            result.kept,
            result.energy,
            kept,
            [verified.get(name) for name in stack.names] if verified else (),
        )
