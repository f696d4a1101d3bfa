"""Merges adapters that are too many to hold: for some modules at a time they are read batch after
batch, once a pass, and nothing is kept of them but what the descents add up (methods/streamed)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from ..adapters.plan import Plan, Stack
from ..algebra import powers
from ..methods.streamed.descent import kept_bytes
from ..recipe import NONE
from ..results.report import StackReport
from ..storage.shelf import Shelf
from .interference import InterferenceSums
from .pipeline import Outcome, Progress, Sink
from .reader import Budget, Reader
from .scaling import Sums, rounded
from .streamed_module import Module, Past, Update, finished, report
from .work import Work

__all__ = [
    "Found",
    "Module",
    "estimated",
    "gone_through",
    "memory",
    "memory_of",
    "merged",
    "none_before",
    "run",
]

Found = Callable[[str], Past | None]
"""What there is of a module's first adapters."""

STATE_BYTES = 512 << 20
"""Of what is kept of a group of modules; one module may take more."""
PART_BYTES = 16 << 20
"""Of the factors of a batch of adapters, of one group."""
COPIES = 20
"""Bytes of a batch's copies for a byte of its factors: X and Xhat, in float64 and float32."""


def none_before(name: str) -> None:
    """Of adapters of which nothing was merged before."""


def run(
    plan: Plan,
    work: Work,
    budget: Budget,
    sums: InterferenceSums,
    sink: Sink,
    to_host: bool,
    progress: Progress,
) -> Outcome:
    """Merge as `pipeline.run` does, whose arguments and errors these are. The factors are read once
    more for every pass of the slowest descent of a group, and twice besides."""
    order = (work.rule.order or 2) if work.rule else None
    if order is None and sums.report != NONE:
        order = 2
    worst, most, few = 0.0, 0, False

    def seen() -> Iterator[Module]:
        nonlocal worst, most, few
        for module in gone_through(plan, work, budget, order):
            worst, most = max(worst, module.gap), max(most, module.passes)
            few |= module.few
            yield module

    found = merged(seen(), plan, work, sums, sink, to_host, progress)
    return replace(found, notes=(_note(most, worst, few),))


def merged(
    modules: Iterable[Module],
    plan: Plan,
    work: Work,
    sums: InterferenceSums,
    sink: Sink,
    to_host: bool,
    progress: Progress,
) -> Outcome:
    """Give what modules make to the sink, as `run`. All updates are [m, n] until they are written;
    where λ is found, they wait on a shelf."""
    shelf, reports = Shelf(), list[StackReport]()
    scaling = Sums(work.rule, work.merge_by_ratio) if work.rule else None
    total = len(plan.names) * (2 if work.twice else 1)
    scales: dict[int, float] = {}

    def give(merge: Update) -> None:
        result = finished(merge, work, scales.get(merge.count, 1.0))
        tensors = result.tensors
        if to_host:
            tensors = tuple(x.cpu() for x in tensors)
        sink([((merge.name,), tensors)])
        reports.append(report(plan, merge, result))
        progress(total - len(plan.names) + len(reports), total)

    for done, module in enumerate(modules, 1):
        if sums.report != NONE:
            norms = powers.times(torch.cat(module.own, 1)[1].sqrt(), module.unit)
            sums.count(module.owners, norms[None])
        merge = module.merge(work)
        if scaling is None:
            give(merge)
            continue
        scaling.count(
            *(module.name, module.weights, *module.given, merge.rows, merge.size),
            true=2.0**module.unit,
        )
        shelf.put(merge.name, merge, merge.delta.nbytes)
        progress(done, total)
    if scaling:
        scales |= {n: rounded(x) for n, x in scaling.scales().items() if n > 1}
        for name in plan.names:
            give(shelf.take(name))
    return Outcome(reports, scales, ())


def memory(plan: Plan) -> int:
    """Bytes that the largest group of modules takes."""
    return memory_of((kind.m, kind.n) for kind in plan.every_kind)


def memory_of(shapes: Iterable[tuple[int, int]]) -> int:
    """`memory` of modules [m, n]."""
    return max(STATE_BYTES, *(kept_bytes(m, n) for m, n in shapes)) + COPIES * PART_BYTES


