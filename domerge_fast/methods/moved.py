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

__all__ = ["Descended", "Moved", "sized"]


@dataclass(frozen=True, eq=False)
class Moved:
    """Xhat = C X of one side: a problem and its C (None for the identity)."""

    problem: Side
    c: Tensor | None
    report: SideReports | None

    @property
    def kept(self) -> tuple[Tensor, SideReports] | None:
        """What `Descended` keeps of it."""
        return None if self.c is None or self.report is None else (self.c, self.report)

    def times(self, gains: Sequence[float]) -> Moved:
        """Every adapter's Xhat_i times its own factor."""
        if self.c is None:
            scales = tuple(g * scale for g, scale in zip(gains, self.problem.scales))
            return replace(self, problem=self.problem.scaled(scales))
        rows = [g for g, r in zip(gains, self.problem.ranks) for _ in range(r)]
        return replace(self, c=torch.tensor(rows, device=self.c.device)[:, None] * self.c)


@dataclass(frozen=True, eq=False)
class Descended(Found):
    """The sides after their descents; kept of them are C_A and C_B with what the descents report.
    A side that did not descend in R x R matrices has None, and descends again when it is wanted."""

    sides: tuple[Moved, Moved] | None = field(kw_only=True)
    a: tuple[Tensor, SideReports] | None = field(kw_only=True)
    b: tuple[Tensor, SideReports] | None = field(kw_only=True)

    def kept(self) -> Descended:
        return replace(self, sides=None)


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
