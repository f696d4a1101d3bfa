"""Singular value calibration (svc.py) of merges that are given as factors, whatever made them.

The merge takes its place beside the adapters as one more block of the stack; in the coordinates of
all of them its singular triplets are found, and its calibrated factors are coefficients of the
whole stack. Cost: two Grams of R + k rows, an SVD of that size, and a pass over the stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...adapters.plan import Stack
from ...algebra.side import Side
from ..applying import factors
from ..base import Settings
from ..contract import Coefficients, Found
from ..made import Factors
from . import space, svc

__all__ = ["find", "make"]


def find(
    stacks: Sequence[Stack], merged: Sequence[Factors], settings: Settings
) -> list[Coefficients]:
    """Of the stacks, of one module each, with their merges."""
    found: dict[int, Coefficients] = {}
    together = beside(stacks, merged)
    for members, x, to_a, to_b in space.in_coordinates(together, settings.backend):
        *tasks, (b, a) = x.tasks()
        left, right, strengths, overlaps = svc.measured(tasks, b.mT, a)
        one = space.balanced(left, right, to_a, to_b)
        one = dataclasses.replace(one, strengths=strengths, overlaps=overlaps).settled()
        found |= {k: one.of_modules(slice(p, p + 1)) for p, k in enumerate(members)}
    return [found[k] for k in range(len(stacks))]


def make(
    stacks: Sequence[Stack],
    merged: Sequence[Factors],
    found: Sequence[Found],
    settings: Settings,
) -> list[Factors]:
    """λ times the calibrated merges, with the reports of those given, which are at λ = 1."""
    known = [x for x in found if isinstance(x, Coefficients)]
    new = factors(beside(stacks, merged), known, settings, bare=True)
    return [dataclasses.replace(f, a=x.a, b=x.b) for f, x in zip(merged, new)]


def beside(stacks: Sequence[Stack], merged: Sequence[Factors]) -> list[Stack]:
    """Every stack with its merge as the last block."""
    return [
        dataclasses.replace(
            s,
            adapters=(*s.adapters, -1),
            a=Side((*s.a.blocks, f.a), (*s.a.scales, 1.0)),
            b=Side((*s.b.blocks, f.b.T), (*s.b.scales, 1.0)),
            weights=(*s.weights, 1.0),
        )
        for s, f in zip(stacks, merged)
    ]
