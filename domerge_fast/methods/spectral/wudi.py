"""WUDI-Merging in closed form: the update that interferes least with every adapter's inputs.

    min over X of  sum_i ||(X - τ_i) τ_i^T||_F^2 / ||τ_i||_F^2  +  ridge ||X - sum_i τ_i||_F^2
    ΔW = λ X = λ (sum_i τ_i τ_i^T τ_i / n_i + ridge sum_i τ_i) (sum_i τ_i^T τ_i / n_i + ridge)^(-1)

with n_i = ||τ_i||_F^2. The authors descend a few hundred steps from sum_i τ_i; the ridge, which is
ours, has the effect of stopping early and keeps the sum where adapters hardly read (their A's often
share an initialization). ridge=0 takes the pseudoinverse. One adapter comes back as it is. Cost:
two reads of the factors, 2 R^2 (m + n) flops twice, three eigenproblems of R x R. Returns the exact
result, of rank R at most. Source: arXiv 2503.08099.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...options import option
from . import space

__all__ = ["METHOD"]


@dataclass(frozen=True)
class WudiOptions:
    ridge: float = option(1e-3, "pull towards the plain sum", low=0.0)


def core(x: space.Coordinates, options: WudiOptions) -> tuple[Tensor, Tensor]:
    present = torch.diag_embed((x.a != 0).any(1).to(x.a))
    reads = options.ridge * present
    sums = options.ridge * (x.b.mT @ x.a)
    for (b, a), norm in zip(x.tasks(), x.norms.T):
        there = norm > 0
        share = torch.where(there, norm.where(there, 1.0) ** -2, 0.0)[:, None, None]
        half = share * (b @ b.mT) @ a
        reads = reads + a.mT @ half
        sums = sums + b.mT @ (a @ a.mT) @ half
    return sums @ space.pseudoinverse(reads), present


METHOD = space.method(
    "wudi",
    "the update that interferes least with every adapter's inputs",
    WudiOptions,
    core,
    source="arXiv 2503.08099",
)
