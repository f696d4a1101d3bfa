"""ΔW = λ L C(κ) R: coefficients enter mathematics in R x R between orthonormal bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...adapters.plan import Stack
from ...algebra.cuts import check_cuts
from ...algebra.side import Side
from ...algebra.threads import of_parts
from ...errors import FlatCut, OptionError
from ...methods.base import Chosen, Settings
from ...methods.contract import Batch, State, batches, checked
from ...methods.made import Factors
from ...methods.running import prepared
from ...methods.spectral import space, svc
from .alike import Alike, Inner, Weights

__all__ = ["Cores", "Given", "Inside"]

Densities = Sequence[float | None]
"""Of every module; None: that of the method's options."""


@dataclass(frozen=True, eq=False)
class _Rotated(Alike):
    """a, bare: coordinates of A and of B^T without scalings, [P, R, K]; sizes: s_i of every row
    [P, R]."""

    kind: ClassVar[str] = "rotated"
    a: Tensor
    bare: Tensor
    sizes: Tensor
    method: Chosen


@dataclass(frozen=True, eq=False)
class Cores(_Rotated):
    """What a method's `core` (methods/spectral/space.py) makes of coordinates; gradients reach κ.
    rank: what the merge is cut to, by its SVD; None: it is not. calibrated: whether it is to be."""

    rank: int | None = None
    calibrated: bool = False

    def found(self, weights: Weights) -> Inner:
        rows = weights.of_rows * self.sizes
        flat, shape = rows.flatten(0, -2), rows.shape[:-1]
        rank = sum(self.ranks)
        if rows.requires_grad:
            results = [self._of(flat, slice(0, len(flat)))]
        else:
            parts, device = batches(len(flat), rank, flat.device), flat.device
            results = of_parts(lambda part: self._of(flat, part), parts, device, lambda _: rank)
        found = [torch.cat(x).unflatten(0, shape) for x in zip(*results)]
        strengths, overlaps = found[2:] or (None, None)
        return Inner(left=found[0], right=found[1], strengths=strengths, overlaps=overlaps)

    def _of(self, rows: Tensor, part: slice) -> list[Tensor]:
        """left and right of merges with these rows [N P, R], and what is measured of them. part:
        which; those of one candidate are together."""
        row, count = self.method.method, len(self.names)
        modules = torch.arange(part.start, part.stop, device=rows.device) % count
        a, bare = self.a[modules], self.bare[modules]
        x = space.Coordinates(a, bare, rows[part, :, None], self.ranks)
        assert row.core
        try:
            left, right = row.core(x, self.method.options)
            if self.rank is not None:
                left, right = _cut(left, right, self.rank, row.truncates)
            measured = svc.measured(x.tasks(), left, right) if self.calibrated else (left, right)
        except FlatCut as error:
            raise error.of(self.names[(part.start + error.at) % count], row.name) from None
        return list(measured)


def _cut(left: Tensor, right: Tensor, rank: int, triplets: bool) -> tuple[Tensor, Tensor]:
    """The first `rank` singular triplets of left right [P, K_B, K_A]. triplets: whether they are
    given as such, in falling order."""
    if triplets:
        values = left.norm(dim=1)
    else:
        size = torch.linalg.matrix_norm(left @ right)
        u, values, v = space.svd(left.mT, right, size)
        left, right = u * values[:, None], v.mT
    check_cuts(values, torch.full((len(values),), rank))
    return left[..., :rank], right[:, :rank]


