"""What a method says of one side of a module."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

__all__ = ["SideReport"]


@dataclass(frozen=True)
class SideReport:
    """The descent on one side (A or B) of a module.

    cross_left is the share of the cross-adapter Gram energy sum_{i != j} ||X_i X_j^T||_F^2 that
    is left; change is ||Xhat - X||_F / ||X||_F.
    """

    steps: int
    objective_before: float
    objective_after: float
    cross_left: float
    change: float

    def times(self, power: int) -> SideReport:
        """Of factors that are 2^power times as large."""
        before, after = (
            math.ldexp(f, 2 * power) for f in (self.objective_before, self.objective_after)
        )
        return dataclasses.replace(self, objective_before=before, objective_after=after)
