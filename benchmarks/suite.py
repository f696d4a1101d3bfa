"""Methods beside their dense textbook forms, in memory, on one module of every shape.

Ours: `dm.merge` of that module. Dense forms: plain PyTorch in float32, T matrices [m, n] and their
full SVDs, as the authors' code has them; PEFT's own function for `ties` (no SVD in either). Peak
memory is the process's most resident bytes in the call, beyond those before it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks
import files
import rivals
import torch
from rivals import Modules, Size
from torch import Tensor

import domerge_fast as dm
from domerge_fast.bench import machine, measure
from domerge_fast.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
WORKLOAD = "llama3-8b-8"
BUDGET = 20.0
"""Seconds for each dense form."""
DENSITY = 0.2


@dataclass(frozen=True)
class Form:
    """A dense form: merge(T updates [m, n]) -> ΔW, what it costs and how many [m, n] it holds."""

    merge: Callable[[list[Tensor]], Tensor]
    cost: Callable[[Size], float]
    copies: Callable[[Size], float]
    options: dict[str, Any]


def tsvm(updates: list[Tensor]) -> Tensor:
    """orth([U_1 .. U_T]) diag(S_1 .. S_T) orth([V_1 .. V_T])^T, the first min(m, n) / T of each."""
    count = min(updates[0].shape) // len(updates)
    parts = [torch.linalg.svd(x, full_matrices=False) for x in updates]
    u = torch.cat([u[:, :count] for u, _, _ in parts], 1)
    s = torch.cat([s[:count] for _, s, _ in parts])
    vh = torch.cat([vh[:count] for _, _, vh in parts])
    return _polar(u) * s @ _polar(vh)


def _polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def iso_c(updates: list[Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(torch.stack(updates).sum(0), full_matrices=False)
    return u @ vh * s.mean()


def knots(updates: list[Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    return u @ ties(list((s[:, None] * vh).chunk(len(updates), 1)))


def ties(updates: list[Tensor]) -> Tensor:
    from peft.utils.merge_utils import ties

    return ties(updates, torch.ones(len(updates)), DENSITY)


def _svd(s: Size, width: float = 1) -> float:
    """What an SVD of [m, width n] costs."""
    return min(s.m, width * s.n) ** 2 * max(s.m, width * s.n)


FORMS = {
    "tsvm": Form(tsvm, lambda s: s.adapters * _svd(s), lambda s: 4 * s.adapters, {}),
    "iso_c": Form(iso_c, _svd, lambda s: s.adapters + 4, {}),
    "knots": Form(
        knots, lambda s: _svd(s, s.adapters), lambda s: 5 * s.adapters, {"density": DENSITY}
    ),
    "core": Form(tsvm, lambda s: s.adapters * _svd(s), lambda s: 4 * s.adapters, {}),
    "ties": Form(
        ties,
        lambda s: s.adapters * s.m * s.n,
        lambda s: 5 * s.adapters,
        {"density": DENSITY, "form": "deltas"},
    ),
}
"""`core` merges by `tsvm` in its space, which is `tsvm` in the whole one."""


def run(rounds: int) -> dict[str, Any]:
    """Seconds of all modules and peak bytes of the largest one, ours and of the dense forms."""
    device = CPU
    adapters = WORKLOADS[WORKLOAD].adapters(device)
    errors = checks.check(adapters, device) | {"ties": _ties_error(adapters)}
    room = 0.9 * machine.free_bytes(device)
    rows = {}
    for method, form in FORMS.items():
        ours = _Ours(adapters, method, form.options, rounds)
        mine = rivals.estimate(adapters, ours, form.cost, lambda s: 0.0, float("inf"), room)
        dense = _Dense(adapters, form)
        theirs = rivals.estimate(
            adapters, dense, form.cost, lambda s, f=form: 4 * s.m * s.n * f.copies(s), BUDGET, room
        )
        rows[method] = {
            "seconds": mine.seconds,
            "dense": theirs.seconds,
            "scaled": theirs.scaled,
            "peak_bytes": ours.peaks,
            "dense_peak_bytes": dense.peaks,
        }
    return {
        "workload": WORKLOAD,
        "modules": len(WORKLOADS[WORKLOAD].modules),
        "backend": measure.usable(device)[0],
        "machine": machine.describe(device),
        "errors": errors,
        "methods": rows,
    }


def _ties_error(adapters: Sequence[dm.Adapter]) -> float:
    """Relative error of `ties` beside PEFT's function on the smallest module, or an exit."""
    name = rivals.one_of_each_shape(adapters)[0][0]
    expected = ties([b @ a.float() for a, b in rivals.factors(adapters, name, CPU)])
    found = dm.merge(
        _only(adapters, name), "ties", scale=1.0, density=DENSITY, form="deltas"
    ).delta(name)
    error = float((found - expected).norm() / expected.norm())
    if not error < checks.TOLERANCE:
        sys.exit(f"ties disagrees with PEFT: ΔW is off by {error:.1e}; nothing to report")
    return error


def _only(adapters: Sequence[dm.Adapter], name: str) -> list[dm.Adapter]:
    """The adapters with this module alone."""
    return [
        dm.from_tensors({name: a.factors(name)}, a.modules[name].scaling, name=a.name)
        for a in adapters
        if name in a.modules
    ]


class _Ours:
    """Seconds of `dm.merge` of one module, the median of some; `peaks`: bytes by module."""

    def __init__(
        self, adapters: Sequence[dm.Adapter], method: str, options: dict[str, Any], rounds: int
    ) -> None:
        self._adapters, self._method, self._options = adapters, method, options
        self._rounds = rounds
        self.peaks: dict[str, int] = {}

    def __call__(self, name: str) -> float:
        only = _only(self._adapters, name)

        def call() -> object:
            return dm.merge(only, self._method, scale=1.0, **self._options)

        call()
        times = []
        for _ in range(self._rounds):
            elapsed, self.peaks[name] = _watched(call)
            times.append(elapsed)
        return statistics.median(times)


class _Dense:
    """Seconds of a dense form on one module, from factors to ΔW, once; `peaks` as above."""

    def __init__(self, adapters: Sequence[dm.Adapter], form: Form) -> None:
        self._adapters, self._form = adapters, form
        self.peaks: dict[str, int] = {}

    def __call__(self, name: str) -> float:
        factors: Modules = rivals.factors(self._adapters, name, CPU)

        def call() -> object:
            return self._form.merge([b @ a.float() for a, b in factors])

        elapsed, self.peaks[name] = _watched(call)
        return elapsed


def _watched(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a call, and the most bytes that were resident beyond those before."""
    Path("/proc/self/clear_refs").write_text(files.RESET_PEAK)
    before = files.peak_bytes()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, files.peak_bytes() - before
