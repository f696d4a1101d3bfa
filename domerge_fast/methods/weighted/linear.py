"""ΔW = λ sum_i w_i τ_i, exactly, by stacking the factors (task arithmetic, PEFT's "cat").

The result has rank R = sum r_i and costs one copy. The weights are taken as they are: eight
adapters of weight 1 are summed, not averaged. Source: arXiv 2212.04089.

`power` is ours (power.py): the singular values of ΔW to this power, its norm kept; one adapter is
changed too. It costs two reads of the factors, 2 R^2 (m + n) flops twice, two eigenproblems and an
SVD of R x R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.side import Side
from ..base import Factors, Merged, Method, Settings
from ..spectral import power, space


@dataclass(frozen=True)
class LinearOptions:
    power: float = power.field()


def core(x: space.Coordinates, options: LinearOptions) -> tuple[Tensor, Tensor]:
    u, s, v = space.svd(x.b, x.a, x.norms.sum(1))
    return u * power.raised(s, options.power)[:, None], v.mT


RAISED = space.method("linear", "the sum with its spectrum to a power", LinearOptions, core)


def merge(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: LinearOptions,
    settings: Settings,
) -> Merged:
    if options.power == 1:
        return stacked(stacks, settings)
    return RAISED.merge(stacks, grams_a, grams_b, options, settings)


def stacked(stacks: Sequence[Stack], settings: Settings) -> list[Factors]:
    """λ sum_i w_i τ_i of every stack."""
    weighted = [
        Side(s.b.blocks, tuple(settings.scale * w * c for w, c in zip(s.weights, s.b.scales)))
        for s in stacks
    ]
    problems = [*(s.a for s in stacks), *weighted]
    found = ops.apply([None] * len(problems), problems, settings.dtype, backend=settings.backend)
    return [Factors(a, bt.T) for a, bt in zip(found, found[len(stacks) :])]


METHOD = Method(
    "linear",
    "exact weighted sum of the updates, rank R (task arithmetic)",
    LinearOptions,
    merge,
    own_scale=True,
    cost="one copy of the factors",
    source="arXiv 2212.04089",
)
