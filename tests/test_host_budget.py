"""What a merge costs the host beside its kernels: in memory, `do`, λ = 1, kernels stubbed out.

Everything that is done module by module shows here: a model of experts has 18,000 of them, each a
few microseconds of kernels. Two measures. Calls of functions are the same on every run, and tell
when something is done once more for every module or block; those of the threads that read and
write are not counted. CPU time, of all threads, is in units of a fixed loop that is timed beside
it, as machines differ, and machines under load differ from themselves.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from support.stubbed import Stubs

import domerge_fast
from domerge_fast.adapters import Adapter
from domerge_fast.backends import cpu
from domerge_fast.bench.workloads import WORKLOADS, Workload
from domerge_fast.formats import from_tensors

BUDGETS = {"llama3-8b-8": (224, 420, 15.0), "moe-30b-4": (1000, 280, 28.0)}
"""Modules, function calls a module, and units of CPU time for all: a tenth above the calls that
were counted, and twice the time that was measured on a machine with much else to do."""


def alike(workload: Workload) -> list[Adapter]:
    """The workload's adapters in memory; modules of one shape share their factors."""
    made: dict[tuple[int, int], torch.Tensor] = {}

    def factor(*shape: int) -> torch.Tensor:
        return made.setdefault(shape, torch.ones(shape, dtype=workload.dtype))

    return [
        from_tensors(
            {s.name: (factor(member.rank, s.n), factor(s.m, member.rank)) for s in member.modules},
            2,
            name=f"adapter-{i}",
        )
        for i, member in enumerate(workload.members)
    ]


def unit() -> float:
    """CPU seconds of 100,000 rounds of a loop as plain as Python gets."""
    begin = time.process_time()
    kept: dict[int, tuple[int, int]] = {}
    total = 0
    for k in range(100_000):
        kept[k & 1023] = k, total
        total += len(kept)
    return time.process_time() - begin


@pytest.fixture(params=BUDGETS)
def merge(request, monkeypatch) -> tuple[str, Stubs, Callable[[], object]]:
    """Name of the workload, the stubs, and one merge of it, which was warmed up."""
    name = request.param
    whole = WORKLOADS[name]
    workload = whole.only({s.name for s in whole.modules[: BUDGETS[name][0]]})
    stubs, adapters = Stubs(workload), alike(workload)
    monkeypatch.setattr(cpu, "_C", stubs.extension)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run() -> object:
        return domerge_fast.merge(adapters, "do", scale=1, backend="cpu")

    run()
    yield name, stubs, run
    torch.set_num_threads(threads)


def calls(run: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return sum(entry[1] for entry in pstats.Stats(profile).stats.values())


def test_calls_of_functions_a_module(merge):
    name, _, run = merge
    modules, most, _ = BUDGETS[name]
    assert modules < calls(run) <= most * modules


def test_cpu_time(merge):
    name, stubs, run = merge
    assert best(stubs, run) <= BUDGETS[name][2]


def best(stubs: Stubs, run: Callable[[], object], times: Sequence[int] = range(5)) -> float:
    """The least of several merges, in units timed beside each."""
    found = []
    for _ in times:
        one, stubs.seconds = min(unit() for _ in range(3)), 0.0
        begin = time.process_time()
        run()
        found.append((time.process_time() - begin - stubs.seconds) / one)
    return min(found)
