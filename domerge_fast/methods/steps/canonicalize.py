"""Before a merge: the balanced factors of every update on its own.

    s_i B_i A_i = U S V^T,  B'_i = U sqrt(S),  A'_i = sqrt(S) V^T,  s'_i = 1

(B_i M, M^-1 A_i) is the same adapter for every invertible M: after this step, methods that look at
factors (`do`, `pico`, `core`, `lego`, `robust`) depend on the updates alone. With X^T X = A A^T,
Y^T Y = B^T B and the SVD Y X^T = W S Z^T, which has the singular values of B A,

    A' = S^(-1/2) W^T Y A,  B'^T = S^(-1/2) Z^T X B^T

and no factor is inverted. Of the two signs of a pair of singular vectors, that is taken with which
the row of A' has a positive sum. Ranks stay r_i: directions that are rounding noise are rows of
zeros. Cost: two reads of the factors, 4 r_i^2 (m + n) flops and three decompositions of r_i x r_i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.roots import root
from ...algebra.side import Side
from ..base import Settings
from ..spectral.space import NOISE
from .base import PreStep, alike

__all__ = ["STEP", "balanced"]

Spectrum = Callable[[Tensor], Tensor]
"""Singular values [P, r], zero where they are noise -> others, zero there too."""


def run(stacks: Sequence[Stack], settings: Settings) -> list[Stack]:
    return balanced(stacks, settings, lambda s: s)


def balanced(stacks: Sequence[Stack], settings: Settings, spectrum: Spectrum) -> list[Stack]:
    """The balanced factors of every update with other singular values."""
    sides = [*(s.a for s in stacks), *(s.b for s in stacks)]
    coefficients = _own_grams(sides, settings.backend)
    count = len(coefficients) // 2
    for members in alike(len(g) for g in coefficients[:count]):
        grams_a = torch.stack([coefficients[k] for k in members])
        grams_b = torch.stack([coefficients[count + k] for k in members])
        for k, c_a, c_b in zip(members, *_coefficients(grams_a, grams_b, spectrum)):
            coefficients[k], coefficients[count + k] = c_a, c_b
    problems = [Side((x,), (c,)) for side in sides for x, c in zip(side.blocks, side.scales)]
    found = ops.apply(coefficients, problems, torch.float32, backend=settings.backend)
    for rows, columns in zip(found[:count], found[count:]):
        sign = torch.where(rows.sum(1, keepdim=True) < 0, -1.0, 1.0)
        rows *= sign
        columns *= sign
    a, b = iter(found[:count]), iter(found[count:])
    return [
        dataclasses.replace(s, a=_joined(a, len(s.a.blocks)), b=_joined(b, len(s.b.blocks)))
        for s in stacks
    ]


def _own_grams(sides: Sequence[Side], backend: str) -> list[Tensor]:
    """X_i X_i^T [r_i, r_i] of every block of every side, in float64."""
    packed = ops.block_gram(sides, backend=backend)
    parts = (x.split_with_sizes([r * r for r in p.ranks]) for x, p in zip(packed, sides))
    return [x.view(r, r) for own, p in zip(parts, sides) for x, r in zip(own, p.ranks)]


def _joined(blocks: Iterator[Tensor], count: int) -> Side:
    return Side(tuple(islice(blocks, count)), (1.0,) * count)


def _coefficients(grams_a: Tensor, grams_b: Tensor, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """C_A and C_B [P, r, r] in float32 with A' = C_A A and B'^T = C_B B^T, from A A^T and B^T B;
    S^(-1/2) becomes spectrum(S)^(1/2) S^-1.

    Row k of A and column k of B are brought to one norm first, or to zero if one of them is:
    neither side alone decides what is rounding noise.
    """
    rows, columns = (g.diagonal(dim1=1, dim2=2) for g in (grams_a, grams_b))
    live = ((rows > 0) & (columns > 0))[:, None]
    gains = torch.where(live, (columns / rows)[:, None] ** 0.25, 1.0)
    root_a, root_b = (
        root(g * (live.mT & live)) for g in (gains.mT * grams_a * gains, grams_b / gains.mT / gains)
    )
    u, s, vh = torch.linalg.svd(root_b @ root_a.mT)
    sizes = torch.linalg.matrix_norm(root_a) * torch.linalg.matrix_norm(root_b)
    s = torch.where(s > NOISE * sizes[:, None], s, 0.0)
    inverse = torch.where(s > 0, spectrum(s).sqrt() / s, 0.0)[..., None]
    c_a, c_b = inverse * (u.mT @ root_b) * gains, inverse * (vh @ root_a) / gains
    return (c_a * live).float(), (c_b * live).float()


STEP = PreStep("canonicalize", "balance each update: B = U sqrt(S), A = sqrt(S) V^T", run)
