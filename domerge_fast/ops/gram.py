"""G = X X^T [R, R] of every problem, and the adapters' own diagonal blocks of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side
from ._backend import implementation, op

__all__ = ["block_gram", "gram"]


@op
def gram(
    problems: Sequence[Side], *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> list[Tensor]:
    """X X^T [R, R] of every problem, in `dtype` (float32 or float64: products and sums too);
    [P, R, R] for a side of P modules."""
    return implementation("gram", backend, problems).gram(problems, dtype)


@op
def block_gram(problems: Sequence[Side], *, backend: str = "auto") -> list[Tensor]:
    """K_i = X_i X_i^T of every adapter, accumulated in float64, packed [sum r_i^2] a problem;
    [P, sum r_i^2] for a side of P modules.

    Row-major blocks one after the other. Column magnitudes are square roots of quadratic forms
    in K_i, which would lose half their digits to a float32 Gram.
    """
    return implementation("block_gram", backend, problems).block_gram(problems)
