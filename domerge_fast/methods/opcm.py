"""OPCM: adapters added one after the other, each off the spectrum of the merge so far.

    S_1 = τ_1,  S_t = S_{t-1} + P_{t-1}(τ_t),  ΔW = λ g S_T,  g = mean_i ||τ_i|| / ||S_T||

U diag(σ) V^T = S_{t-1}, and k is how many leading σ have a cumulative share of at most `alpha` of
their sum. In the coordinates U^T τ_t V, the projection P_{t-1} sets the leading k x k block and the
diagonal to zero. Norms are those of the whole model. The order of the adapters matters: what comes
first stays whole, what comes later gives way.

The paper keeps a merge Δ_t of mean norm: Δ_t = (λ_{t-1} Δ_{t-1} + P_{t-1}(τ_t)) / λ_t with λ_1 = 1,
and λ_t such that ||Δ_t|| = mean_{i<=t} ||τ_i||. By induction S_t = λ_t Δ_t: a projection takes
singular vectors and shares of a spectrum, which Δ_{t-1} and its multiple S_{t-1} have in common, so
λ_t Δ_t = S_{t-1} + P_{t-1}(τ_t). One division at the end therefore replaces all of theirs.

The paper takes all min(m, n) singular vectors; those of singular value zero are arbitrary and fill
most of the diagonal of a low-rank merge. Here U and V are the support, directions with a singular
value that is not rounding noise, and nothing beyond it is set to zero. That also defines a module
that no adapter before has: τ_t is added whole. A weight w_i is part of τ_i; an adapter of zeros
counts in the mean. The authors project linear layers only, here every module is one matrix.

Singular vectors, and with them P, are unique only where singular values differ; where they are
close, rounding grows from step to step. All at once (float64 inside) and one by one (float32
between) differed by 1e-6 for 16 random adapters of rank 16 on 2048 x 2048, by 2e-3 for 32 of them.

Cost: three reads of the factors, 6 R^2 (m + n) flops, and twice two eigenproblems and T SVDs of at
most R x R. Returns the exact result, of rank R at most. Source: arXiv 2501.09522; shares of the sum
of σ, not of σ^2, and k as in the authors' code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import option
from .contract import Batch, Coefficients, Reducible, State
from .groups import Groups
from .spectral import space

__all__ = ["METHOD", "SUM", "OpcmOptions", "gain"]

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class OpcmOptions:
    alpha: float = option(
        0.5, "share of the merge's singular values that later adapters stay off", low=0.0, high=1.0
    )


def core(x: space.Coordinates, options: OpcmOptions) -> tuple[Tensor, Tensor]:
    """S_T of the adapters in their order."""
    steps = zip(x.tasks(), x.norms.T)
    (b, a), size = next(steps)
    total = space.svd(b, a, size)
    for (b, a), size in steps:
        total = _add(total, b, a, size, options.alpha)
    u, s, v = total
    return u * s[:, None], v.mT


def _add(total: Triplets, b: Tensor, a: Tensor, size: Tensor, alpha: float) -> Triplets:
    """The SVD of S + P(b^T a) from that of S; b [P, r, K_B], a [P, r, K_A], size = ||b^T a||."""
    u, s, v = total
    taken = _closed(s, alpha) * ((b @ u).mT @ (a @ v))
    left = torch.cat([u.mT, b], 1)
    right = torch.cat([(torch.diag_embed(s) - taken) @ v.mT, a], 1)
    return space.svd(left, right, s.norm(dim=1) + size)


def _closed(s: Tensor, alpha: float) -> Tensor:
    """Which entries of U^T τ V are set to zero, [P, q, q], for singular values s [P, q]."""
    sums = s.cumsum(1)
    leading = sums <= alpha * sums[:, -1:]
    diagonal = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    return (leading[:, :, None] & leading[:, None]) | diagonal


SUM = space.method(
    "opcm", "updates added off the merge's spectrum, not rescaled", OpcmOptions, core
)
"""S_T: adding to a running sum S is merging the two "adapters" S and τ."""


Energies = tuple[list[float], dict[int, list[float]]]
"""||S_T||^2 by module, and ||τ_i||^2 by adapter and module."""


def reduce(batches: Groups[Sequence[Reducible]], options: OpcmOptions) -> float:
    """g = mean_i ||τ_i|| / ||S_T|| of the whole model; 1 where S_T is zero."""
    found = batches.summed(lambda group: _energies(group, options), _joined)
    merged, given = found or ([], {})
    norms = [math.sqrt(math.fsum(own)) for own in given.values()]
    return gain(norms, math.sqrt(math.fsum(merged)))


def _energies(batches: Sequence[Reducible], options: OpcmOptions) -> Energies:
    merged: list[float] = []
    given: dict[int, list[float]] = {}
    for grams, weights in batches:
        x, _, _ = space.coordinates(grams, weights)
        left, right = core(x, options)
        size = 2.0 ** sum(grams.powers)
        merged += (size * space.norm(left.mT, right)).square().tolist()
        for i, own in zip(grams.adapters, (size * x.norms).square().T.tolist()):
            given.setdefault(i, []).extend(own)
    return merged, given


def _joined(one: Energies, other: Energies) -> Energies:
    (merged, given), (more, of_others) = one, other
    keys = dict.fromkeys((*given, *of_others))
    return merged + more, {i: given.get(i, []) + of_others.get(i, []) for i in keys}


def gain(norms: Sequence[float], total: float) -> float:
    """mean_i ||τ_i|| / ||S_T||."""
    return math.fsum(norms) / len(norms) / total if total else 1.0


def coefficients(grams: Batch, state: State, weights: Tensor, options: OpcmOptions) -> Coefficients:
    """S_T times the gain that the whole model gives it."""
    found = space.coefficients(core, grams, state, weights, options)
    sizes = found.sizes and [state.whole * size for size in found.sizes]
    return dataclasses.replace(found, sizes=sizes, b=state.whole * found.b.double())


METHOD = dataclasses.replace(
    SUM,
    summary="one after the other, each off the spectrum of the merge so far",
    coefficients=coefficients,
    takes=lambda options: dataclasses.replace(space.NEEDS, calibrates=False),
    reduce=reduce,
    own_scale=True,
    cost="three reads of the factors, 6 R^2 (m + n) flops, 2 T SVDs of R x R",
    source="arXiv 2501.09522",
)
