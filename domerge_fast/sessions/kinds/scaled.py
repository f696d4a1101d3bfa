"""`do`: ΔW = λ L diag(ω) D diag(h), with directions D of unit columns by adapter and magnitudes
h = sum_i |ω_i| mag_i of the columns, ω = κ / sum |κ|."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...algebra.full_precision import full_precision
from .alike import Alike, Inner, Weights, magnitudes
from .gains import repeated

__all__ = ["Columns", "Unit"]


@dataclass(frozen=True, eq=False)
class Columns(Alike):
    """lengths: mag_i [P, T, n] in float32."""

    kind: ClassVar[str] = "scaled"
    lengths: Tensor

    def found(self, weights: Weights) -> Inner:
        omegas = magnitudes(weights.need_adapters("do"))
        return Inner(repeated(omegas, self.ranks), columns=self._lengths(omegas))

    def _lengths(self, omegas: Tensor) -> Tensor:
        """h [.., P, n], in float32 where no gradient is wanted."""
        shares = omegas.abs()[..., None, :]
        lengths = self.lengths.to(full_precision(shares.device))
        if shares.requires_grad:
            lengths = lengths.to(shares)
        return (shares.to(lengths) @ lengths)[..., 0, :]


@dataclass(frozen=True, eq=False)
class Unit(Columns):
    """The same with the merged directions brought to unit length (`renormalize`): h over the norms
    of their columns. products: D [P, R, n]; squares: L^T L [P, R, R]."""

    directions: Tensor
    squares: Tensor

    def found(self, weights: Weights) -> Inner:
        omegas = magnitudes(weights.need_adapters("do"))
        rows = repeated(omegas, self.ranks)
        d = rows[..., None] * self.directions.to(rows)
        square = (d * (self.squares.to(d) @ d)).sum(-2)
        floor = FLOOR * (omegas.abs().sum(-1, keepdim=True))
        present = square > floor.square()
        inverse = torch.where(present, square.where(present, 1.0).rsqrt(), 0.0)
        return Inner(rows, columns=self._lengths(omegas) * inverse)


FLOOR = 1e-6
"""A sum of unit columns below this share of what is added up is rounding noise."""
