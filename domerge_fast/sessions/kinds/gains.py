"""ΔW = λ L diag(g(κ)) R: coefficients change the strengths of directions that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...methods.weighted import multislerp, slerp
from .alike import Alike, Inner, Weights, magnitudes

__all__ = ["Arcs", "Calibrated", "Rows", "Shares", "repeated"]


@dataclass(frozen=True, eq=False)
class Rows(Alike):
    """g = κ s. sizes: s [P, R], what a direction has at κ = 1."""

    kind: ClassVar[str] = "gains"
    sizes: Tensor

    def found(self, weights: Weights) -> Inner:
        return Inner(weights.of_rows * self.sizes)


@dataclass(frozen=True, eq=False)
class Shares(Rows):
    """g = ω s with ω = κ / sum |κ|."""

    def found(self, weights: Weights) -> Inner:
        omegas = magnitudes(weights.need_adapters("do"))
        return Inner(repeated(omegas, self.ranks) * self.sizes)


@dataclass(frozen=True, eq=False)
class Arcs(Rows):
    """g = c(κ) s with what `slerp` or `multislerp` makes of κ. products: <τ_i, τ_j> [P, T, T]."""

    products: Tensor
    method: str

    def found(self, weights: Weights) -> Inner:
        given = weights.need_adapters(self.method)
        of = slerp.gains if self.method == "slerp" else multislerp.gains
        return Inner(repeated(of(self.names, given, self.products), self.ranks) * self.sizes)


@dataclass(frozen=True, eq=False)
class Calibrated(Rows):
    """`pico`: g = c κ s, with c such that ||ΔW||_F = mean_i |κ_i| ||τ_i||_F. norms: ||τ_i||_F
    [P, T]. products: (L^T L) o (R R^T) [P, R, R], with which ||ΔW||_F^2 = g^T products g."""

    norms: Tensor
    products: Tensor

    def found(self, weights: Weights) -> Inner:
        given = weights.need_adapters("pico")
        wanted = (given.abs() * self.norms).mean(-1, keepdim=True)
        rows = weights.of_rows * self.sizes
        square = (rows * (self.products @ rows[..., None])[..., 0]).sum(-1, keepdim=True)
        noise = (NOISE * wanted) ** 2
        present = square > noise
        return Inner(torch.where(present, wanted / square.where(present, 1.0).sqrt(), 0.0) * rows)


NOISE = 2.0**-24
"""A norm below this share of the one that is wanted is rounding noise."""


def repeated(x: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """[.., T] -> [.., R]: of every adapter as often as it has rows."""
    return torch.cat([x[..., k, None].expand(*x.shape[:-1], r) for k, r in enumerate(ranks)], -1)
