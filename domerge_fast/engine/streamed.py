"""Merges adapters that are too many to hold: for some modules at a time they are read batch after
batch, once a pass, and nothing is kept of them but what the descents add up (methods/streamed)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..adapters.plan import Kind, Plan, Stack
from ..algebra import powers
from ..methods.streamed.descent import state_bytes
from ..recipe import NONE
from ..results.report import StackReport
from ..storage.garbage import uncollected
from ..storage.shelf import Shelf
from .interference import InterferenceSums
from .pipeline import Outcome, Progress, Sink
from .reader import Budget, Reader
from .scaling import Sums, rounded
from .streamed_module import Module, Update, finished, report
from .work import Work

__all__ = ["memory", "run"]

STATE_BYTES = 512 << 20
"""Of what is kept of a group of modules; one module may take more."""
PART_BYTES = 16 << 20
"""Of the factors of a batch of adapters, of one group."""
COPIES = 20
"""Bytes of a batch's copies for a byte of its factors: X and Xhat, in float64 and float32."""


@uncollected()
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
    more for every pass of the slowest descent of a group, and twice besides. All updates are [m, n]
    until they are written; where λ is found, they wait on a shelf."""
    shelf, reports = Shelf(), list[StackReport]()
    scaling = Sums(work.rule, work.merge_by_ratio) if work.rule else None
    total = len(plan.names) * (2 if work.twice else 1)
    worst, most = 0.0, 0
    scales: dict[int, float] = {}

    def give(merge: Update) -> None:
        result = finished(merge, work, scales.get(merge.count, 1.0))
        tensors = result.tensors
        if to_host:
            tensors = tuple(x.cpu() for x in tensors)
        sink([((merge.name,), tensors)])
        reports.append(report(plan, merge, result))
        progress(total - len(plan.names) + len(reports), total)

    with Reader.opened(plan, budget) as reader:
        done = 0
        for names in plan.groups(lambda name: _state(plan.kinds[name]) / STATE_BYTES):
            for module in _gone_through(reader, plan.only(names), work, sums):
                worst, most = max(worst, module.gap), max(most, module.passes)
                merge = module.merge(work)
                if scaling is None:
                    give(merge)
                    continue
                scaling.count(
                    *(module.name, module.weights, *module.given, merge.rows, merge.size),
                    true=2.0**module.unit,
                )
                shelf.put(merge.name, merge, merge.delta.nbytes)
                done += 1
                progress(done, total)
    if scaling:
        scales |= {n: rounded(x) for n, x in scaling.scales().items() if n > 1}
        for name in plan.names:
            give(shelf.take(name))
    return Outcome(reports, scales, (_note(plan, most, worst),))


def memory(plan: Plan) -> int:
    """Bytes that the largest group of modules takes."""
    state = max(_state(kind) for kind in set(plan.kinds.values()))
    return max(state, STATE_BYTES) + COPIES * PART_BYTES


def _state(kind: Kind) -> int:
    return state_bytes(kind.m) + state_bytes(kind.n) + 16 * kind.m * kind.n


def _note(plan: Plan, passes: int, gap: float) -> str:
    return (
        f"do read the adapters in batches, {passes + 2} times at most, instead of all at once: "
        f"what is left to its descents' optimum is estimated as at most {100 * gap:.2g} % of f"
    )


def _gone_through(
    reader: Reader, plan: Plan, work: Work, sums: InterferenceSums
) -> Iterator[Module]:
    """The plan's modules, merged."""
    options, device = work.method.options, reader.budget.device
    modules = {name: Module.of(plan, name, options, device) for name in plan.names}
    bounds = list(_bounds(plan))
    for module, stack in _batches(reader, plan, bounds, modules):
        module.measure(plan, stack)
    for module in modules.values():
        module.settle()
    while left := {name: x for name, x in modules.items() if not x.done}:
        for module, stack in _batches(reader, plan, bounds, left):
            module.step(stack)
        for module in left.values():
            module.settle()
    order = (work.rule.order or 2) if work.rule else None
    if order is None and sums.report != NONE:
        order = 2
    for module, stack in _batches(reader, plan, bounds, modules):
        module.add(stack, order)
    for name in plan.names:
        module = modules.pop(name)
        if sums.report != NONE:
            norms = powers.times(torch.cat(module.own, 1)[1].sqrt(), module.unit)
            sums.count(module.owners, norms[None])
        yield module


def _bounds(plan: Plan) -> Iterator[tuple[int, int]]:
    """The positions of adapters, batch by batch."""
    begin, filled = 0, 0
    for i, adapter in enumerate(plan.adapters):
        own = [adapter.stored[name] for name in plan.names if name in adapter.stored]
        size = sum(a.nbytes + b.nbytes for a, b in own)
        if filled and filled + size > PART_BYTES:
            yield begin, i
            begin, filled = i, 0
        filled += size
    yield begin, len(plan.adapters)


def _batches(
    reader: Reader, plan: Plan, bounds: Sequence[tuple[int, int]], modules: dict[str, Module]
) -> Iterator[tuple[Module, Stack]]:
    """Every batch of adapters, of one of the modules after the other."""
    chosen = plan.only([*modules])
    room = max(part.read_bytes(part.names) for part in _parts(chosen, bounds))
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
