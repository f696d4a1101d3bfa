"""ΔW = λ sum_i w_i τ_i, exactly, by stacking the factors (task arithmetic, PEFT's "cat").

The result has rank R = sum r_i and costs one copy. The weights are taken as they are: eight
adapters of weight 1 are summed, not averaged. Source: arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..plan import Stack
from ..problem import Problem
from .base import Factors, Method, Settings


@dataclass(frozen=True)
class LinearOptions:
    """`linear` and `svd` have no options of their own."""


def merge(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: LinearOptions,
    settings: Settings,
) -> list[Factors]:
    weighted = [
        Problem(s.b.blocks, tuple(settings.scale * w * c for w, c in zip(s.weights, s.b.scales)))
        for s in stacks
    ]
    problems = [*(s.a for s in stacks), *weighted]
    stacked = ops.apply([None] * len(problems), problems, settings.dtype, backend=settings.backend)
    return [Factors(a, bt.T) for a, bt in zip(stacked, stacked[len(stacks) :])]


METHOD = Method(
    "linear",
    "exact weighted sum of the updates, rank R (task arithmetic)",
    LinearOptions,
    merge,
    cost="one copy of the factors",
    source="arXiv 2212.04089",
)
