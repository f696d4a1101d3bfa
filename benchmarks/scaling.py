"""How the time of a merge's compute grows, in memory: with adapters, rank, modules, width, threads.

Small modules, so that all of it takes a minute or two; every point is checked to be of a backend
that agrees with the float64 reference.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from domerge_fast import ops
from domerge_fast.adapters.plan import Plan, Stack
from domerge_fast.bench import cases, machine, measure, timing
from domerge_fast.bench.checks import Checks
from domerge_fast.bench.workloads import Member, Shape, Workload
from domerge_fast.methods.do import DoOptions

CPU = torch.device("cpu")
WIDTH, MODULES, ADAPTERS, RANK = 1024, 16, 8, 16

SERIES: dict[str, tuple[Sequence[int], Callable[[int], tuple[int, int, int, int]]]] = {
    "adapters, R = 128": ((8, 16, 32, 64), lambda x: (x, 128 // x, MODULES, WIDTH)),
    "adapters of rank 8": ((4, 8, 16, 32, 64), lambda x: (x, 8, MODULES, WIDTH)),
    "rank of 8 adapters": ((4, 8, 16, 32, 64), lambda x: (ADAPTERS, x, MODULES, WIDTH)),
    "modules": ((8, 16, 32, 64, 128), lambda x: (ADAPTERS, RANK, x, WIDTH)),
    "width m = n": ((512, 1024, 2048, 4096), lambda x: (ADAPTERS, RANK, MODULES, x)),
}
"""What grows, its values, and the adapters, rank, modules and width of each."""
THREADS = "threads"


def run(rounds: int) -> dict[str, Any]:
    """Seconds and mean steps of the descent of every point, by series and value."""
    backend = measure.usable(CPU)[0]
    _check(backend)
    with torch.no_grad():
        series = {name: _series(name, backend, rounds) for name in SERIES}
        series[THREADS] = _threads(backend, rounds)
    return {
        "machine": machine.describe(CPU),
        "backend": backend,
        "usual": {"adapters": ADAPTERS, "rank": RANK, "modules": MODULES, "width": WIDTH},
        "series": series,
    }


def workload(adapters: int, rank: int, modules: int, width: int) -> Workload:
    shapes = tuple(Shape(f"layers.{i}.square", width, width) for i in range(modules))
    return Workload("square", "", (Member(rank, shapes),) * adapters)


def stacks(made: Workload) -> list[Stack]:
    plan = Plan.make(made.adapters(CPU), [1.0] * len(made.members))
    return [cases.stack(plan, name, CPU) for name in plan.names]


def _check(backend: str) -> None:
    made = workload(ADAPTERS, 8, 1, 256)
    plan = Plan.make(made.adapters(CPU), [1.0] * ADAPTERS)
    refused = Checks(plan, made.dtype).check(backend, CPU).refused
    if refused:
        sys.exit(f"{backend} disagrees with the reference: {refused}; nothing to report")


def _series(name: str, backend: str, rounds: int) -> dict[str, dict[str, Any]]:
    values, shape = SERIES[name]
    made = {str(x): stacks(workload(*shape(x))) for x in values}
    calls = {x: _merge(given, backend) for x, given in made.items()}
    times = timing.take_turns(calls, CPU, rounds)
    return {x: {"seconds": times[x], "steps": _steps(made[x], backend)} for x in calls}


def _threads(backend: str, rounds: int) -> dict[str, dict[str, Any]]:
    given = stacks(workload(ADAPTERS, RANK, MODULES, WIDTH))
    most, call = torch.get_num_threads(), _merge(given, backend)
    found = {}
    for count in range(1, most + 1):
        torch.set_num_threads(count)
        times = timing.take_turns({"": call}, CPU, rounds)[""]
        found[str(count)] = {"seconds": times, "steps": _steps(given, backend)}
    torch.set_num_threads(most)
    return found


def _merge(given: Sequence[Stack], backend: str) -> timing.Call:
    return lambda: cases.merge(given, torch.bfloat16, cases.runner(backend), DoOptions(), backend)


def _steps(given: Sequence[Stack], backend: str) -> float:
    """The mean over modules and sides."""
    counts: list[float] = []

    def call(op: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(ops, op)(*arguments, backend=backend, **options)
        if op.startswith("orthogonalize"):
            counts.extend(result[1][:, 0].tolist())
        return result

    cases.merge(given, torch.bfloat16, call, DoOptions(), backend)
    return statistics.fmean(counts)
