"""TSV-Merge: the singular vectors of all updates, orthogonalized together.

    τ_i = U_i S_i V_i^T,  ΔW = λ orth([U_1 .. U_T]) diag(S_1 .. S_T) orth([V_1 .. V_T])^T

orth(X) = X (X^T X)^(-1/2) is the nearest matrix with orthonormal columns. Every adapter keeps all
its r_i singular values (the authors, for dense updates, the first min(m, n) / T); where the vectors
of adapters depend on each other, orth is taken on their span. One adapter comes back as it is.

`power` is ours (power.py): the singular values of ΔW to this power, its norm kept. They are the S_i
where no vector depends on others; else an SVD of R x R finds them. One adapter is changed too.
Cost: two reads of the factors, 2 R^2 (m + n) flops twice, four eigenproblems of R x R. Returns the
exact result, of rank R at most. Source: arXiv 2412.00081.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import ScaleRule
from . import power, space

__all__ = ["METHOD", "TsvmOptions"]


@dataclass(frozen=True)
class TsvmOptions:
    power: float = power.field()


def core(x: space.Coordinates, options: TsvmOptions) -> tuple[Tensor, Tensor]:
    parts = [space.svd(b, a, size) for (b, a), size in zip(x.tasks(), x.norms.T)]
    u, s, v = (torch.cat(part, -1) for part in zip(*parts))
    left, right = space.polar(u), space.polar(v)
    if options.power != 1:
        rest = ~(power.are_orthonormal(left) & power.are_orthonormal(right))
        if bool(rest.any()):
            given = left[rest] * s[rest, None], right[rest], s[rest].norm(dim=1)
            found = space.svd(given[0].mT, given[1].mT, given[2])
            for whole, part in zip((left, s, right), found):
                whole[rest] = torch.nn.functional.pad(part, (0, whole.shape[-1] - part.shape[-1]))
        s = power.raised(s, options.power)
    return left * s[:, None], right.mT


METHOD = space.method(
    "tsvm",
    "singular vectors of all updates, orthogonalized together",
    TsvmOptions,
    core,
    # Merged singular values that are those of the adapters need no other scale.
    rule=lambda options, inner: ScaleRule(None, 1.0) if options.power >= 0.5 else ScaleRule(),
    source="arXiv 2412.00081",
)
