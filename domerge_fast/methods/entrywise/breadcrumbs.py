"""Model Breadcrumbs: neither the largest entries of an update nor its small ones.

    ΔW = λ sum_i w_i v_i,  v_i = τ_i for the int(density N) entries below the int(gamma N) largest

As in mergekit, fewer large ones are left out where the density leaves no room. Entries equal to
those at either end are kept. Source: arXiv 2312.06795.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.entry_rules import Election
from ...options import option
from . import elementwise

__all__ = ["METHOD"]


@dataclass(frozen=True)
class BreadcrumbsOptions:
    density: float = elementwise.density(0.5)
    outliers: float = option(
        0.01, "share of the largest entries that is dropped", low=0.0, high=1.0
    )
    scope: str = elementwise.scope()


def rule(options: BreadcrumbsOptions) -> elementwise.Rule:
    def band(count: int) -> tuple[int, int]:
        kept = int(options.density * count)
        first = max(0, count - kept - int(options.outliers * count))
        return first, first + kept - 1

    positions = None if options.density == 1 else band
    return elementwise.Rule(Election(), positions, whole=options.scope == "model")


METHOD = elementwise.method(
    "breadcrumbs",
    "the sum of the updates without their largest and their small entries",
    BreadcrumbsOptions,
    rule,
    source="arXiv 2312.06795",
)
