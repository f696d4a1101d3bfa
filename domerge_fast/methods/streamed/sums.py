"""What a pass over adapters adds up on one side of a module, and what of it goes on with more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kept", "Sums"]


@dataclass(eq=False)
class Sums:
    """Of some adapters: Φ = sum Y_i^T Y_i [d, d] in float64, in the eigenvectors of S where there
    is one; sum ||Y_i Y_i^T||^2; ||Xhat - X||^2, with what of it is numbers times the X_i; and what
    the Y_i would gain by being put in their own equations once more, which is not kept."""

    whole: Tensor
    own: float = 0.0
    moved: float = 0.0
    along: float = 0.0
    left: float = 0.0

    @classmethod
    def fresh(cls, d: int, device: torch.device) -> Sums:
        return cls(torch.zeros(d, d, dtype=torch.float64, device=device))

    def times(self, power: int) -> Sums:
        """In another unit: the Y_i^T Y_i are as large as X."""
        rest = (4.0**power * x for x in (self.own, self.moved, self.along, self.left))
        return Sums(2.0**power * self.whole, *rest)

    def plus(self, other: Sums) -> Sums:
        """Of both. Each Φ as it is, in no eigenvectors."""
        rest = self.own + other.own, self.moved + other.moved, self.along + other.along
        return Sums(self.whole + other.whole, *rest, self.left + other.left)

    def add(self, y: Tensor) -> None:
        rows = y.flatten(0, 1)
        self.whole += rows.T @ rows
        self.own += float((y @ y.mT).double().square().sum())

    @property
    def overlap(self) -> float:
        return float(self.whole.square().sum()) - self.own


@dataclass(frozen=True, eq=False)
class Kept:
    """A descent that has stopped. norms: the n_i in the adapters' own size. power: log2 of the unit
    of the rest. given: of the X_i; reached: of the Xhat_i. gap: as of `Descent`. passes: the last
    that it took."""

    norms: Tensor
    power: int
    given: Sums
    reached: Sums
    gap: float
    passes: int

    def times(self, power: int) -> Kept:
        """In another unit."""
        return dataclasses.replace(
            self,
            power=self.power - power,
            given=self.given.times(power),
            reached=self.reached.times(power),
            gap=4.0**power * self.gap,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """For `of`. Of the two Φ, which are symmetric, a triangle each, in float32."""
        found = {"norms": self.norms, "numbers": self._numbers}
        if self.given.own:
            first, last = self.given.whole.float(), self.reached.whole.float()
            found["sums"] = last.tril() + first.triu(1)
            found["diagonal"] = first.diagonal().clone()
        return found

    @property
    def _numbers(self) -> Tensor:
        last = self.reached
        found = self.passes, self.power, self.gap, self.given.own, last.own, last.moved, last.along
        return torch.tensor(found, dtype=torch.float64)

    @classmethod
    def of(cls, d: int, tensors: Mapping[str, Tensor], device: torch.device) -> Kept:
        """From `tensors`. KeyError or ValueError where that is not what they are."""
        passes, power, gap, first, last, moved, along = tensors["numbers"].tolist()
        given, reached = Sums.fresh(d, device), Sums.fresh(d, device)
        if first:
            both = tensors["sums"].to(device, torch.float64)
            lower, upper = both.tril(-1), both.triu(1)
            diagonal = tensors["diagonal"].to(device, torch.float64)
            reached.whole += lower + lower.T + both.diagonal().diag()
            given.whole += upper + upper.T + diagonal.diag()
        given.own, reached.own, reached.moved, reached.along = first, last, moved, along
        return cls(tensors["norms"], int(power), given, reached, gap, int(passes))
