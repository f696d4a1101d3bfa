"""Pico: what the B's share is calibrated down before the updates are summed.

    [B_1 .. B_T] = U S W^T, unscaled,  c_k = S_k^2 / sum S^2,  α_k = 1 / (1 + (T - 1) c_k)
    B'_i = U diag(α) U^T B_i,  ΔW = λ g sum_i w_i s_i B'_i A_i

with g such that ||ΔW||_F is |λ| times the mean of ||w_i s_i B_i A_i||_F. A direction that holds
everything is divided by T, one that holds nothing stays. The result depends on how an update is
split into B_i and A_i, not on the update alone. One adapter comes back as it is. Cost: two reads of
the factors, 2 R^2 (m + n) flops twice, three eigenproblems of R x R. Returns the exact result, of
rank R at most. Source: arXiv 2604.16826.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import space


@dataclass(frozen=True)
class PicoOptions:
    """`pico` has no options of its own."""


def core(x: space.Coordinates, options: PicoOptions) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(x.bare.mT @ x.bare)
    total = values.sum(1, keepdim=True)
    shares = torch.where(total > 0, values / total, 0.0)
    alpha = 1 / (1 + (len(x.ranks) - 1) * shares)
    b = x.gains * (x.bare @ vectors * alpha[:, None]) @ vectors.mT
    wanted, found = x.norms.mean(1), space.norm(b, x.a)
    gain = torch.where(found > space.NOISE * wanted, wanted / found, 0.0)
    return gain[:, None, None] * b.mT, x.a


METHOD = space.method(
    "pico", "what the B's share is calibrated down before the updates are summed", PicoOptions, core
)
