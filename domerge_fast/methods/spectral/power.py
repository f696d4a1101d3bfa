"""The singular values of a merge raised to a power, its norm kept.

    ΔW = U diag(s) V^T  ->  g U diag(s^p) V^T,  g = ||s|| / ||s^p||

p = 1 is the merge itself; at p = 0 all singular values are equal, on the support alone: those that
are rounding noise beside ||s|| stay zero. One adapter is changed too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...options import option
from .space import NOISE

__all__ = ["are_orthonormal", "field", "raised"]

ORTHONORMAL = 1e-9
"""Within what the squared lengths of a polar factor's columns are 1, where they are orthonormal."""


def field() -> Any:
    return option(
        1.0, "power of the merged singular values, whose norm stays: 0 is flat", low=0.0, high=1.0
    )


def raised(s: Tensor, power: float) -> Tensor:
    """g s^p of singular values s [P, q]."""
    size = s.norm(dim=1, keepdim=True)
    present = s > NOISE * size
    values = torch.where(present, s.where(present, 1.0) ** power, 0.0)
    norm = values.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, size / norm, 0.0) * values


def are_orthonormal(x: Tensor) -> Tensor:
    """Of which modules the columns of polar factors x [P, K, q] are orthonormal, or zero: [P].

    X^T X projects on the rows of what X was made from: onto coordinates, if no column of it depends
    on others, and then all columns have length 1 or 0.
    """
    lengths = x.square().sum(1)
    return ((lengths - lengths.round()).abs() <= ORTHONORMAL).all(1)
