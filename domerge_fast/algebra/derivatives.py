"""Decompositions whose derivatives are finite where singular values are equal or zero.

Singular vectors of equal values have no derivatives, but U V^T has, and a pseudoinverse. Torch's
own formulas divide by differences of the values and give NaN there. With P = U^T dU' - (U^T dU')^T
of a gradient dU', and Q of V alike, that of X = U S V^T is

    U [ (P + Q) / 2 / (σ_j - σ_i) + (P - Q) / 2 / (σ_j + σ_i) + diag(dS') ] V^T
    + (1 - U U^T) dU' S^-1 V^T + U S^-1 dV'^T (1 - V V^T)

For U f(S) V^T, P + Q falls with f(σ_j) - f(σ_i). What is divided by less than EQUAL of the largest
value is dropped: nothing where f is flat, otherwise what turns vectors of equal values into one
another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["inverted", "polar", "svd"]

EQUAL = 1e-10
"""Of the largest singular value, how far apart others count as equal."""


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [.., m, k], S [.., k] and V^T [.., k, n] of x [.., m, n], k the smaller of m and n."""
    if x.requires_grad:
        return _Svd.apply(x)
    return torch.linalg.svd(x, full_matrices=False)


def polar(x: Tensor, made: Tensor, floor: float) -> Tensor:
    """made, which is U V^T of x [.., m, n] without singular values below a share `floor` of the
    largest, with the derivative of that."""
    if x.requires_grad:
        return _Polar.apply(x, made.detach(), floor)
    return made


def inverted(x: Tensor, made: Tensor) -> Tensor:
    """made, which is the pseudoinverse of symmetric x [.., k, k], with the derivative of that as
    long as x keeps its range."""
    if x.requires_grad:
        return _Inverted.apply(x, made.detach())
    return made


class _Svd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        return u, s, vh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gu: Tensor, gs: Tensor, gvh: Tensor) -> Tensor:
        u, s, vh = ctx.saved_tensors
        v, gv = vh.mT, gvh.mT
        p, q = (y - y.mT for y in (u.mT @ gu, v.mT @ gv))
        rows, columns = s[..., :, None], s[..., None, :]
        floor = EQUAL * s[..., :1, None]
        inner = (p + q) / 2 * _inverse(columns - rows, floor)
        inner = inner + (p - q) / 2 * _inverse(columns + rows, floor) + torch.diag_embed(gs)
        inverse = _inverse(s[..., None, :], floor)
        left, right = gu * inverse, gv * inverse
        beside = _off(u, left) @ vh + u @ _off(v, right).mT
        return u @ inner @ vh + beside


class _Polar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Tensor, floor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.floor = floor
        return made.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        present = (s > ctx.floor * s[..., :1])[..., None, :]
        u, v = u * present, vh.mT * present
        inverse = torch.where(present, 1 / s[..., None, :].where(present, 1.0), 0.0)
        inner = u.mT @ g @ v
        sums = s[..., :, None] + s[..., None, :]
        pairs = present & present.mT
        inner = torch.where(pairs, (inner - inner.mT) / sums.where(pairs, 1.0), 0.0)
        beside = _off(u, g @ (v * inverse)) @ v.mT + (u * inverse) @ _off(v, g.mT @ u).mT
        return u @ inner @ v.mT + beside, None, None


class _Inverted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Tensor) -> Tensor:
        ctx.save_for_backward(made)
        return made.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (made,) = ctx.saved_tensors
        return -made.mT @ g @ made.mT, None


def _off(basis: Tensor, y: Tensor) -> Tensor:
    """y without what of it lies in the space of orthonormal columns."""
    return y - basis @ (basis.mT @ y)


def _inverse(x: Tensor, floor: Tensor) -> Tensor:
    """1 / x, and nearly 0 where x is far below a floor."""
    square = x * x + floor * floor
    return torch.where(square > 0, x / square.where(square > 0, 1.0), 0.0)
