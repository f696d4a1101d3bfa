"""Both forms of `do`'s descent side by side: python benchmarks/forms.py [BACKEND]

On one thread, CPU seconds, the least of a few, for the instruction set in force
(DOMERGE_CPU_ISA=avx2; that of torch's library is its own: MKL_ENABLE_INSTRUCTIONS=AVX2). First
GFLOP/s, from which the constants of domerge_fast/backends/descent_rates.py were taken; then what
the constants say of every shape, and what was faster.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from domerge_fast import _C, ops
from domerge_fast.algebra.side import Side
from domerge_fast.backends import descent_rates, registry
from domerge_fast.methods.do import DoOptions

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.5, 2.0)
COLUMNS = (256, 512, 1024, 2048)
MOST_FLOPS = 1.2e11
"""Of a descent on R x R matrices: what is larger is left out."""
RANK = 8


def side(rank: int, d: int) -> Side:
    """Adapters of rank 8 at random, alike in norm."""
    generator = torch.Generator().manual_seed(rank + d)
    blocks = [torch.randn(RANK, d, generator=generator) / d**0.5 for _ in range(rank // RANK)]
    return Side(tuple(x.bfloat16() for x in blocks), (1.0,) * len(blocks))


def least(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """CPU seconds of every call, taking turns."""
    found = [math.inf] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begin = time.process_time()
            call()
            found[i] = min(found[i], time.process_time() - begin)
    return found


def measured(rank: int, d: int, backend: str) -> str:
    """A row of the table."""
    x, options = side(rank, d), DoOptions()
    rule = {"gamma": options.gamma, "steps": options.steps, "tol": options.tol, "backend": backend}
    grams = ops.gram([x], backend=backend)
    c, on_squares = ops.orthogonalize(grams, [x.ranks], penalty="squared", **rule)
    _, on_factors = ops.orthogonalize_factors([x], **rule)
    rounds = max(2, min(8, int(2e9 / (rank * d * d))))
    squares, apply, factors = least(
        [
            lambda: ops.orthogonalize(grams, [x.ranks], penalty="squared", **rule),
            lambda: ops.apply(c, [x], torch.bfloat16, backend=backend),
            lambda: ops.orthogonalize_factors([x], **rule),
        ],
        rounds,
    )
    steps, factor_steps = float(on_squares[0, 0]), float(on_factors[0, 0])
    rates = [
        (7 * steps - 4) * rank**3 / squares,
        2 * rank**2 * d / apply,
        (2 + 4 * factor_steps) * rank * d**2 / factors,
    ]
    known = registry.load(backend).descent_rates(rank, d, options.tol)
    said = descent_rates.seconds(rank, d, known)
    shown = [f"{d}", f"{rank / d:g}", f"{1e3 * (squares + apply):.1f}", f"{1e3 * factors:.1f}"]
    shown += [f"{(squares + apply) / factors:.2f}", f"{said[0] / said[1]:.2f}"]
    shown += [f"{rate / 1e9:.0f}" for rate in rates]
    return f"| {' | '.join(shown)} |"


def main(backend: str = "cpu") -> None:
    torch.set_num_threads(1)
    print(f"{backend}, {_C.isa()}" if backend == "cpu" else backend)
    head = ["d", "R/d", "squares ms", "factors ms", "ratio", "said", *("GFLOP/s: squares", "C X")]
    print(f"| {' | '.join([*head, 'factors'])} |\n|{' --- |' * 9}")
    for d in COLUMNS:
        for share in SHARES:
            rank = int(share * d)
            if 17 * rank**3 <= MOST_FLOPS:
                print(measured(rank, d, backend), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
