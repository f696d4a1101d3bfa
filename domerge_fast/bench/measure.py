"""Times every op and a whole merge's compute on every backend, beside what the machine could do."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapter
from ..adapters.plan import Plan, Stack
from ..backends import registry
from ..backends.gpu.roots import MAX_RANK
from ..errors import DomergeError
from ..methods.do import DoOptions
from ..storage.lazy import dtype_name
from . import bounds, cases, machine, timing
from .bounds import NOTHING, Rates, Work
from .cases import Case
from .checks import Checks
from .timing import Call

__all__ = ["Result", "Row", "Say", "modules_that_fit", "run", "usable"]

MERGE = "merge"
CAPTURED = ("gram", "orthogonalize", "apply", "block_gram", "apply_decouple")
"""Ops of the CUDA and Triton backends that wait for nothing while a CUDA graph is captured."""
ROOM = 6
"""Memory a measurement takes, in factor bytes: the factors, what the ops make of them, and what
they make of it when they are timed."""

Say = Callable[[str], None]
HEAD = ("op", "backend", "µs", "from", "to", "GB/s", "TFLOP/s", "bound", "reached")


@dataclass(frozen=True)
class Row:
    """Seconds of an op on a backend, with its work and the least time for that on this machine.

    graph: whether they are those of a CUDA graph's replays. limit: "bytes" or "flops".
    """

    op: str
    backend: str
    graph: bool
    modules: int
    seconds: tuple[float, ...]
    bytes: float
    flops: float
    bound: float
    limit: str

    def cells(self) -> tuple[str, ...]:
        """The row under HEAD."""
        median = statistics.median(self.seconds)
        times = (median, min(self.seconds), max(self.seconds))
        return (
            self.op,
            self.backend + (" graph" if self.graph else ""),
            *(f"{1e6 * t:.0f}" for t in times),
            f"{self.bytes / median / 1e9:.1f}",
            f"{self.flops / median / 1e12:.2g}",
            f"{1e6 * self.bound:.0f}",
            f"{100 * self.bound / median:.0f} % {self.limit}",
        )


@dataclass(frozen=True)
class Result:
    """What was measured, on what. errors: of the ops by backend. refused: backends that disagree
    with the oracle, and how; they have no rows."""

    source: str
    device: str
    machine: dict[str, object]
    dtype: str
    adapters: int
    modules: int
    modules_in_all: int
    factor_bytes: int
    rates: Rates
    errors: dict[str, dict[str, float]]
    refused: dict[str, str]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> list[tuple[str, ...]]:
        return [HEAD, *(row.cells() for row in self.rows)]

    def summary(self) -> list[str]:
        """What the table is of, and what the bounds stand on."""
        where = self.machine.get("gpu", f"{self.machine['cpu']}, {self.machine['threads']} threads")
        part = "" if self.modules == self.modules_in_all else f" of {self.modules_in_all}"
        gemm = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in self.rates.gemm.items())
        worst = {name: max(found.values()) for name, found in self.errors.items()}
        errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        return [
            f"{self.source}: {self.adapters} adapters, {self.modules}{part} modules, "
            f"{self.factor_bytes / 1e9:.3g} GB of {self.dtype} factors; {where}",
            f"measured here: copy {self.rates.copy / 1e9:.1f} GB/s; GEMM TFLOP/s: {gemm}",
            f"largest relative error against the float64 reference: {errors}",
        ]


def modules_that_fit(sizes: dict[str, int], most: int | None, device: torch.device) -> list[str]:
    """The first modules (name -> factor bytes), `most` of them, as far as memory allows.

    Raises DomergeError if the first one is too large.
    """
    room = machine.free_bytes(device) // ROOM
    totals = itertools.accumulate(sizes.values())
    names = [name for name, total in zip(sizes, totals) if total <= room]
    if not names:
        raise DomergeError(f"no module fits {room >> 20} MiB of factors; use another device")
    return names[:most]


def run(
    source: str,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    modules_in_all: int,
    backends: Iterable[str],
    device: torch.device,
    repeat: int,
    profile: Path | None = None,
    say: Say = lambda what: None,
) -> Result:
    """Hold the backends against the oracle and time those that agree, on the named modules.

    modules_in_all: how many the source has. profile: where to write a Chrome trace of one merge
    on the first backend.
    """
    plan = Plan.make(adapters, [1.0] * len(adapters))
    dtype = plan.dtype()
    with torch.no_grad(), _current(device):
        say("the oracle")
        checks = Checks(plan.only(names), dtype)
        verdicts = {}
        for backend in backends:
            say(f"{backend} against the oracle")
            verdicts[backend] = checks.check(backend, device)
        refused = {b: v.refused for b, v in verdicts.items() if v.refused}
        good = [b for b in verdicts if b not in refused]
        say("the machine's rates")
        rates = bounds.measure(device)
        rows: list[Row] = []
        if good:
            stacks = [cases.stack(plan, name, device) for name in names]
            rows = list(_rows(stacks, dtype, good, device, repeat, rates, say))
            if profile is not None:
                trace(stacks, dtype, good[0], device, profile)
    return Result(
        source=source,
        device=str(device),
        machine=machine.describe(device),
        dtype=dtype_name(dtype),
        adapters=len(adapters),
        modules=len(names),
        modules_in_all=modules_in_all,
        factor_bytes=sum(plan.factor_bytes(name) for name in names),
        rates=rates,
        errors={b: v.errors for b, v in verdicts.items()},
        refused=refused,
        rows=rows,
    )


def usable(device: torch.device) -> list[str]:
    """The backends that can run on the device, but for the oracle, which would take hours."""
    return [
        name
        for name, status in registry.backends().items()
        if status.available
        and name != "reference"
        and (not status.devices or device.type in status.devices)
    ]


def trace(
    stacks: Sequence[Stack], dtype: torch.dtype, backend: str, device: torch.device, path: Path
) -> None:
    """A Chrome trace of one merge's compute, after one that warms up."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    call = _merge(stacks, dtype, backend)
    call()
    with profile(activities=kinds) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _rows(
    stacks: Sequence[Stack],
    dtype: torch.dtype,
    backends: Sequence[str],
    device: torch.device,
    repeat: int,
    rates: Rates,
    say: Say,
) -> Iterator[Row]:
    """All ops in the order of a merge, then the whole of it."""
    say("inputs of the ops")
    recorded = cases.record(stacks, dtype, backends[0], DoOptions())
    own = max(max(s.a.ranks) for s in stacks)
    of_merge = {case.op for case in recorded}.difference(cases.BESIDE)
    jobs: dict[str, tuple[Callable[[str], Call], Work, int]] = {}
    for op in dict.fromkeys(case.op for case in recorded):
        calls = [case for case in recorded if case.op == op]
        count = min(cases.TRUNCATED, len(stacks)) if op == "truncate" else len(stacks)
        jobs[op] = _calls(calls), sum((case.work for case in calls), NOTHING), count
    jobs[MERGE] = (
        (lambda b: _merge(stacks, dtype, b)),
        merge_work(stacks, dtype, recorded),
        len(stacks),
    )
    for op, (call_of, work, count) in jobs.items():
        say(op)
        bound, limit = rates.seconds(work)
        for graph in (False, True):
            taken = of_merge if op == MERGE else {op}
            members = [b for b in backends if not graph or _captures(taken, b, device, own)]
            calls_of = {b: call_of(b) for b in members}
            if graph:
                calls_of = {b: timing.captured(call, device) for b, call in calls_of.items()}
            for backend, times in timing.take_turns(calls_of, device, repeat).items():
                seconds = tuple(times)
                yield Row(op, backend, graph, count, seconds, work.bytes, work.flops, bound, limit)


