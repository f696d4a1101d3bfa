"""Orthonormal coordinates of stacked factors: spectral methods as R x R mathematics.

Orthonormal Q_A, Q_B of the stacked A and B, from their Grams in float64, turn every update into

    τ_i = w_i s_i B_i A_i = Q_B (b_i^T a_i) Q_A^T

and what a method does to the singular values and vectors of the τ_i, it does to the b_i^T a_i.
Its result Q_B (left right) Q_A^T goes back to factors as C_B B^T and C_A A. Every method is
defined on the numerical support: directions that are rounding noise are zero, not arbitrary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...adapters.plan import Stack
from ...algebra import derivatives
from ..base import Method, wide_grams
from ..contract import Batch, Coefficients, Needs, State, batched
from . import schatten, svc

__all__ = [
    "NEEDS",
    "NOISE",
    "SUPPORT",
    "Coordinates",
    "balanced",
    "coefficients",
    "coordinates",
    "in_coordinates",
    "inverse",
    "level",
    "method",
    "norm",
    "polar",
    "pseudoinverse",
    "svd",
]

SUPPORT = 1e-6
"""A direction that unit vectors hold less of than this share of the most is rounding noise (half
the digits of float64, as it is found from a Gram)."""

NOISE = 2.0**-24
"""A singular value below this share of the norm of what it was computed from is rounding noise."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """P modules of the same ranks, in float64: A = a Q_A^T with a [P, R, K_A], the B^T without
    their scalings = bare Q_B^T with bare [P, R, K_B], and gains w_i s_i [P, R, 1] of their rows.

    Directions off the support of a stack are columns of zeros.
    """

    a: Tensor
    bare: Tensor
    gains: Tensor
    ranks: tuple[int, ...]

    @cached_property
    def b(self) -> Tensor:
        """Coordinates of the w_i s_i B_i^T, [P, R, K_B]."""
        return self.gains * self.bare

    def tasks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """b_i [P, r_i, K_B] and a_i [P, r_i, K_A] of every adapter."""
        return zip(self.b.split_with_sizes(self.ranks, 1), self.a.split_with_sizes(self.ranks, 1))

    @cached_property
    def norms(self) -> Tensor:
        """||τ_i||_F, [P, T]."""
        return torch.stack([norm(b, a) for b, a in self.tasks()], 1)


Core = Callable[[Coordinates, Any], tuple[Tensor, Tensor]]
"""(coordinates, options) -> left [P, K_B, q], right [P, q, K_A]: ΔW = Q_B left right Q_A^T."""


NEEDS = Needs(torch.float64, bare=True, calibrates=True)


def method(name: str, summary: str, options: type, core: Core, **row: Any) -> Method:
    """The row of a method that is `core` in orthonormal coordinates."""
    row.setdefault("cost", "two reads, R x R decompositions")
    row.setdefault("takes", lambda options: NEEDS)
    found = functools.partial(coefficients, core)
    return Method(name, summary, options, coefficients=found, core=core, **row)


def norm(b: Tensor, a: Tensor) -> Tensor:
    """||b^T a||_F, [P]."""
    return torch.linalg.matrix_norm(b.mT @ a)


def svd(b: Tensor, a: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [P, K_B, q], S [P, q], V [P, K_A, q] of b^T a, for b [P, r, K_B] and a [P, r, K_A].

    Triplets with a singular value of at most NOISE times size [P] are zero. q is the least of r,
    K_B and K_A.
    """
    wanted = b.requires_grad or a.requires_grad
    if b.shape[1] < min(b.shape[2], a.shape[2]) and not wanted:
        q_b, r_b = torch.linalg.qr(b.mT)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
        u, v = q_b @ u, q_a @ vh.mT
    else:
        u, s, vh = derivatives.svd(b.mT @ a)
        v = vh.mT
    present = s > NOISE * size[:, None]
    return u * present[:, None], s * present, v * present[:, None]


def polar(x: Tensor) -> Tensor:
    """orth(X) = (X X^T)^(-1/2) X of X [P, K, q], on its support; zero columns stay zero."""
    given = x.detach()
    values, vectors = torch.linalg.eigh(given @ given.mT)
    made = vectors @ (inverse(values).sqrt()[..., None] * (vectors.mT @ given))
    return derivatives.polar(x, made, SUPPORT)


def pseudoinverse(gram: Tensor) -> Tensor:
    """Of symmetric positive semidefinite [P, K, K], on its support."""
    values, vectors = torch.linalg.eigh(gram.detach())
    return derivatives.inverted(gram, (vectors * inverse(values)[:, None]) @ vectors.mT)


