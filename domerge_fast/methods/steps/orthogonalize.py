"""Before a merge: the adapters' factors pushed apart on both sides, as `do` does with its defaults.

The scalings s_i go into the B's. Cost: two reads of the factors, 2 R^2 (m + n) flops twice and a
few R x R products a step of the descent. Source: arXiv 2505.15875, step 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.side import Side
from .. import do
from ..base import Settings, grams
from .base import PreStep

__all__ = ["STEP"]


def run(stacks: Sequence[Stack], settings: Settings) -> list[Stack]:
    options, backend = do.DoOptions(), settings.backend
    wanted = [do.METHOD.needs_grams(s, options, backend) for s in stacks]
    grams_a, grams_b = grams(stacks, wanted, backend)
    a, b = do.orthogonalize(stacks, grams_a, grams_b, options, backend)
    sides = [*a, *b]
    moved = ops.apply(
        [x.c for x in sides], [x.problem for x in sides], torch.float32, backend=backend
    )
    return [
        dataclasses.replace(s, a=_shared_out(x, s.a.ranks), b=_shared_out(y, s.b.ranks))
        for s, x, y in zip(stacks, moved, moved[len(stacks) :])
    ]


def _shared_out(x: Tensor, ranks: Sequence[int]) -> Side:
    """The rows of x [R, d] as the adapters' blocks."""
    return Side(x.split_with_sizes(list(ranks)), (1.0,) * len(ranks))


STEP = PreStep("orthogonalize", "push the adapters' factors apart, as `do` does", run)
