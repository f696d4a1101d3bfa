"""Directions and magnitudes of adapters' updates, added up apart, one batch after another.

    D = sum_i w_i D_i,  mag = sum_i |w_i| mag_i,  W = sum_i |w_i|,  ΔW = D diag(mag) / W^2

which is step 3 of do.py, with ω_i = w_i / W. Not apart, ΔW = sum_i w_i τ_i / W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.roots import ZERO_COLUMN, column_norms, root

__all__ = ["Mean"]


@dataclass(eq=False)
class Mean:
    """Of one module. D [m, n], mag [n], and the |w_i| of the adapters that have a column [n], in
    float64; weight: W. apart: whether directions and magnitudes are."""

    directions: Tensor
    magnitudes: Tensor
    present: Tensor
    apart: bool
    weight: float = 0.0

    @classmethod
    def fresh(cls, m: int, n: int, apart: bool, device: torch.device) -> Mean:
        zeros = torch.zeros(n, dtype=torch.float64, device=device)
        return cls(zeros.new_zeros(m, n), zeros, zeros.clone(), apart)

    def add(self, a: Tensor, b: Tensor, weights: Sequence[float]) -> Tensor:
        """Count adapters in: A_i [t, r, n] and B_i^T [t, r, m] in float32. Their ||B_i A_i||_F [t]
        in float64, in the host's memory."""
        w = torch.tensor(weights, dtype=torch.float64, device=a.device)
        wide = b.double()
        roots = root(wide @ wide.mT)
        self.weight += float(w.abs().sum())
        if not self.apart:
            self._add(a * w.float()[:, None, None], b)
            return torch.linalg.vector_norm((roots @ a.double()).flatten(1), dim=1).cpu()
        sizes = column_norms(roots, a)  # [t, n]
        inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
        self._add(a * (w.float()[:, None] * inverse)[:, None], b)
        sizes = sizes.double()
        self.magnitudes += w.abs() @ sizes
        self.present += w.abs() @ (sizes > 0).double()
        return torch.linalg.vector_norm(sizes, dim=1).cpu()

    def times(self, weights: int, updates: int) -> Mean:
        """With weights and updates 2^.. times as large."""
        size, both = 2.0**weights, 2.0 ** (weights + updates)
        directions = self.directions * (size if self.apart else both)
        present, weight = size * self.present, size * self.weight
        return Mean(directions, both * self.magnitudes, present, self.apart, weight)

    def _add(self, a: Tensor, b: Tensor) -> None:
        self.directions += b.flatten(0, 1).T @ a.flatten(0, 1)

    def result(self, renormalize: bool) -> Tensor:
        """ΔW [m, n] in float64. renormalize: with D's columns at unit length."""
        if not self.apart:
            return self.directions / self.weight
        if not renormalize:
            return self.directions * (self.magnitudes / self.weight**2)
        norms = torch.linalg.vector_norm(self.directions, dim=0)
        gains = torch.where(norms > ZERO_COLUMN * self.present, self.magnitudes / norms, 0.0)
        return self.directions * (gains / self.weight)
