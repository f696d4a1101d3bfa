"""Descend on f(Xhat) = sum_{i != j} phi(||Xhat_i Xhat_j^T||) + gamma ||Xhat - X||^2 from Xhat = X.

Since Xhat = C X at every step, the descent runs on R x R matrices (`orthogonalize`); where R > d
it is cheaper to move Xhat itself (`orthogonalize_factors`). Source: arXiv 2505.15875, step 1;
the derivation and the step rule are in docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..algebra.side import Side, check_sides
from ..backends.descent import STATS
from . import _library

PENALTIES = ("squared", "frobenius")


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
    """C [R, R] of every problem with Xhat = C X, and statistics [P, 5] in float64.

    grams: X X^T [R, R] in float32. ranks: r_i of each problem's adapters, summing to R.
    The columns of the statistics are steps, objective before, objective after, share of the
    cross-adapter Gram energy left, and ||Xhat - X|| / ||X||.
    """
    for g, r in zip(grams, ranks, strict=True):
        if g.shape != (sum(r), sum(r)) or min(r) < 1:
            raise ValueError(f"a Gram of {tuple(g.shape)} does not fit the ranks {tuple(r)}")
    flat = [rank for r in ranks for rank in r]
    counts = [len(r) for r in ranks]
    *c, stats = _orthogonalize(list(grams), flat, counts, penalty, gamma, steps, tol, backend)
    return c, stats


def orthogonalize_factors(
    problems: Sequence[Side],
    *,
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Xhat [R, d] in float32 of every problem for the squared penalty, and the statistics.

    The same descent as `orthogonalize`, at O(R d^2) instead of O(R^3) a step.
    """
    check_sides(problems)
    *x, stats = _orthogonalize_factors(*_library.flatten(problems), gamma, steps, tol, backend)
    return x, stats


def _split(ranks: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    ends = list(accumulate(counts))
    return [tuple(ranks[end - count : end]) for end, count in zip(ends, counts)]


def _run(grams, ranks, counts, penalty, gamma, steps, tol, backend):
    module = _library.implementation(backend, grams)
    c, stats = module.orthogonalize(grams, _split(ranks, counts), penalty, gamma, steps, tol)
    return [*c, stats]


def _fake(grams, ranks, counts, penalty, gamma, steps, tol, backend):
    stats = grams[0].new_empty(len(grams), len(STATS), dtype=torch.float64)
    return [*(torch.empty_like(g) for g in grams), stats]


def _run_factors(blocks, counts, scales, gamma, steps, tol, backend):
    problems = _library.unflatten(blocks, counts, scales)
    module = _library.implementation(backend, blocks)
    x, stats = module.orthogonalize_factors(problems, gamma, steps, tol)
    return [*x, stats]


def _fake_factors(blocks, counts, scales, gamma, steps, tol, backend):
    problems = _library.unflatten(blocks, counts, scales)
    stats = blocks[0].new_empty(len(problems), len(STATS), dtype=torch.float64)
    return [*(p.blocks[0].new_empty(p.rank, p.d, dtype=torch.float32) for p in problems), stats]


_orthogonalize = _library.define(
    "orthogonalize",
    "(Tensor[] grams, int[] ranks, int[] counts, str penalty, float gamma, int steps, float tol, "
    "str backend) -> Tensor[]",
    _run,
    _fake,
)
_orthogonalize_factors = _library.define(
    "orthogonalize_factors",
    f"({_library.PROBLEMS}, float gamma, int steps, float tol, str backend) -> Tensor[]",
    _run_factors,
    _fake_factors,
)
