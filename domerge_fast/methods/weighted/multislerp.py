"""Multi-SLERP: the mean of the updates' directions, as long as the updates are on average.

    ΔW = λ (sum_i w_i ||τ_i||) D / ||D||,  D = sum_i w_i τ_i / ||τ_i||,  w_i divided by sum w

where sum w is over the adapters that have the module. mergekit then takes a step in the plane that
touches the sphere at D / ||D||, to the weighted mean of the directions' projections on that plane.
The mean of the projections is the projection of the mean, D, and zero: there is no step. (A Karcher
mean, with arcs in the place of projections, is another point, and so is SLERP of two adapters that
do not weigh the same.)

An update that is zero adds no direction and shortens the rest. Where the directions cancel out,
||D|| <= 1e-6 sum |w|, there is no mean: with two adapters ΔW = λ (w_1 τ_1 + w_2 τ_2), as in
mergekit, with more of them it is an error. Negative weights subtract directions and lengths. The
result depends on the updates alone, not on their factors, and so is exact, of rank R. One adapter
comes back as it is. Cost: two reads of the factors and 2 R^2 (m + n) flops. Source: mergekit's
multislerp and https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.
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

CANCELLED = 1e-6
"""A mean of unit vectors of at most this length is rounding noise."""


@dataclass(frozen=True)
class MultislerpOptions:
    """`multislerp` has no options of its own."""


def coefficients(
    grams: Batch, state: State, weights: Tensor, options: MultislerpOptions
) -> Coefficients:
    return combined(gains(grams.names, weights, inner_products(grams)))


def gains(names: Sequence[str], weights: Tensor, products: Tensor) -> Tensor:
    """The coefficients c_i of modules by name for weights [.., P, T], through which gradients go.
    products: <τ_i, τ_j> [P, T, T]."""
    shares = shares_of(names, weights)
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    direction = shares * torch.where(norms > 0, 1 / norms, 0.0)
    square = (direction * (products @ direction[..., None])[..., 0]).sum(-1, keepdim=True)
    floor = (CANCELLED * shares.abs().sum(-1, keepdim=True)).square()
    present = square > floor
    lost = ~present[..., 0] & (norms > 0).any(-1)
    if weights.shape[-1] > 2 and bool(lost.any()):
        raise _cancelled(names[int(lost.flatten().nonzero()[0]) % len(names)])
    length = square.where(present, 1.0).sqrt()
    size = (shares * norms).sum(-1, keepdim=True)
    return torch.where(present, size / length * direction, shares)


def _cancelled(name: str) -> OptionError:
    problem = f"the updates of module {name!r} cancel out: they have no mean direction"
    return OptionError("weights", problem, "give others, or use 'linear'")


METHOD = Method(
    "multislerp",
    "the mean of the updates' directions, of their mean length",
    MultislerpOptions,
    coefficients=coefficients,
    takes=lambda options: NEEDS,
    by_ratio=lambda options: True,
    own_scale=True,
    cost="two reads of the factors, 2 R^2 (m + n) flops",
    source="mergekit",
)
