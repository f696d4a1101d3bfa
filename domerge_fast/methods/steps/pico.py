"""Before a merge: what the B's share calibrated down, as `pico` does but without its rescaling.

    B'_i = U diag(α) U^T B_i

with U and α of `pico`; the scalings s_i and the A's stay. The result depends on how an update is
split into B_i and A_i. Cost: two reads of the B's, 2 R^2 m flops twice and the inverse of an R x R
matrix. Source: arXiv 2604.16826.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ... import ops
from ...adapters.plan import Stack
from ...algebra.side import Side
from ..base import Settings
from ..spectral import pico
from .base import PreStep, alike

__all__ = ["STEP"]


def run(stacks: Sequence[Stack], settings: Settings) -> list[Stack]:
    bare = [s.b.scaled((1.0,) * len(s.b.scales)) for s in stacks]
    coefficients = ops.gram(bare, dtype=torch.float64, backend=settings.backend)
    for members in alike((p.rank, len(p.ranks)) for p in bare):
        grams = torch.stack([coefficients[k] for k in members])
        for k, c in zip(members, pico.calibration(grams, len(bare[members[0]].ranks)).float()):
            coefficients[k] = c
    calibrated = ops.apply(coefficients, bare, torch.float32, backend=settings.backend)
    return [
        dataclasses.replace(s, b=Side(x.split_with_sizes(s.b.ranks), s.b.scales))
        for s, x in zip(stacks, calibrated)
    ]


STEP = PreStep("pico", "calibrate down what the adapters' B's share", run)
