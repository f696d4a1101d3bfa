"""The weighted sum of the updates' largest entries (PEFT's "magnitude_prune").

    ΔW = λ sum_i w_i v_i,  v_i = τ_i where |τ_i| is among the largest int(density N), else 0

Entries equal to the smallest one kept are kept too. Source: PEFT, add_weighted_adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.entry_rules import Election
from . import elementwise

__all__ = ["METHOD"]


@dataclass(frozen=True)
class MagnitudePruneOptions:
    density: float = elementwise.density(0.2)
    scope: str = elementwise.scope()


def rule(options: MagnitudePruneOptions) -> elementwise.Rule:
    positions = elementwise.largest(options.density)
    return elementwise.Rule(Election(), positions, whole=options.scope == "model")


METHOD = elementwise.method(
    "magnitude_prune",
    "the sum of the updates' largest entries",
    MagnitudePruneOptions,
    rule,
    source="PEFT",
)
