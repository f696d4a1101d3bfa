"""Pico: what the B's share is calibrated down before the updates are summed.

    [B_1 .. B_T] = U S W^T, unscaled,  c_k = S_k^2 / sum S^2,  α_k = 1 / (1 + (T - 1) c_k)
    B'_i = U diag(α) U^T B_i,  ΔW = λ g sum_i w_i s_i B'_i A_i

with g such that ||ΔW||_F is |λ| times the mean of ||w_i s_i B_i A_i||_F. A direction that holds
everything is divided by T, one that holds nothing stays. The result depends on how an update is
split into B_i and A_i, not on the update alone. One adapter comes back as it is. Cost: two reads of
the factors, 2 R^2 (m + n) flops twice, two eigenproblems and an inverse of R x R. Returns the exact
result, of rank R at most. Source: arXiv 2604.16826.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import space

__all__ = ["METHOD", "calibration"]


@dataclass(frozen=True)
class PicoOptions:
    """`pico` has no options of its own."""


def calibration(grams: Tensor, adapters: int) -> Tensor:
    """(1 + (T - 1) G / tr G)^(-1) [P, K, K], which is W diag(α) W^T for G = W Λ W^T.

    With G = B^T B of all B's side by side it makes [B'_1 .. B'_T] = [B_1 .. B_T] C of them; with
    G = B B^T, in whatever coordinates, B'_i = C B_i.
    """
    total = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    shares = torch.where(total > 0, grams / total, 0.0)
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    lower = torch.linalg.cholesky(identity + (adapters - 1) * shares)
    return torch.cholesky_inverse(lower)


def core(x: space.Coordinates, options: PicoOptions) -> tuple[Tensor, Tensor]:
    b = x.gains * (x.bare @ calibration(x.bare.mT @ x.bare, len(x.ranks)))
    wanted, found = x.norms.mean(1), space.norm(b, x.a)
    gain = torch.where(found > space.NOISE * wanted, wanted / found, 0.0)
    return gain[:, None, None] * b.mT, x.a


METHOD = space.method(
    "pico",
    "what the B's share is calibrated down before the updates are summed",
    PicoOptions,
    core,
    source="arXiv 2604.16826",
)
