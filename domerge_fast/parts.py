"""The modules of a merge by what is done to them, settled from the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adapters.plan import Plan
from .engine import pipeline as engine
from .engine import streamed
from .engine.interference import InterferenceSums
from .engine.passes import ALONE, Passes
from .engine.reader import Budget, memory
from .engine.work import Cut, Work
from .errors import OptionError
from .formats.choose import asked_for
from .formats.format import Format
from .methods import choose
from .methods.base import Chosen, ScaleRule, Settings
from .methods.steps import POST
from .recipe import AUTO, Recipe, check_scale
from .runtimes.runtime import Runtime

__all__ = ["Part", "parts_of", "uncut"]


@dataclass(frozen=True)
class Part:
    """Modules to which the same is done. said: of what was taken where nobody chose. auto: whether
    λ is found from the adapters. patterns: of the rules that made them a part. done: the modules,
    where a session has merged their adapters already."""

    plan: Plan
    work: Work
    said: tuple[str, ...]
    auto: bool
    patterns: tuple[str, ...]
    done: Callable[[], Iterable[streamed.Module]] | None = None

    @property
    def passes(self) -> int:
        """How often it is gone through."""
        return 2 if self.work.twice else 1

    def run(
        self,
        budget: Budget,
        sums: InterferenceSums,
        sink: engine.Sink,
        to_host: bool,
        progress: engine.Progress,
        verify: bool = False,
        passes: Passes = ALONE,
    ) -> engine.Outcome:
        """Merge its modules (engine/pipeline.py, or engine/streamed.py). OptionError where batches
        of adapters are to be verified, or shared with other processes."""
        given = self.plan, self.work, budget, sums, sink, to_host, progress
        if not self.work.streamed:
            return engine.run(*given, passes=passes, verify=verify)
        if passes is not ALONE:
            problem = "adapters are read in batches, which one process does"
            raise OptionError("descent", problem, "merge without torchrun, or say descent='whole'")
        if verify:
            problem = "the reference takes all adapters at once, which are read in batches here"
            raise OptionError("verify", problem, "leave it out, or give descent='whole'")
        if self.done:
            return streamed.merged(self.done(), self.plan, self.work, *given[3:])
        return streamed.run(*given)

    def memory(self, budget: Budget) -> int:
        """Bytes that its largest group of modules takes."""
        if self.work.streamed:
            return streamed.memory(self.plan)
        return memory(self.plan, budget, self.work)


def parts_of(
    asked: Recipe,
    plan: Plan,
    of_modules: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    backend: str,
) -> Iterator[Part]:
    """The modules by what is done to them, those that no rule asks another merge of first."""
    if not of_modules:
        cut = Cut(asked.rank, asked.energy)
        yield _part(asked, plan, choose(asked.method, asked.options), cut, dtype, backend, ())
        return
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
        post=after,
        deltas=asked_for(asked).dense,
        narrowing=plan.wide,
        rule=rule,
        calibrated=calibrated,
        alone=alone,
        streamed=chosen.method.streams(chosen, plan.every_kind, _hindrance(asked)),
    )
    if work.restores_norms:
        said.append("auto: every module has the norm that it had before the cut")
    auto = asked.scale == AUTO or (asked.scale is None and not own_scale)
    return Part(plan, work, tuple(said), auto, patterns)


def _hindrance(asked: Recipe) -> str | None:
    """What is asked for that takes all adapters at once."""
    steps = (*asked.pre, *asked.post)
    return f"the step {steps[0]!r}" if steps else None


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


def uncut(
    parts: Sequence[Part], row: Format, runtime: Runtime | None
) -> tuple[tuple[Part, ...], frozenset[str]]:
    """The parts, told which modules are written as matrices, and these."""
    if not row.holds.differences or (runtime and not runtime.differences):
        return tuple(parts), frozenset()
    found = []
    for part in parts:
        work = dataclasses.replace(part.work, matrices=part.work.uncut(part.plan))
        found.append(dataclasses.replace(part, work=work))
    return tuple(found), frozenset().union(*(part.work.matrices for part in found))
