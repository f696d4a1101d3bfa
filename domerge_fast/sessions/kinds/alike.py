"""Modules that are alike, prepared together: what every kind of these can be asked."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...algebra.side import each_row
from ...errors import OptionError

__all__ = ["Alike", "Found", "Inner", "Weights", "magnitudes", "selection"]


@dataclass(frozen=True, eq=False)
class Weights:
    """Coefficients of P modules: of_adapters [.., P, T] of those that have them, None where every
    direction has its own; of_rows [.., P, R] of the stacked rank-1 parts; densities [.., P], None
    for what the method's options say."""

    of_adapters: Tensor | None
    of_rows: Tensor
    densities: Tensor | None = None

    def need_adapters(self, method: str) -> Tensor:
        """OptionError where there are none."""
        if self.of_adapters is None:
            problem = f"{method!r} takes one coefficient an adapter, not one a direction"
            raise OptionError("kappa", problem, "give [modules, T], or another level")
        return self.of_adapters


@dataclass(frozen=True, eq=False)
class Inner:
    """What coefficients make of P modules, without λ: gains g [.., P, k], or left [.., P, K_B, q]
    and right [.., P, q, K_A] with C = left right. columns: h [.., P, n]; None for ones. strengths,
    overlaps: [.., P, T, q] and [.., P, 2, T] of a merge that is to be calibrated (calibrating.py),
    in singular triplets then."""

    gains: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    columns: Tensor | None = None
    strengths: Tensor | None = None
    overlaps: Tensor | None = None

    @property
    def core(self) -> Tensor:
        """C [.., P, K_B, K_A]."""
        assert self.left is not None
        assert self.right is not None
        return self.left @ self.right

    def times(self, scale: Tensor) -> Inner:
        """With λ [P]."""
        if self.gains is not None:
            return dataclasses.replace(self, gains=scale[:, None].to(self.gains) * self.gains)
        assert self.left is not None
        return dataclasses.replace(self, left=scale[:, None, None].to(self.left) * self.left)


@dataclass(frozen=True, eq=False)
class Found:
    """One module's `Inner`: gains [k], or left [K_B, q] and right [q, K_A]; columns [n]."""

    gains: Tensor | None
    left: Tensor | None
    right: Tensor | None
    columns: Tensor | None

    @classmethod
    def of(cls, inner: Inner, at: int) -> Found:
        """Of the module at this place, of an `Inner` without batch dimensions."""
        parts = inner.gains, inner.left, inner.right, inner.columns
        return cls(*(None if x is None else x[at] for x in parts))

    def factors(self, a: Tensor, bt: Tensor) -> tuple[Tensor, Tensor]:
        """A' [q, n] and B'^T [q, m] from the bases R [k, n] and L^T [k, m]."""
        if self.gains is not None:
            rows = a if self.columns is None else a * self.columns.to(a)
            return rows, self.gains.to(bt)[:, None] * bt
        assert self.left is not None
        assert self.right is not None
        return self.right.to(a) @ a, self.left.to(bt).mT @ bt

    def write(self, a: Tensor, bt: Tensor, into_a: Tensor, into_b: Tensor) -> None:
        """A' into [q, n] or B' into [m, q]: the other one is the basis as it is."""
        if self.gains is None:
            assert self.left is not None
            assert self.right is not None
            into_a[: len(bt)].copy_((self.left.to(a) @ self.right.to(a)) @ a)
        elif self.columns is None:
            _write(into_b, bt.mT, None, self.gains)
        else:
            _write(into_a, a, self.gains, self.columns)


def _write(into: Tensor, x: Tensor, rows: Tensor | None, columns: Tensor) -> None:
    """diag(rows) x diag(columns) in float32, rounded once: on a CPU in pieces that stay in its
    cache."""
    step = max(1, PIECE // x.shape[1]) if x.device.type == "cpu" else len(x)
    piece = torch.empty(step, x.shape[1], dtype=torch.float32, device=x.device)
    columns, rows = columns.to(piece), None if rows is None else rows.to(piece)
    for at in range(0, len(x), step):
        given, part = x[at : at + step], piece[: len(x) - at]
        if given.dtype == part.dtype:
            torch.mul(given, columns, out=part)
        else:
            part.copy_(given).mul_(columns)
        if rows is not None:
            part.mul_(rows[at : at + step, None])
        into[at : at + step].copy_(part)


PIECE = 1 << 17
"""Numbers of a piece."""


@dataclass(frozen=True, eq=False)
class Alike(abc.ABC):
    """P modules of the same adapters and ranks. scale: λ of each, [P] in float64. Other tensors
    begin with P, too."""

    kind: ClassVar[str]
    names: tuple[str, ...]
    owners: tuple[int, ...]
    ranks: tuple[int, ...]
    scale: Tensor

    @abc.abstractmethod
    def found(self, weights: Weights) -> Inner:
        """What coefficients make of the modules at λ = 1."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by the field they are in."""
        fields = (f.name for f in dataclasses.fields(self))
        return {n: x for n in fields if isinstance(x := getattr(self, n), Tensor)}

    def part(self, at: Sequence[int]) -> Alike:
        """Some of the modules."""
        rows = torch.tensor(at, device=self.scale.device)
        tensors: dict[str, Any] = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, names=tuple(self.names[k] for k in at), **tensors)


def selection(
    x: Alike, places: Mapping[str, int], adapters: int
) -> Callable[[Tensor, Tensor | None], Weights]:
    """Takes the coefficients [.., modules, T or R] and densities [.., modules] of modules that are
    alike out of those of all."""
    device = x.scale.device
    rows = torch.tensor([places[name] for name in x.names], device=device)
    every = len(rows) == len(places) and bool((rows == torch.arange(len(rows)).to(rows)).all())
    owner = torch.tensor(x.owners, device=device)
    of_row = each_row(owner, x.ranks)
    all_adapters = len(owner) == adapters

    def weights(kappa: Tensor, densities: Tensor | None) -> Weights:
        given = kappa if every else kappa.index_select(-2, rows)
        shares = None if densities is None else densities[..., rows.cpu()]
        if kappa.shape[-1] != adapters:
            return Weights(None, given[..., : len(of_row)], shares)
        own = given if all_adapters else given.index_select(-1, owner)
        return Weights(own, given.index_select(-1, of_row), shares)

    return weights


def magnitudes(weights: Tensor) -> Tensor:
    """ω_i = w_i / sum |w| [.., T], zeros where all are zero."""
    total = weights.abs().sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.where(total > 0, 1.0), 0.0)