def _note(passes: int, gap: float, few: bool) -> str:
    return (
        f"do read the adapters in batches, {passes + 2} times at most, instead of all at once: "
        f"what is left to its descents' optimum is estimated as {estimated(gap, few)}"
    )


def estimated(gap: float, few: bool) -> str:
    """What is left, in words. few: whether the adapters of a module are so few that it may be more
    than its estimate."""
    more = ", or some times that, as single adapters hold a large share of it" if few else ""
    percent = float(f"{100 * gap:.2g}")  # two digits, of 183 % also
    return f"at most {percent:g} % of f{more}"


def gone_through(
    plan: Plan,
    work: Work,
    budget: Budget,
    order: int | None,
    known: int = 0,
    before: Found = none_before,
    share: float = 1.0,
) -> Iterator[Module]:
    """The plan's modules, all of whose adapters are merged. order: of the norm of the adapters that
    λ takes, None where none is wanted. known: adapters, the first of the plan, of which `before`
    has what modules keep; of these modules the others are read, and the first ones only where what
    is left to the optimum is above `tol`. share: of `tol`, at which they stop."""
    with Reader.opened(plan, budget) as reader:
        of_kinds = [kept_bytes(kind.m, kind.n) / STATE_BYTES for kind in plan.every_kind]
        for at in plan.groups(plan.column(of_kinds)):
            names = plan.names[at.start : at.stop]
            yield from _of_group(reader, plan.only(names), work, order, known, before, share)


def _of_group(
    reader: Reader,
    plan: Plan,
    work: Work,
    order: int | None,
    known: int,
    before: Found,
    share: float,
) -> Iterator[Module]:
    options, device = work.method.options, reader.budget.device
    modules = {n: Module.of(plan, n, options, device, before(n), share) for n in plan.names}
    bounds = [*_bounds(plan, 0, known), *_bounds(plan, known, len(plan.adapters))]

    def batches(chosen: dict[str, Module]) -> Iterator[tuple[Module, Stack]]:
        late = {n: x for n, x in chosen.items() if x.past}
        yield from _batches(reader, plan, [x for x in bounds if x[0] >= known], late)
        rest = {n: x for n, x in chosen.items() if not x.past}
        yield from _batches(reader, plan, bounds, rest)

    grown = {n: x for n, x in modules.items() if not x.done}
    for module, stack in batches(grown):
        module.measure(plan, stack)
    for module in grown.values():
        module.settle()
    while left := {n: x for n, x in grown.items() if not x.done}:
        for module, stack in batches(left):
            module.step(stack)
        for module in left.values():
            module.settle()
    for module, stack in batches(grown):
        module.add(stack, order)
    for name in plan.names:
        yield modules.pop(name)


def _bounds(plan: Plan, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The positions of adapters, batch by batch."""
    filled = 0
    for i, adapter in enumerate(plan.adapters[begin:end], begin):
        own = [adapter.stored[name] for name in plan.names if name in adapter.stored]
        size = sum(a.nbytes + b.nbytes for a, b in own)
        if filled and filled + size > PART_BYTES:
            yield begin, i
            begin, filled = i, 0
        filled += size
    if begin < end:
        yield begin, end


def _batches(
    reader: Reader, plan: Plan, bounds: Sequence[tuple[int, int]], modules: dict[str, Module]
) -> Iterator[tuple[Module, Stack]]:
    """Every batch of adapters, of one of the modules after the other."""
    if not modules:
        return
    chosen = plan.only([*modules])
    room = max(part.read_bytes() for part in _parts(chosen, bounds))
    for stacks in reader.parts(_parts(chosen, bounds), room):
        for stack in stacks:
            for one in stack.each():
                yield modules[one.name], one
        del stacks


def _parts(plan: Plan, bounds: Sequence[tuple[int, int]]) -> Iterator[Plan]:
    """The plan of every batch of adapters that has any of the modules."""
    for begin, end in bounds:
        owners = {}
        for name, own in plan.owners.items():
            if part := own[bisect_left(own, begin) : bisect_left(own, end)]:
                owners[name] = part
        if owners:
            yield replace(plan, names=tuple(owners), owners=owners)