@dataclass(frozen=True, eq=False)
class Given(_Rotated):
    """What a method makes of Grams (methods/contract.py), which no gradient goes through. grams_a,
    grams_b: as the method takes them, [P, R, R]; sides: n and m as far as they limit the rank."""

    grams_a: Tensor
    grams_b: Tensor
    sides: tuple[int, int]

    def found(self, weights: Weights) -> Inner:
        return _each(weights, self.method.method.name, self._of)

    def _of(self, weights: list[list[float]], _: Densities) -> list[tuple[Tensor, Tensor]]:
        """left [K_B, q] and right^T [K_A, q] of every module."""
        method = self.method.method
        needs = method.takes(self.method.options)
        firsts = [sum(self.ranks[:k]) for k in range(len(self.ranks))]  # rows of the adapters
        grams = Batch(
            (self.grams_a, self.grams_b),
            self.sizes[:, firsts],
            self.ranks,
            self.sides,
            self.names,
            self.owners,
        )
        given = torch.tensor(weights, dtype=torch.float64)
        assert method.coefficients
        made = method.coefficients(grams, State(), given, self.method.options)
        x = checked(made, method.name, self.ranks, given)
        b = self.bare if needs.bare else self.sizes[..., None] * self.bare
        if x.a is None:
            pairs = zip(grams.of_rows(x.b)[..., None] * b, self.a)
        else:
            pairs = zip(x.b.to(b) @ b, x.a.to(b) @ self.a)
        return [(left.mT, right.mT) for left, right in pairs]


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


@dataclass(frozen=True, eq=False)
class Inside(Alike):
    """What a method makes of updates in a basis (`Method.basis`), which no gradient goes through:
    A [P, R, K_A] and B^T [P, R, K_B] of these, with scalings. rank: what it cuts to, if it does."""

    kind: ClassVar[str] = "rotated"
    a: Tensor
    b: Tensor
    method: Chosen
    rank: int | None
    backend: str

    def found(self, weights: Weights) -> Inner:
        return _each(weights, self.method.method.name, self._of)

    def _of(self, weights: list[list[float]], densities: Densities) -> list[tuple[Tensor, Tensor]]:
        empty = self.b.new_zeros(self.b.shape[2], 1), self.a.new_zeros(self.a.shape[2], 1)
        found = [empty] * len(weights)
        settings = Settings(1.0, torch.float32, self.backend, rank=self.rank)
        members: dict[float | None, list[int]] = {}
        for k, (row, density) in enumerate(zip(weights, densities)):
            if any(row):
                members.setdefault(density, []).append(k)
        for density, present in members.items():
            stacks = [self._stack(k, weights[k]) for k in present]
            merge = prepared(_at(self.method, density), [stacks], settings)
            for k, x in zip(present, merge(stacks, settings)):
                found[k] = (x.b, x.a.mT) if isinstance(x, Factors) else _thin(x.delta)
        return [(left.double(), right.double()) for left, right in found]

    def _stack(self, k: int, weights: list[float]) -> Stack:
        a, b = Side.split(self.a[k], self.ranks), Side.split(self.b[k], self.ranks)
        return Stack((self.names[k],), self.owners, a, b, tuple(weights))


def _at(method: Chosen, density: float | None) -> Chosen:
    """With this density, where it has any."""
    if density is None or not hasattr(method.options, "density"):
        return method
    return replace(method, options=replace(method.options, density=density))


def _thin(delta: Tensor) -> tuple[Tensor, Tensor]:
    """left [K_B, k] and right^T [K_A, k] of a matrix, k the smaller of both."""
    rows, columns = delta.shape
    unit = torch.eye(min(rows, columns)).to(delta)
    return (unit, delta.mT) if rows <= columns else (delta, unit)


def _each(
    weights: Weights,
    name: str,
    of: Callable[[list[list[float]], Densities], list[tuple[Tensor, Tensor]]],
) -> Inner:
    """of(weights, densities of every module) -> left [K_B, q] and right^T [K_A, q] of each; of
    every candidate one after the other, with columns of zeros up to the largest q."""
    given = weights.need_adapters(name)
    if given.requires_grad:
        problem = f"no gradient goes through {name!r}"
        raise OptionError("kappa", problem, "detach it, or prepare a method that has one")
    many, count = given.shape[:-2], given.shape[-2]
    densities: list[Densities] = [[None] * count] * many.numel()
    if weights.densities is not None:
        densities = weights.densities.expand(*many, count).reshape(-1, count).tolist()
    rows = given.reshape(-1, *given.shape[-2:]).tolist()
    found = [of(*x) for x in zip(rows, densities)]
    width = max(x.shape[-1] for pair in found for x, _ in pair)
    left, right = (
        torch.stack([torch.stack([_padded(x[side], width) for x in one]) for one in found])
        for side in (0, 1)
    )
    left, right = (x.reshape(*many, *x.shape[1:]) for x in (left, right))
    return Inner(left=left, right=right.mT)
