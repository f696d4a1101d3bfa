"""Compress-then-Merge: the updates in common spaces of rank k, merged there by another method.

    t_i = c_i τ_i,  c_i ||τ_i|| = β ||τ_i|| + (1 - β) mean_j ||τ_j||
    U [m, k], V [n, k] with orthonormal columns and the largest sum_i ||U^T t_i V||^2
    ΔW = U merge(U^T τ_1 V .. U^T τ_T V) V^T

U and V are the Tucker-2 factors of the stacked t_i, by orthogonal iteration: V starts as the first
k eigenvectors of sum_i t_i^T t_i, then U as those of sum_i t_i V V^T t_i^T and V as those of
sum_i t_i^T U U^T t_i take turns, until the relative error of all U U^T t_i V V^T changes by less
than 1e-6 (never in the first two turns, and at most 1000 times). The columns of U and V are in the
order of their eigenvalues; an inner method that works entry by entry depends on them.

k is the merge's `rank`, or the largest rank of the adapters: nothing is cut after the merge, which
has rank k where the updates span as much. `norm_share` is β; with 0, the default here and in the
authors' code, every adapter counts the same for U and V (the authors search 0 to 0.75). Weights act
in the inner method, not on U and V. That is `ties` by default, as the authors', who tune its
density. Cost: two reads of the factors, 4 R^2 (m + n) flops, two eigenproblems of R x R a turn, and
the inner method on [k, k]. Source: arXiv 2606.03723 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algebra.cuts import check_cut
from ...options import option
from ..base import Settings
from . import shared_basis

__all__ = ["METHOD"]

CHANGE = 1e-6
"""Of the relative error in a turn, at which the iteration stops."""

FEWEST, MOST = 3, 1000
"""Turns of the iteration."""


@dataclass(frozen=True)
class CtmOptions:
    norm_share: float = option(
        0.0, "how far larger updates count more for the common spaces", low=0.0, high=1.0
    )
    inner: str = option("ties", "the method that merges the updates in their shared basis")


Pairs = Sequence[tuple[Tensor, Tensor]]
"""x_i [r_i, K] and y_i [r_i, L] of every adapter: its update in coordinates is x_i^T y_i."""


def spectra(
    b: Tensor, a: Tensor, ranks: tuple[int, ...], options: CtmOptions, settings: Settings
) -> tuple[Tensor, Tensor]:
    """U diag(λ) U^T and V diag(μ) V^T with the k eigenvalues of the last turn."""
    found = []
    for at, (x, y) in enumerate(zip(b.cpu(), a.cpu())):
        updates = list(zip(x.split_with_sizes(ranks), y.split_with_sizes(ranks)))
        t = blended(updates, options.norm_share)
        found.append(iterated(t, settings.rank or max(ranks), at))
    left, right = zip(*found)
    return torch.stack(left).to(b), torch.stack(right).to(a)


def blended(updates: Pairs, share: float) -> Pairs:
    """The t_i."""
    norms = torch.stack([torch.linalg.matrix_norm(x.T @ y) for x, y in updates])
    gains = torch.where(norms > 0, share + (1 - share) * norms.mean() / norms, 0.0)
    return [(c * x, y) for c, (x, y) in zip(gains, updates)]


def iterated(t: Pairs, k: int, at: int = 0) -> tuple[Tensor, Tensor]:
    """U diag(λ) U^T [K, K] and V diag(μ) V^T [L, L].

    Raises FlatCut of matrix `at` where k falls between equal values at the start or at the end.
    """
    turned = [(y, x) for x, y in t]
    whole = _energy(turned)
    total = whole.trace().clamp_min(torch.finfo(whole.dtype).tiny)
    mu, v = _first(whole, k)
    check_cut(mu.sqrt(), k, at)
    error = torch.tensor(torch.inf)
    for turn in range(1, MOST + 1):
        lam, u = _first(_energy(t, v), k)
        mu, v = _first(_energy(turned, u), k)
        last, error = error, (1 - mu[:k].sum() / total).clamp_min(0).sqrt()
        if turn >= FEWEST and (last - error).abs() < CHANGE:
            break
    for values in (lam, mu):
        check_cut(values.sqrt(), k, at)
    return u * lam[:k] @ u.T, v * mu[:k] @ v.T


def _energy(t: Pairs, basis: Tensor | None = None) -> Tensor:
    """sum_i t_i W W^T t_i^T [K, K], W the basis [L, k] or the identity."""
    found = torch.zeros_like(t[0][0].T @ t[0][0])
    for x, y in t:
        inside = y if basis is None else y @ basis
        found += x.T @ (inside @ inside.T) @ x
    return found


def _first(energy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, falling, and the first k eigenvectors."""
    values, vectors = torch.linalg.eigh(energy)
    return values.flip(0).clamp_min(0), vectors.flip(1)[:, :k]


METHOD = shared_basis.method(
    "ctm",
    "another method on the updates in common spaces of rank k",
    CtmOptions,
    spectra,
    truncates=True,
    cost="R x R, an iteration, and the inner method on k x k",
    source="arXiv 2606.03723",
    needs="an inner method",
)