def inverse(values: Tensor) -> Tensor:
    """1 / values [P, K], the ascending eigenvalues of a Gram; 0 off its support."""
    floor = SUPPORT**2 * values[:, -1:]
    return torch.where(values > floor.clamp_min(0), 1 / values, 0.0)


def level(s: Tensor) -> Tensor:
    """The mean of the singular values s [P, q] that are not zero, [P, 1, 1]; 0 without any."""
    count = (s > 0).sum(1).clamp_min(1)
    return (s.sum(1) / count)[:, None, None]


def coefficients(
    core: Core, grams: Batch, state: State, weights: Tensor, options: Any
) -> Coefficients:
    """What `core` makes of the modules."""
    x, to_a, to_b = coordinates(grams, weights)
    left, right = core(x, options)
    strengths = overlaps = None
    if state.calibrated:
        left, right, strengths, overlaps = svc.measured(x.tasks(), left, right)
    found = balanced(left, right, to_a, to_b)
    sizes = schatten.of_triplets(left, right, state.order).tolist() if state.order else None
    return replace(found, sizes=sizes, strengths=strengths, overlaps=overlaps)


def balanced(left: Tensor, right: Tensor, to_a: Tensor, to_b: Tensor) -> Coefficients:
    """Q_B left right Q_A^T of modules, in float32: what is kept of it until it is applied."""
    columns, rows = _balanced(left, right)
    return Coefficients(a=(rows @ to_a).float(), b=(columns @ to_b).float())


def coordinates(grams: Batch, weights: Tensor) -> tuple[Coordinates, Tensor, Tensor]:
    """The modules' coordinates for weights [P, T], and E_A, E_B [P, K, R] with Q_A^T = E_A A and
    Q_B^T = E_B B^T (B without scalings)."""
    a, to_a = _side(grams.a, grams.sides[0])
    b, to_b = _side(grams.b, grams.sides[1])
    gains = grams.of_rows(weights * grams.scales)[..., None]
    return Coordinates(a, b, gains.to(b.device), grams.ranks), to_a, to_b


def in_coordinates(
    stacks: Sequence[Stack], backend: str
) -> Iterator[tuple[Sequence[int], Coordinates, Tensor, Tensor]]:
    """Batches of positions of stacks of one module with their `coordinates`."""
    for members, grams, weights in batched(stacks, *wide_grams(stacks, backend)):
        for at in grams.parts:
            yield members[at], *coordinates(grams.part(at), weights[at])


def _side(grams: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Coordinates x [P, R, K] with X = x Q^T, and E [P, K, R] with Q^T = E X, from grams
    [P, R, R] of X [R, d]; K is the smaller of R and d.

    Rows are brought to unit length first: no adapter's size decides what is noise.
    """
    sizes = grams.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[..., None]
    unit = torch.where(sizes > 0, 1 / sizes, 0.0)
    values, vectors = torch.linalg.eigh(unit * grams * unit.mT)
    k = min(d, grams.shape[1])
    values, vectors = values[:, -k:], vectors[..., -k:]
    scales = inverse(values).sqrt()[:, None]
    x = sizes * vectors * (values[:, None] * scales)
    return x, (unit * vectors * scales).mT


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """left^T [P, q, K_B] and right [P, q, K_A] of the same products, with directions of equal norms
    on both sides: zeros where one is zero, and no more others than the smaller of K_A and K_B."""
    left, right = _uncrowded(left, right)
    norms = left.norm(dim=1)[..., None], right.norm(dim=2)[..., None]
    live = norms[0] * norms[1] > 0
    ratio = torch.where(live, norms[1] / norms[0], 1.0).sqrt()
    return ratio * left.mT * live, right / ratio * live


def _uncrowded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products, of modules with more directions than there can be as the product beside a
    unit matrix."""
    count, columns = left.shape[1], right.shape[2]
    most, given = min(count, columns), left.shape[2]
    if given <= most:
        return left, right
    crowded = ((left.norm(dim=1) * right.norm(dim=2) > 0).sum(1) > most)[:, None, None]
    if not bool(crowded.any()):
        return left, right
    product, unit = left @ right, torch.eye(most).to(left).expand(len(left), -1, -1)
    pair = (product, unit) if columns < count else (unit, product)
    whole = pad(pair[0], (0, given - most)), pad(pair[1], (0, 0, 0, given - most))
    return torch.where(crowded, whole[0], left), torch.where(crowded, whole[1], right)
