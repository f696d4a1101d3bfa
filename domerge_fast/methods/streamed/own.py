"""The Xhat_i that make the objective of descent.py least, each in its own block, the others being
as they are:

    Xhat_i = γ n_i X_i (γ n_i + 2 (S - Y_i^T Y_i))^-1,  Y_i = Xhat_i / sqrt(n_i)

In the eigenvectors of S that takes Woodbury's identity in r x r, a few times over, because Y_i is
on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner", "minimised"]

INNER = 8
"""Times that an own block is put in its own equation. More of them let S swing where one adapter
has a large share of it; what these leave of f is below 1e-4 where none has a tenth."""
SMALL = 1e-12
"""Of the largest eigenvalue of S: less is rounding."""


def minimised(
    x: Tensor, n: Tensor, values: Tensor, gamma: float, alpha: float
) -> tuple[Tensor, Tensor, float]:
    """Xhat and Y of blocks X [t, r, d], all in the eigenvectors of S; blocks with n = 0 stay, and
    their Y is 0. And o of these.

    n: the norms [t, 1, 1]. values: of S. alpha: what the Y_i begin with of X_i / sqrt(n_i).
    """
    size = n.where(n > 0, 1.0)
    low = values.clamp_min(SMALL * float(values.amax()))
    gain, given = gamma * size.sqrt(), gamma * size + 2 * values
    last = y = alpha * x / size.sqrt()
    for _ in range(INNER):
        last, y = y, _own(x, y, gain, given, low)
    last = torch.where(n > 0, last.sub_(y), 0.0)
    left = float(inner(last, last * given).sum())
    return torch.where(n > 0, y * size.sqrt(), x), torch.where(n > 0, y, 0.0), left


def _own(x: Tensor, y: Tensor, gain: Tensor, given: Tensor, values: Tensor) -> Tensor:
    """gain X (given - 2 Y^T Y)^-1, all in the eigenvectors of S: the Y_i that follow from others.
    given: γ n_i + 2 S [t, 1, d]; of S itself the values, above 0."""
    y = y * _within(y, values)
    over, alone = y / given, x / given
    core = torch.eye(x.shape[1], device=x.device) - 2 * over @ y.mT
    turn = torch.linalg.solve(core, alone @ y.mT, left=False)
    return torch.baddbmm(alone, turn, over, alpha=2).mul_(gain)


def _within(y: Tensor, values: Tensor) -> Tensor:
    """What Y has to be multiplied by for S - Y^T Y to have no negative eigenvalue, at most 1."""
    largest = torch.linalg.eigvalsh((y / values) @ y.mT)[:, -1]
    return largest.clamp_min(1.0).rsqrt()[:, None, None]


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of every matrix [t, r, d], in float64: [t]."""
    return (x * y).sum(2).sum(1, dtype=torch.float64)
