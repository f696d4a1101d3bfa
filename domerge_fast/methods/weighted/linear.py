"""ΔW = λ sum_i w_i τ_i, exactly, by stacking the factors (task arithmetic, PEFT's "cat").

The result has rank R = sum r_i and costs one copy. The weights are taken as they are: eight
adapters of weight 1 are summed, not averaged. Source: arXiv 2212.04089.

`power` is ours (power.py): the singular values of ΔW to this power, its norm kept; one adapter is
changed too. It costs two reads of the factors, 2 R^2 (m + n) flops twice, two eigenproblems and an
SVD of R x R.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..base import Method
from ..contract import Batch, Coefficients, Needs, State
from ..spectral import power, space

__all__ = ["METHOD", "combined"]


@dataclass(frozen=True)
class LinearOptions:
    power: float = power.field()


def core(x: space.Coordinates, options: LinearOptions) -> tuple[Tensor, Tensor]:
    u, s, v = space.svd(x.b, x.a, x.norms.sum(1))
    return u * power.raised(s, options.power)[:, None], v.mT


def takes(options: LinearOptions) -> Needs:
    return Needs() if options.power == 1 else space.NEEDS


def coefficients(
    grams: Batch, state: State, weights: Tensor, options: LinearOptions
) -> Coefficients:
    if options.power == 1:
        return combined(weights)
    return space.coefficients(core, grams, state, weights, options)


def combined(gains: Tensor) -> Coefficients:
    """sum_i c_i τ_i with gains c_i [P, T]: the A's as they are, and the B's times c_i."""
    return Coefficients(a=None, b=gains)


METHOD = Method(
    "linear",
    "exact weighted sum of the updates, rank R (task arithmetic)",
    LinearOptions,
    coefficients=coefficients,
    core=core,
    takes=takes,
    sums=lambda options: options.power == 1,
    own_scale=True,
    cost="one copy of the factors",
    source="arXiv 2212.04089",
)
