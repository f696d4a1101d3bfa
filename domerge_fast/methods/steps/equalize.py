"""Before a merge: all updates of a module scaled to one norm.

    s'_i = s_i mean_j ||s_j B_j A_j||_F / ||s_i B_i A_i||_F

The mean is over all adapters that have the module. An update that is zero stays zero; weights act
on what comes out. Only scalings change, as if the adapters had another alpha: it is B that holds
an adapter's size, while A keeps about that of its initialization. This step is ours: it takes the
uneven efforts that adapters were trained with out of every method, as `do` does column by column.
Cost: one read of the factors and 2 r_i^2 (m + n) flops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...adapters.plan import Stack
from ..base import Settings
from .base import PreStep
from .norms import norms

__all__ = ["STEP"]


def run(stacks: Sequence[Stack], settings: Settings) -> list[Stack]:
    found = norms([s.a for s in stacks], [s.b for s in stacks], settings.backend)
    return [_equalized(s, sizes) for s, sizes in zip(stacks, found)]


def _equalized(stack: Stack, sizes: Sequence[float]) -> Stack:
    mean = sum(sizes) / len(sizes)
    scales = [c * mean / size if size else c for c, size in zip(stack.b.scales, sizes)]
    return dataclasses.replace(stack, b=stack.b.scaled(tuple(scales)))


STEP = PreStep("equalize", "scale a module's updates to one norm, their mean", run)