def _calls(recorded: Sequence[Case]) -> Callable[[str], Call]:
    return lambda backend: lambda: [case.run(backend) for case in recorded]


def _merge(stacks: Sequence[Stack], dtype: torch.dtype, backend: str) -> Call:
    return lambda: cases.merge(stacks, dtype, cases.runner(backend), DoOptions(), backend)


def _captures(taken: Collection[str], backend: str, device: torch.device, own: int) -> bool:
    """Whether a call that takes these ops can be a CUDA graph. own: the largest r_i; above MAX_RANK
    library calls that find roots wait."""
    on_gpu = device.type == "cuda" and backend in ("cuda", "triton")
    decouples = "apply_decouple" in taken and own > MAX_RANK
    return on_gpu and set(taken) <= set(CAPTURED) and not decouples


def merge_work(stacks: Sequence[Stack], dtype: torch.dtype, recorded: Sequence[Case]) -> Work:
    """The flops of a merge's ops, with its factors read once and its results written once."""
    ops = [case.work for case in recorded if case.op not in cases.BESIDE]
    flops = sum(ops, NOTHING).flops_in
    problems = [p for s in stacks for p in (s.a, s.b)]
    read = sum(x.numel() * x.element_size() for p in problems for x in p.blocks)
    return Work(read + sum(p.rank * p.d for p in problems) * dtype.itemsize, flops)
