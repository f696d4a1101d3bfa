"""Runs every op of a backend on small ragged shapes and compares: short enough for a sanitizer.

compute-sanitizer python benchmarks/exercise.py cuda
"""

from __future__ import annotations

import argparse
import sys

import torch

from domerge_fast import ops
from domerge_fast.bench import cases
from domerge_fast.bench.gate import Gate
from domerge_fast.bench.workloads import Member, Shape, Workload
from domerge_fast.plan import Plan

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
    verdict = Gate(plan, dtype, len(SHAPES)).check(backend, device)
    stacks = [cases.stack(plan, name, device) for name in plan.names]
    grams = ops.gram([s.a for s in stacks], backend=backend)
    found, _ = ops.orthogonalize(
        grams, [s.a.ranks for s in stacks], penalty="frobenius", steps=2, backend=backend
    )
    finite = ops.all_finite(found, backend=backend)
    return verdict.refused or ("" if all(finite) else "orthogonalize (frobenius) is not finite")


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
