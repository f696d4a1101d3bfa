"""The sides of stacks after DO-Merging's descents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters.plan import Stack
from ..algebra.powers import exponents
from ..algebra.side import Side
from .contract import Found
from .side_report import SideReports

__all__ = ["Descended", "Kept", "Moved", "sized"]


Kept = tuple[Tensor | None, Tensor | None, SideReports]
"""C, or Xhat, and what the descent reports."""


@dataclass(frozen=True, eq=False)
class Moved:
    """Xhat = C X of one side: a problem and its C (None for the identity). x_hat: [R, d], of what
    descended on the factors themselves, whose problem has its rows."""

    problem: Side
    c: Tensor | None
    report: SideReports | None
    x_hat: Tensor | None = None

    @classmethod
    def of(cls, problem: Side, kept: Kept) -> Moved:
        """Of what was kept of it."""
        c, x_hat, report = kept
        moved = problem if x_hat is None else Side.split(x_hat, problem.ranks)
        return cls(moved, c, report, x_hat)

    @property
    def kept(self) -> Kept | None:
        """What `Descended` keeps of it: nothing of a side that was left as it is."""
        return None if self.report is None else (self.c, self.x_hat, self.report)

    def formed(self, dtype: torch.dtype) -> Tensor | None:
        """Xhat, where it is there in that dtype, with no factor on an adapter's."""
        if self.x_hat is None or self.x_hat.dtype != dtype or {*self.problem.scales} != {1.0}:
            return None
        return self.x_hat

    def times(self, gains: Sequence[float]) -> Moved:
        """Every adapter's Xhat_i times its own factor."""
        if self.c is None:
            scales = tuple(g * scale for g, scale in zip(gains, self.problem.scales))
            return replace(self, problem=self.problem.scaled(scales))
        rows = [g for g, r in zip(gains, self.problem.ranks) for _ in range(r)]
        return replace(self, c=torch.tensor(rows, device=self.c.device)[:, None] * self.c)


@dataclass(frozen=True, eq=False)
class Descended(Found):
    """The sides after their descents, and what is kept of them: C or Xhat with what the descents
    report. An Xhat is kept where there is room; a side without descends again when it is wanted."""

    sides: tuple[Moved, Moved] | None = field(kw_only=True)
    a: Kept | None = field(kw_only=True)
    b: Kept | None = field(kw_only=True)

    def kept(self) -> Descended:
        return replace(self, sides=None)

    def least(self) -> Descended:
        a, b = (x if x is None or x[1] is None else None for x in (self.a, self.b))
        return replace(self, a=a, b=b)


def sized(
    stacks: Sequence[Stack], a: Sequence[Moved], b: Sequence[Moved]
) -> tuple[list[Moved], list[Moved]]:
    """The sides, with the sizes of adapters that are far apart in B alone."""
    a, b = list(a), list(b)
    for k, s in enumerate(stacks):
        if s.far:
            sizes = [e if math.isfinite(e) else 0.0 for e in exponents(a[k].problem)]
            a[k] = a[k].times([2.0**-e for e in sizes])
            b[k] = b[k].times([2.0**e for e in sizes])
    return a, b
