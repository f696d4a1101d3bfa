"""search: tries merges out and keeps the best that has been shown to be within its constraints."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ... import options
from ...engine.progress_bar import shown
from ...errors import OptionError, some
from ...job import Progress
from ..densities import DENSITY
from ..prepared import Prepared
from . import samplers
from .budget import Budget
from .limits import limits_of
from .loop import Evaluator, Loop
from .mixing import check_together, with_density
from .models import Models
from .result import SearchResult, gated
from .rules import Rules
from .space import Layout, Space
from .store import Store

__all__ = ["search"]

LOG = logging.getLogger(__name__)
STARTS = ("default", "alone")


def search(
    prepared: Prepared | Mapping[str, Prepared],
    evaluator: Evaluator,
    space: Space | None = None,
    budget: Budget | None = None,
    strategy: str = "auto",
    *,
    constraints: Iterable[str] | Mapping[str, Any] | None = None,
    objectives: Sequence[str] = (),
    live: Any = None,
    population: int = 1,
    initial: Sequence[str] = ("default",),
    storage: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> SearchResult:
    """Try merges of prepared adapters out, and return the best that is within all constraints.

    prepared: of one method, or of several by name, all of the same adapters and modules; with
        several, every group of modules chooses one.
    evaluator: called as evaluator(model, budget) with a candidate in the model, and the number of
        examples to take, always the first so many of the same; returns a number, of which more is
        better, or {"score": number, "tasks": {name: number}, "constraints": {name: measure}}.
        With a population it is called with candidates=N and returns N of these. One that is
        not finite is a failed trial.
    space: what is searched; None: one coefficient an adapter.
    budget: how many candidates, of how many examples; None: 100, the evaluator decides.
    strategy: "tpe", "cma" (CMA-ES; constraints enter as a penalty), "nsga2", "gp", "random" or
        "ppo" (environment.py). "auto": "tpe" up to 60 choices, "cma" above, "nsga2" for several
        objectives.
    constraints: names of measures that have to be 0 or less, or {name: threshold}: the least that a
        `Rate` or a `Mean` must reach with 95 % confidence on all examples (limits.py), or
        `AtLeast`, `AtMost`.
    objectives: tasks that are objectives of their own; `pareto` then has what no other trial
        exceeds in all of them, and the best is that of the highest score.
    live: the model to put candidates into (Prepared.attach), left as it was at the end; None: the
        evaluator gets each merge in memory, a `Merged`.
    population: candidates evaluated together, in one forward pass of the live model.
    initial: what is tried first: "default", the prepared merge as it is (of several, the first);
        "alone", every adapter by itself.
    storage: a file to keep the study in. Several processes may share it; a search that was stopped
        or killed goes on where it was, and the trials of a killed process are taken up again.
    seed: the same trials, in one process.
    progress: as for `merge`, in trials. Ctrl-C ends the search with what was found so far.

    Raises OptionError for what cannot be searched, Infeasible where no candidate was shown to be
    within the constraints, and whatever the evaluator raises; the study keeps what was done.
    """
    space, budget = space or Space(), budget or Budget()
    several = dict(prepared) if isinstance(prepared, Mapping) else {"merged": prepared}
    layout = _layout(several, space)
    limits = limits_of(constraints)
    tasks = tuple(objectives)
    if len(tasks) == 1 or len(set(tasks)) < len(tasks):
        raise OptionError("objectives", f"{list(tasks)} are not several", "name two tasks or more")
    options.check("population", population, int, low=1)
    options.check("seed", seed, int, low=0, high=2**32 - 1)
    for name in initial:
        options.choose("initial", name, STARTS)
    strategy = samplers.chosen(strategy, layout.choices, len(tasks), space.pick)
    if population > 1 and (live is None or strategy == "ppo"):
        problem = "is for candidates in one forward pass of a live model"
        raise OptionError("population", problem, "give live, and another strategy than ppo")
    rules = Rules(limits, tasks, _rungs(budget, strategy, tasks), penalized=strategy == "cma")
    store = Store(storage, max(1, len(tasks)), _asked(layout, rules, evaluator))
    interrupted = False
    try:
        store.enqueue([] if strategy == "ppo" else _starts(layout, initial))
        with Models(several, live) as models, shown(progress, budget.trials, "trials") as show:
            loop = Loop(
                store=store,
                models=models,
                evaluator=evaluator,
                layout=layout,
                budget=budget,
                rules=rules,
                strategy=strategy,
                population=population,
                seed=seed,
                show=show,
            )
            try:
                if strategy == "ppo":
                    # Of an extra that only this strategy needs.
                    importlib.import_module(f"{__package__}.ppo").run(loop)
                else:
                    loop.run()
            except KeyboardInterrupt:
                interrupted = True
                LOG.warning("stopped with %d of %d trials", store.begun, budget.trials)
        data = getattr(evaluator, "digest", None)
        return gated(store.study, several, layout, rules, data, interrupted)
    finally:
        store.close()


def _rungs(budget: Budget, strategy: str, tasks: Sequence[str]) -> tuple[int | None, ...]:
    """The numbers of examples that candidates are evaluated on."""
    rungs = budget.rungs
    if strategy in samplers.HALVING and not tasks:
        return rungs
    return tuple(dict.fromkeys((rungs[0], rungs[-1]))) if strategy == "ppo" else rungs[-1:]


def _layout(several: Mapping[str, Prepared], space: Space) -> Layout:
    check_together(several, False, False)
    first = next(iter(several.values()))
    own = [p.recipe.options[DENSITY] for p in several.values() if with_density(p)]
    usual = own[0] if own else None
    layout = space.layout(first.modules, first.adapters, tuple(several), usual)
    used = {name: several[name] for name in layout.methods}
    mixed = len(layout.groups[0]) > 1 and len(used) > 1
    check_together(used, mixed, space.scale is not None)
    if space.density is not None:
        _check_densities(used, layout, space.density)
    return layout


def _check_densities(
    used: Mapping[str, Prepared], layout: Layout, bounds: tuple[float, float]
) -> None:
    """OptionError where no method has a density, or one cannot have those that are searched."""
    having = [p for p in used.values() if with_density(p)]
    if not having:
        problem = f"is searched, and {some(sorted(used))} keep all entries"
        raise OptionError(DENSITY, problem, "leave it out, or prepare 'core' with inner='ties'")
    apart = torch.tensor(bounds, dtype=torch.float64)[torch.tensor(layout.cells[1]) % 2]
    for prepared in having:
        for density in (*bounds, apart):
            prepared.at_density(density)


def _asked(layout: Layout, rules: Rules, evaluator: Evaluator) -> dict[str, Any]:
    """What makes trials comparable, by the word that a message has for it."""
    choices = [[c.name, c.low, c.high, list(c.names)] for c in layout.choices]
    modules = hashlib.sha256("\n".join(layout.modules).encode()).hexdigest()
    data = getattr(evaluator, "digest", None)
    return {"choices": choices, "modules": modules, "data": data, **rules.asked()}


def _starts(layout: Layout, initial: Sequence[str]) -> list[dict[str, float | str]]:
    """What is tried first; what the bounds leave out is not."""
    found = [layout.default] if "default" in initial else []
    if "alone" in initial:
        found += [layout.alone(i) for i in range(len(layout.adapters))]
    return [values for values in found if values is not None]
