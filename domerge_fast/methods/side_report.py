"""What a method says of one side of modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SideReport", "SideReports"]


@dataclass(frozen=True)
class SideReport:
    """The descent on one side (A or B) of a module.

    cross_left is the share of the cross-adapter Gram energy sum_{i != j} ||X_i X_j^T||_F^2 that
    is left; change is ||Xhat - X||_F / ||X||_F. scaled is known of a side that descended on its
    factors (backends/descent_rates.py): the share of ||Xhat - X||_F^2 that is numbers
    times the X_i, shrinking rather than turning; the energy is then that of the X_i over
    ||X_i||_F^1/2, as in the objective.
    """

    steps: int
    objective_before: float
    objective_after: float
    cross_left: float
    change: float
    scaled: float | None = None


@dataclass(frozen=True, eq=False)
class SideReports:
    """Those of the modules of a stack. rows: their numbers, as `ops.orthogonalize` has them."""

    rows: Sequence[list[float]]

    def __getitem__(self, k: int) -> SideReport:
        steps, *numbers = self.rows[k]
        return SideReport(int(steps), *numbers)

    def of_module(self, k: int) -> SideReports:
        return SideReports(self.rows[k : k + 1])

    def times(self, power: int) -> SideReports:
        """Of factors that are 2^power times as large."""
        size = 2 * power
        return SideReports(
            [[n, math.ldexp(f, size), math.ldexp(g, size), *rest] for n, f, g, *rest in self.rows]
        )
