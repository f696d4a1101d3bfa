"""After a merge: the update scaled to the mean norm of the adapters' own.

    ||ΔW||_F = |λ| mean_i ||w_i s_i B_i A_i||_F

over the adapters that have the module, as `pico` does: averages and orthogonalized factors lose
norm, sums gain it. λ is in ΔW before, and its sign stays. A ΔW that is zero stays zero. Cost: one
read of the adapters' factors and two of the merged ones of rank K, 2 K^2 (m + n) flops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ... import ops
from ...adapters.plan import Stack
from ...algebra.side import Side
from ..base import Settings
from ..made import Factors
from .base import PostStep
from .norms import norms

__all__ = ["STEP"]


def run(stacks: Sequence[Stack], merged: Sequence[Factors], settings: Settings) -> list[Factors]:
    given = norms([s.a for s in stacks], [s.b for s in stacks], settings.backend)
    wanted = [abs(settings.scale) * _mean(s, sizes) for s, sizes in zip(stacks, given)]
    a = [Side((f.a,), (1.0,)) for f in merged]
    b = [Side((f.b.T,), (1.0,)) for f in merged]
    found = norms(a, b, settings.backend)
    gains = [size / norm if norm else 1.0 for size, (norm,) in zip(wanted, found)]
    scaled = [*a, *(Side(x.blocks, (gain,)) for x, gain in zip(b, gains))]
    new = ops.apply([None] * len(scaled), scaled, settings.dtype, backend=settings.backend)
    pairs = zip(merged, new, new[len(merged) :])
    return [dataclasses.replace(f, a=x, b=yt.T) for f, x, yt in pairs]


def _mean(stack: Stack, sizes: Sequence[float]) -> float:
    """The mean of ||w_i s_i B_i A_i||_F."""
    return sum(abs(w) * size for w, size in zip(stack.weights, sizes)) / len(sizes)


STEP = PostStep("norm_match", "scale the merged update to the adapters' mean norm", run)
