"""Before a merge: every update with its singular values made equal, their sum kept.

    s_i B_i A_i = U S V^T,  B'_i = U sqrt(mean(S)),  A'_i = sqrt(mean(S)) V^T,  s'_i = 1

The mean is over the singular values that are not rounding noise. It is the smoothing of DC-Merge,
for any method; that one does its own (`dc_merge`), as it needs the singular vectors, which are
open once the values are equal. Cost: as `canonicalize`. Source: arXiv 2603.06242.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...adapters.plan import Stack
from ..base import Settings
from ..spectral.space import level
from . import canonicalize
from .base import PreStep

__all__ = ["STEP"]


def run(stacks: Sequence[Stack], settings: Settings) -> list[Stack]:
    return canonicalize.balanced(stacks, settings, mean)


def mean(s: Tensor) -> Tensor:
    """The mean of singular values s [P, r] in the place of those that are not zero."""
    return level(s)[..., 0] * (s > 0)


STEP = PreStep("smooth", "make the singular values of each update equal, their sum kept", run)
