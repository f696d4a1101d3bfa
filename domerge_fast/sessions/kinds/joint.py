"""ΔW = λ U Σ_i diag(φ_i) U^T τ_i: every adapter has coefficients of its own for the directions of a
basis that all share, U [m, K].

Of the joint singular vectors [τ_1 .. τ_T] = U S [V_1 .. V_T]^T it is Σ_i U diag(φ_i) S V_i^T, the
variant B of TARA (arXiv 2603.26299). Between U and the rows of A that is K x R:

    C(φ) = [diag(φ_1) U^T B_1 .. diag(φ_T) U^T B_T],  ΔW = λ U C(φ) A
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...algebra.side import owners
from .alike import Alike, Inner, Weights

__all__ = ["Joint"]


@dataclass(frozen=True, eq=False)
class Joint(Alike):
    """ranks: K for each adapter, as coefficients go. within: (U^T B)^T with scalings, [P, R, K];
    rows: r_i of each adapter."""

    kind: ClassVar[str] = "rotated"
    within: Tensor
    rows: tuple[int, ...]

    def found(self, weights: Weights) -> Inner:
        given = weights.of_rows.unflatten(-1, (len(self.rows), self.ranks[0]))
        of_row = given.index_select(-2, owners(self.rows, given.device))
        core = (of_row * self.within.to(given)).mT
        unit = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        return Inner(left=core, right=unit.expand(*core.shape[:-2], *unit.shape))
