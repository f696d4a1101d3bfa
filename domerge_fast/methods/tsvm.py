"""TSV-Merge: the singular vectors of all updates, orthogonalized together.

    τ_i = U_i S_i V_i^T,  ΔW = λ orth([U_1 .. U_T]) diag(S_1 .. S_T) orth([V_1 .. V_T])^T

orth(X) = X (X^T X)^(-1/2) is the nearest matrix with orthonormal columns. Every adapter keeps all
its r_i singular values (the authors, for dense updates, the first min(m, n) / T); where the vectors
of adapters depend on each other, orth is taken on their span. One adapter comes back as it is.
Cost: two reads of the factors, 2 R^2 (m + n) flops twice, four eigenproblems of R x R. Returns the
exact result, of rank R at most. Source: arXiv 2412.00081.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import space


@dataclass(frozen=True)
class TsvmOptions:
    """`tsvm` has no options of its own."""


def core(x: space.Coordinates, options: TsvmOptions) -> tuple[Tensor, Tensor]:
    parts = [space.svd(b, a, size) for (b, a), size in zip(x.tasks(), x.norms.T)]
    u, s, v = (torch.cat(part, -1) for part in zip(*parts))
    return space.polar(u) * s[:, None], space.polar(v).mT


METHOD = space.method(
    "tsvm",
    "singular vectors of all updates, orthogonalized together",
    TsvmOptions,
    core,
    source="arXiv 2412.00081",
)
