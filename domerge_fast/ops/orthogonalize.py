"""Descend on f(Xhat) = sum_{i != j} phi(||Xhat_i Xhat_j^T||) + gamma ||Xhat - X||^2 from Xhat = X.

Since Xhat = C X at every step, the descent runs on R x R matrices (`orthogonalize`); where R is
not far below d it is cheaper to move Xhat itself (`orthogonalize_factors`). Source: arXiv
2505.15875, step 1; the derivation and the step rule are in docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.side import Side
from ._backend import implementation, op

__all__ = ["PENALTIES", "orthogonalize", "orthogonalize_factors"]

PENALTIES = ("squared", "frobenius")


@op
def orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[Sequence[int]],
    *,
    penalty: str = "squared",
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """C [R, R] of every problem with Xhat = C X, and statistics [N, 5] in float64.

    grams: X X^T [R, R] in float32, or [P, R, R] of P modules, for which C is that too; N counts
    modules. ranks: r_i of each problem's adapters, summing to R.
    With the squared penalty f ends within `tol` of the optimum's, as far as the last steps tell
    (docs/algorithm.md), unless it took all `steps`.
    The columns of the statistics are steps, objective before, objective after, share of the
    cross-adapter Gram energy left, and ||Xhat - X|| / ||X||.
    """
    for shape, r in {(g.shape, tuple(r)) for g, r in zip(grams, ranks, strict=True)}:
        if shape[-2:] != (sum(r), sum(r)) or len(shape) > 3 or min(r) < 1:
            raise ValueError(f"a Gram of {tuple(shape)} does not fit the ranks {r}")
    module = implementation("orthogonalize", backend, grams)
    c, stats = module.orthogonalize(grams, ranks, penalty, gamma, steps, tol)
    return c, stats


@op
def orthogonalize_factors(
    problems: Sequence[Side],
    *,
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Xhat [R, d] in float32 of every problem for the squared penalty, or [P, R, d], and statistics
    [N, 6], N counting modules.

    To the same optimum as `orthogonalize`, by fewer steps of O(R d^2) instead of O(R^3): the rule
    is in backends/factor_descent.py. f at its end is within `tol` of the optimum's; a backend may
    multiply rounded to bfloat16 where tol is 3e-4 or more. The statistics are those of
    `orthogonalize`, but that the energy is the objective's, sum_{i != j} ||X_i X_j^T||^2 over
    ||X_i|| ||X_j||, and the share of ||Xhat - X||^2 that is numbers times the X_i.
    """
    module = implementation("orthogonalize_factors", backend, problems)
    x, stats = module.orthogonalize_factors(problems, gamma, steps, tol)
    return x, stats
