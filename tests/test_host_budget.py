"""What a merge costs the host beside its kernels: in memory, λ = 1, kernels stubbed out, by `do`
and by a method that finds coefficients, on a CPU and by the CUDA backend in a GPU's groups.

Everything that is done module by module shows here: a model of experts has 18,000 of them, each a
few microseconds of kernels. Two measures. Calls of functions are the same on every run, and tell
when something is done once more for every module or block; those of the threads that read and
write are not counted. CPU time, of all threads, is in units of a fixed loop that is timed beside
it, as machines differ, and machines under load differ from themselves.
"""

from __future__ import annotations

import cProfile
import math
import pstats
import time
from collections.abc import Callable

import pytest
import torch
from support.stubbed import Stubs
from support.timing import least

import domerge_fast
from domerge_fast.adapters import Adapter
from domerge_fast.adapters.plan import GPU_GROUP_BYTES_IN_PLACE
from domerge_fast.bench.workloads import WORKLOADS, Workload
from domerge_fast.engine import reader
from domerge_fast.formats import from_tensors

MODULES = {"llama3-8b-8": 224, "moe-30b-4": 1000}

BUDGETS = {
    ("llama3-8b-8", "do", "cpu"): (150, 12.0),
    ("llama3-8b-8", "do", "cuda"): (23, 2.5),
    ("llama3-8b-8", "linear", "cpu"): (115, 9.0),
    ("llama3-8b-8", "linear", "cuda"): (18, 1.5),
    ("moe-30b-4", "do", "cpu"): (11.2, 5.0),
    ("moe-30b-4", "do", "cuda"): (5.3, 2.1),
    ("moe-30b-4", "linear", "cpu"): (8.6, 4.2),
    ("moe-30b-4", "linear", "cuda"): (4.0, 1.4),
}
"""Function calls a module, a tenth above those that were counted; and units of CPU time for all,
three times what was measured on two cores that others wanted too: calls tell of small changes,
times of what is no call."""


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


@pytest.fixture(params=BUDGETS, ids=" ".join)
def merge(request, monkeypatch) -> tuple[tuple[str, str, str], Stubs, Callable[[], object]]:
    """Workload, method and backend, the stubs, and one merge of it, which was warmed up."""
    name, method, backend = request.param
    whole = WORKLOADS[name]
    workload = whole.only({s.name for s in whole.modules[: MODULES[name]]})
    stubs, adapters = Stubs(workload), alike(workload)
    if backend == "cuda":
        stubs.on_gpu(monkeypatch)
        monkeypatch.setattr(reader, "GROUP_BYTES", GPU_GROUP_BYTES_IN_PLACE)
        monkeypatch.setattr(reader, "PORTION_CUBES", math.inf)
    else:
        stubs.on_cpu(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run() -> object:
        return domerge_fast.merge(adapters, method, scale=1, backend=backend)

    run()
    yield request.param, stubs, run
    torch.set_num_threads(threads)


def calls(run: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return sum(entry[1] for entry in pstats.Stats(profile).stats.values())


def test_calls_of_functions_a_module(merge):
    case, _, run = merge
    modules = MODULES[case[0]]
    assert modules < calls(run) <= BUDGETS[case][0] * modules


def test_cpu_time(merge):
    """Of one of thirty merges: what else the machine does only makes them longer."""
    case, stubs, run = merge
    limit = BUDGETS[case][1]
    assert least(lambda: units(stubs, run), limit, tries=30) <= limit


def units(stubs: Stubs, run: Callable[[], object]) -> float:
    """CPU time of a merge, in units timed beside it."""
    one, stubs.seconds = min(unit() for _ in range(3)), 0.0
    begin = time.process_time()
    run()
    return (time.process_time() - begin - stubs.seconds) / one
