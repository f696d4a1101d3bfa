"""SLERP: from one adapter to another along the arc between their updates.

    ΔW = λ (sin((1 - t) θ) τ_1 + sin(t θ) τ_2) / sin θ,  t = w_2 / (w_1 + w_2)

with θ the angle between τ_1 and τ_2 of a module, which keep their lengths. Where |cos θ| is above
0.9995 there is no one arc (or hardly any), and where an update is zero there is no angle: then
ΔW = λ ((1 - t) τ_1 + t τ_2). Only the weights' ratio counts; t outside of [0, 1], from a negative
weight, goes on along the circle. A module that one adapter alone has is that update as it is,
whatever its weight; three adapters may be merged as long as no module is in all of them. The result
depends on the updates alone, not on their factors, and so is exact, of rank R. Cost: two reads of
the factors and 2 R^2 (m + n) flops. Source: Shoemake, "Animating rotation with quaternion curves",
1985; the threshold is mergekit's, which takes θ = 90 degrees where an update is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import OptionError
from ..base import Method
from ..contract import Batch, Coefficients, State
from .combination import NEEDS, inner_products, shares_of
from .linear import combined

__all__ = ["METHOD", "gains"]

PARALLEL = 0.9995
"""|cos θ| above which interpolation is linear."""


@dataclass(frozen=True)
class SlerpOptions:
    """`slerp` has no options of its own."""


def coefficients(
    grams: Batch, state: State, weights: Tensor, options: SlerpOptions
) -> Coefficients:
    return combined(gains(grams.names, weights, inner_products(grams)))


def gains(names: Sequence[str], weights: Tensor, products: Tensor) -> Tensor:
    """The coefficients of modules by name for weights [.., P, T], through which gradients go.
    products: <τ_i, τ_j> [P, T, T]."""
    count = weights.shape[-1]
    _check_two(names, count)
    if count == 1:
        return torch.ones_like(weights)
    ends = shares_of(names, weights)
    size = (products[:, 0, 0] * products[:, 1, 1]).sqrt()
    cosine = torch.where(size > 0, products[:, 0, 1] / size, 1.0)
    plain = cosine.abs() > PARALLEL
    angle = cosine.where(~plain, 0.0).acos()[:, None]
    return torch.where(plain[:, None], ends, (ends * angle).sin() / angle.sin())


def _check_two(names: Sequence[str], count: int) -> None:
    if count > 2:
        problem = f"slerp is between two adapters, and {count} have {names[0]!r}"
        raise OptionError("method", problem, "use 'multislerp', or give two adapters")


METHOD = Method(
    "slerp",
    "two adapters, along the arc between their updates",
    SlerpOptions,
    coefficients=coefficients,
    takes=lambda options: NEEDS,
    by_ratio=lambda options: True,
    own_scale=True,
    cost="two reads of the factors, 2 R^2 (m + n) flops",
    source="Shoemake, 1985",
    needs="two adapters",
)
