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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...adapters.plan import Stack
from ..base import Method, wide_grams
from ..contract import Batch, Coefficients, Needs, State, alike, batch
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
    return Method(name, summary, options, coefficients=found, **row)


def norm(b: Tensor, a: Tensor) -> Tensor:
    """||b^T a||_F, [P]."""
    return torch.linalg.matrix_norm(b.mT @ a)


def svd(b: Tensor, a: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [P, K_B, q], S [P, q], V [P, K_A, q] of b^T a, for b [P, r, K_B] and a [P, r, K_A].

    Triplets with a singular value of at most NOISE times size [P] are zero. q is the least of r,
    K_B and K_A.
    """
    if b.shape[1] < min(b.shape[2], a.shape[2]):
        q_b, r_b = torch.linalg.qr(b.mT)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
        u, v = q_b @ u, q_a @ vh.mT
    else:
        u, s, vh = torch.linalg.svd(b.mT @ a, full_matrices=False)
        v = vh.mT
    present = s > NOISE * size[:, None]
    return u * present[:, None], s * present, v * present[:, None]


def polar(x: Tensor) -> Tensor:
    """orth(X) = (X X^T)^(-1/2) X of X [P, K, q], on its support; zero columns stay zero."""
    values, vectors = torch.linalg.eigh(x @ x.mT)
    return vectors @ (inverse(values).sqrt()[..., None] * (vectors.mT @ x))


def inverse(values: Tensor) -> Tensor:
    """1 / values [P, K], the ascending eigenvalues of a Gram; 0 off its support."""
    floor = SUPPORT**2 * values[:, -1:]
    return torch.where(values > floor.clamp_min(0), 1 / values, 0.0)


def level(s: Tensor) -> Tensor:
    """The mean of the singular values s [P, q] that are not zero, [P, 1, 1]; 0 without any."""
    count = (s > 0).sum(1).clamp_min(1)
    return (s.sum(1) / count)[:, None, None]


def coefficients(
    core: Core, grams: Batch, state: State, weights: Sequence[Sequence[float]], options: Any
) -> list[Coefficients]:
    """What `core` makes of every module."""
    x, to_a, to_b = coordinates(grams, weights)
    left, right = core(x, options)
    measured = None
    if state.calibrated:
        left, right, *measured = svc.measured(x.tasks(), left, right)
    sizes = [None] * len(left)
    if state.order:
        sizes = schatten.of_triplets(left, right, state.order).tolist()
    found = []
    for p, size in enumerate(sizes):
        more = (measured[0][p], measured[1][p]) if measured else None
        found.append(balanced(left[p], right[p], to_a[p], to_b[p], size, more))
    return found


def balanced(
    left: Tensor,
    right: Tensor,
    to_a: Tensor,
    to_b: Tensor,
    size: float | None = None,
    measured: tuple[Tensor, Tensor] | None = None,
) -> Coefficients:
    """Q_B left right Q_A^T of a module, in float32: what is kept of it until it is applied.
    measured: its s_i^r and overlaps, where it is in singular triplets."""
    kept, columns, rows = _balanced(left, right)
    a, b = (rows @ to_a).float(), (columns @ to_b).float()
    if measured is None:
        return Coefficients(size, a=a, b=b)
    strengths, overlaps = measured
    return Coefficients(size, overlaps, a=a, b=b, strengths=strengths[:, kept])


def coordinates(
    grams: Batch, weights: Sequence[Sequence[float]]
) -> tuple[Coordinates, Tensor, Tensor]:
    """The modules' coordinates, and E_A, E_B [P, K, R] with Q_A^T = E_A A and Q_B^T = E_B B^T (B
    without scalings)."""
    a, to_a = _side(grams.a, grams.sides[0])
    b, to_b = _side(grams.b, grams.sides[1])
    rows = [_gains(*pair, grams.ranks) for pair in zip(weights, grams.scales)]
    gains = torch.tensor(rows, dtype=torch.float64)
    return Coordinates(a, b, gains[..., None].to(b.device), grams.ranks), to_a, to_b


def in_coordinates(
    stacks: Sequence[Stack], backend: str
) -> Iterator[tuple[list[int], Coordinates, Tensor, Tensor]]:
    """Batches of positions of stacks with their `coordinates`."""
    grams_a, grams_b = wide_grams(stacks, backend)
    for members in alike(stacks):
        chosen = [stacks[k] for k in members]
        grams = batch(chosen, [grams_a[k] for k in members], [grams_b[k] for k in members])
        yield members, *coordinates(grams, [s.weights for s in chosen])


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


def _gains(weights: Sequence[float], scales: Sequence[float], ranks: Sequence[int]) -> list[float]:
    """w_i s_i of every row."""
    return [w * scale for w, scale, rank in zip(weights, scales, ranks) for _ in range(rank)]


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which directions are kept, and left^T [q, K_B] and right [q, K_A] of the same product and
    with directions of equal norms on both sides: none of norm zero (one, where all are), and at
    most the smaller of K_A and K_B."""
    norms = left.norm(dim=0), right.norm(dim=1)
    kept = (norms[0] * norms[1] > 0).nonzero().flatten()
    count, columns = len(left), right.shape[1]
    if len(kept) > min(count, columns):
        product, identity = left @ right, torch.eye(min(count, columns)).to(left)
        return _balanced(*((product, identity) if columns < count else (identity, product)))
    if not len(kept):
        return kept.new_zeros(1), torch.zeros_like(left.mT[:1]), torch.zeros_like(right[:1])
    ratio = (norms[1] / norms[0]).sqrt()[kept, None]
    return kept, ratio * left.mT[kept], right[kept] / ratio
