"""Square roots of Grams, and norms of the columns of a product by them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ZERO_COLUMN", "column_norms", "root"]

ZERO_COLUMN = 1e-6
"""A column of B_i A_i below this share of ||B_i|| ||a|| is rounding noise: its direction is 0."""


def column_norms(square_root: Tensor, a: Tensor) -> Tensor:
    """||S a_c|| of every column of a [..., r, d], 0 where it is rounding noise."""
    norms = torch.linalg.vector_norm(square_root.to(a.dtype) @ a, dim=-2)
    size = torch.linalg.matrix_norm(square_root)[..., None].to(a.dtype)
    floor = ZERO_COLUMN * size * torch.linalg.vector_norm(a, dim=-2)
    return torch.where(norms > floor, norms, 0.0)


def root(gram: Tensor) -> Tensor:
    """S with S^T S = gram [..., r, r], for a positive semidefinite gram in float64."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt()[..., None] * vectors.mT
