"""`orthogonalize` beside torch's own sgemm on the same cores: the rate of each, taking turns."""

from __future__ import annotations

from typing import Any

import scaling
import torch

from domerge_fast import ops
from domerge_fast.bench import bounds, machine, measure, timing
from domerge_fast.methods.do import DoOptions

RANKS = (64, 128, 256, 512, 1024)
ADAPTERS = 8
SGEMM = 2048


def run(rounds: int) -> dict[str, Any]:
    """Seconds of a call on some problems of every R, with the flops they take, and of sgemm."""
    backend = measure.usable(scaling.CPU)[0]
    x, y = (torch.randn(SGEMM, SGEMM) for _ in range(2))
    options = DoOptions()
    rows = {}
    for rank in RANKS:
        grams, ranks = _problems(rank)

        def call(grams: Any = grams, ranks: Any = ranks) -> Any:
            return ops.orthogonalize(
                grams,
                ranks,
                penalty=options.penalty,
                gamma=options.gamma,
                steps=options.steps,
                tol=options.tol,
                backend=backend,
            )

        steps = call()[1][:, 0].tolist()
        calls = {"seconds": call, "sgemm": lambda: x @ y}
        rows[str(rank)] = {
            "problems": len(grams),
            "steps": sum(steps) / len(steps),
            "flops": bounds.orthogonalize([rank] * len(grams), steps).flops,
            **timing.take_turns(calls, scaling.CPU, rounds),
        }
    return {
        "machine": machine.describe(scaling.CPU),
        "backend": backend,
        "sgemm": {"size": SGEMM, "flops": 2 * SGEMM**3},
        "ranks": rows,
    }


def _problems(rank: int) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    """Grams of several problems: enough for all cores, and for a time that a clock can tell."""
    count = min(256, max(4, 2**31 // rank**3))
    made = scaling.workload(ADAPTERS, rank // ADAPTERS, count, 4 * rank)
    problems = [s.a for s in scaling.stacks(made)]
    return ops.gram(problems), [p.ranks for p in problems]
