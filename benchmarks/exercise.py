"""Runs every op of a backend on small ragged shapes and compares: short enough for a sanitizer.

compute-sanitizer python benchmarks/exercise.py cuda
"""

from __future__ import annotations

import argparse
import sys

import torch

from domerge_fast import ops
from domerge_fast.adapters.plan import Plan, Stack
from domerge_fast.algebra.entry_rules import Draw, Election, Trim
from domerge_fast.bench import cases
from domerge_fast.bench.checks import Checks
from domerge_fast.bench.workloads import Member, Shape, Workload

SHAPES = (
    Shape("tiny", 5, 7),
    Shape("odd", 33, 61),
    Shape("conv", 12, 45, (3, 3)),
    Shape("long", 40, 4100),
    Shape("vectors", 128, 96),
)
RANKS = ((1, 3, 5), (8, 8, 8), (16, 16, 16, 16), (64, 1, 40), (100, 90, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exercise(ranks: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> str:
    """What is wrong, or ""."""
    members = tuple(Member(rank, SHAPES[k % 2 :]) for k, rank in enumerate(ranks))
    adapters = Workload("ragged", "", members, dtype).adapters(torch.device("cpu"))
    plan = Plan.make(adapters, [1.0] * len(adapters))
    verdict = Checks(plan, dtype, len(SHAPES)).check(backend, device)
    stacks = [cases.stack(plan, name, device) for name in plan.names]
    grams = ops.gram([s.a for s in stacks], backend=backend)
    found, _ = ops.orthogonalize(
        grams, [s.a.ranks for s in stacks], penalty="frobenius", steps=2, backend=backend
    )
    if not bool(ops.largest(found, backend=backend).isfinite().all()):
        return verdict.refused or "orthogonalize (frobenius) is not finite"
    return verdict.refused or next(filter(None, (_entries(s, backend) for s in stacks)), "")


def _entries(stack: Stack, backend: str) -> str:
    """What is wrong with the elementwise ops, beside plain PyTorch, or ""."""
    draw = Draw(1, 2, stack.adapters)
    trims = [Trim(low=1e-4, keep=0.5, rescale=True) for _ in stack.adapters]
    election = Election("total", True, "weight")
    found = []
    for name in (backend, "torch"):
        arguments = (stack.a, stack.b, trims)
        merged = ops.entry_merge(*arguments, stack.weights, election, draw, backend=name).double()
        sums = ops.entry_sums(*arguments, draw, backend=name).flatten()
        upper = ops.entry_counts(stack.a, stack.b, backend=name).double().flatten()
        found.append((merged, sums, upper))
    for what, one, other in zip(("entry_merge", "entry_sums", "entry_counts"), *found):
        if not float((one - other).norm()) <= 0.02 * float(other.norm()):
            return f"{what} of {stack.name} disagrees with plain PyTorch"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    args = parser.parse_args()
    for ranks in RANKS:
        for dtype in DTYPES:
            wrong = exercise(ranks, dtype, args.backend, args.device)
            if wrong:
                sys.exit(f"ranks {ranks}, {dtype}: {wrong}")
    print(f"{args.backend}: {len(RANKS) * len(DTYPES)} sets of shapes, all right")


if __name__ == "__main__":
    main()
