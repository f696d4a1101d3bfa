"""Singular value calibration (methods/spectral/svc.py) of merges in R x R, which is brought to the
whole model: gradients go through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import DomergeError
from .alike import Alike, Inner

__all__ = ["calibrated"]


def calibrated(alike: Sequence[Alike], found: Sequence[Inner]) -> list[Inner]:
    """With the singular values that the adapters' shares along them leave, where these were
    measured. DomergeError where the merge points away from the adapters."""
    if all(x.strengths is None for x in found):
        return list(found)
    projection = _projection(alike, found)
    return [_damped(x, projection) for x in found]


def _projection(alike: Sequence[Alike], found: Sequence[Inner]) -> Tensor:
    """p = mean_i <ΔW, τ_i> / ||τ_i||^2 over the whole model, [..]."""
    sums: dict[int, Tensor] = {}
    for x, inner in zip(alike, found):
        if inner.overlaps is not None:
            of_modules = inner.overlaps.sum(-3)  # [.., 2, T]
            for k, i in enumerate(x.owners):
                own = of_modules[..., k]
                sums[i] = sums[i] + own if i in sums else own
    pairs = torch.stack([*sums.values()], -1)  # [.., 2, T]
    along, energy = pairs[..., 0, :], pairs[..., 1, :]
    present = energy > 0
    shares = torch.where(present, along / energy.where(present, 1.0), 0.0).sum(-1)
    mean = shares / present.sum(-1).clamp_min(1)
    if bool((mean <= 0).any()):
        problem = "the merge points away from the adapters on average, so 'svc' has no scale for it"
        raise DomergeError(f"{problem}; take a method without it, or change the coefficients")
    return mean


def _damped(inner: Inner, projection: Tensor) -> Inner:
    if inner.strengths is None or inner.left is None:
        return inner
    mean = projection[..., None, None, None]
    adapters = inner.strengths.shape[-2]
    counted = (inner.strengths / mean).clamp_min(1).sum(-2, keepdim=True)
    left = inner.left * (adapters / counted / mean)
    return dataclasses.replace(inner, left=left, strengths=None, overlaps=None)
