"""Singular value calibration: directions of a merge that say more than any adapter did, damped.

    ΔW = sum_r σ_r u_r v_r^T,  s_i^r = σ_r u_r^T τ_i v_r / ||u_r^T τ_i||^2
    p = mean_i <ΔW, τ_i> / ||τ_i||^2 over the whole model
    σ_r  ->  (σ_r / p) T / sum_i max(1, s_i^r / p)

s_i^r is how far the merge goes along u_r in units of what adapter i does there: 1 is as far, 0 is
where that is rounding noise of τ_i. First the whole model is brought to a mean projection of 1 on
the adapters, then only what is counted more than once is damped, never raised. The τ_i are those
that the method takes, after steps before it and with weights, T of a module that T adapters have.
The paper floors s_i^r at 1 / T in place of 1 and takes the merge as it comes: its result depends on
whether the merge is a sum or a mean, this one does not, and its scale is set.

Cost: for merges that are found as singular triplets a few R x R products; else an SVD of R x R.
Source: arXiv 2602.05536; the projection and the floor are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...algebra import derivatives
from ...errors import DomergeError
from ..base import ScaleRule

__all__ = ["SCALE", "gains", "measured", "projection"]

SCALE = ScaleRule(None, 1.25)
"""How λ is found after it. On seven trainings the best λ was .9 to 1.7 times d."""

NOISE = 2.0**-24
"""A singular value below this share of the norms of what it was computed from is rounding noise."""

ORTHONORMAL = 1e-9
"""How far unit vectors may be from orthogonal and still count as singular vectors."""


def measured(
    tasks: Iterable[tuple[Tensor, Tensor]], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The merge left right in singular triplets, and what the adapters have along them.

    tasks: b_i [P, r_i, K_B] and a_i [P, r_i, K_A] of every adapter. Returns U diag(σ) [P, K_B, q],
    V^T [P, q, K_A], the s_i^r [P, T, q], and <ΔW, τ_i> with ||τ_i||^2, [P, 2, T].
    """
    u, s, v = _triplets(left, right)
    strengths, overlaps = [], []
    for b, a in tasks:
        of_b, gram = b @ u, a @ a.mT
        along = (of_b * (a @ v)).sum(1)
        size = (of_b * (gram @ of_b)).sum(1)
        own = ((b @ b.mT) * gram).sum((1, 2))
        present = size > NOISE**2 * own[:, None]
        strengths.append(torch.where(present, s * along / size.where(present, 1.0), 0.0))
        overlaps.append(torch.stack([(s * along).sum(1), own], 1))
    return u * s[:, None], v.mT, torch.stack(strengths, 1), torch.stack(overlaps, 2)


def projection(overlaps: Sequence[Sequence[tuple[float, float]]]) -> float:
    """p of the whole model. overlaps: of every adapter, <ΔW, τ_i> and ||τ_i||^2 by module."""
    shares = []
    for modules in overlaps:
        energy = sum(own for _, own in modules)
        if energy > 0:
            shares.append(sum(inner for inner, _ in modules) / energy)
    mean = sum(shares) / len(shares) if shares else 1.0
    if mean <= 0:
        problem = "the merge points away from the adapters on average, so 'svc' has no scale for it"
        raise DomergeError(f"{problem}; take a method without it, or change the weights")
    return mean


def gains(strengths: Tensor, mean: float) -> Tensor:
    """What every σ_r is multiplied by, [.., q, 1], for the s_i^r [.., T, q] of a module."""
    adapters = strengths.shape[-2]
    return (adapters / (strengths / mean).clamp_min(1).sum(-2) / mean)[..., None]


def _triplets(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [P, K_B, q], S [P, q] and V [P, K_A, q] of left [P, K_B, q'] right [P, q', K_A].

    Where the columns of left and the rows of right are orthogonal, as most cores return them,
    they are taken as they are; each module is looked at by itself.
    """
    lengths = left.norm(dim=1), right.norm(dim=2)
    inverse = [torch.where(x > 0, 1 / x.where(x > 0, 1.0), 0.0)[:, None] for x in lengths]
    u, v = left * inverse[0], right.mT * inverse[1]
    s = lengths[0] * lengths[1]
    plain = _apart(u) & _apart(v)
    if not bool(plain.all()):
        size = torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
        whole = derivatives.svd(left @ right)
        present = whole[1] > NOISE * size[:, None]
        found = whole[0] * present[:, None], whole[1] * present, whole[2].mT * present[:, None]
        u, s, v = (_chosen(plain, x, y) for x, y in zip((u, s, v), found))
    return u, s, v


def _apart(x: Tensor) -> Tensor:
    """Whether the columns of x [P, K, q], of length 1 or 0, are orthogonal, [P]."""
    gram = x.mT @ x
    return (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().amax((1, 2)) < ORTHONORMAL


def _chosen(plain: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where plain, else y, both with as many columns as the wider has."""
    width = max(x.shape[-1], y.shape[-1])
    x, y = (torch.nn.functional.pad(z, (0, width - z.shape[-1])) for z in (x, y))
    return torch.where(plain.view(-1, *[1] * (x.dim() - 1)), x, y)
