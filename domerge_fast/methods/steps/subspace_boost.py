"""After a merge: weak singular values raised to a strong one, as `subspace_boost` does to a sum.

    ΔW = U S V^T  to  U diag(max(S, S_k)) V^T

with S_k by the default beta of `subspace_boost`. Cost: two reads of the merged factors of rank K,
2 K^2 (m + n) flops twice, two eigenproblems and an SVD of K x K. Source: arXiv 2506.16506.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from ...adapters.plan import Stack
from ...algebra.side import Side
from ..base import Chosen, Settings
from ..made import Factors
from ..running import prepared
from ..spectral import subspace_boost
from .base import PostStep

__all__ = ["STEP"]


def run(stacks: Sequence[Stack], merged: Sequence[Factors], settings: Settings) -> list[Factors]:
    chosen = Chosen(subspace_boost.METHOD, subspace_boost.SubspaceBoostOptions())
    boost = prepared(chosen, [], settings)
    given = [_alone(s, f) for s, f in zip(stacks, merged)]
    boosted = boost(given, dataclasses.replace(settings, scale=1.0))
    factors = cast("list[Factors]", boosted)
    return [dataclasses.replace(f, a=x.a, b=x.b) for f, x in zip(merged, factors)]


def _alone(stack: Stack, merged: Factors) -> Stack:
    """The merged factors as a module's only adapter."""
    a, b = Side((merged.a,), (1.0,)), Side((merged.b.T,), (1.0,))
    return Stack(stack.names, (0,), a, b, (1.0,))


STEP = PostStep("subspace_boost", "raise weak singular values to a strong one", run)
