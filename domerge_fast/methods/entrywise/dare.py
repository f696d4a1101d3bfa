"""DARE: drop entries at random and rescale the rest, so that the sum stays as expected.

    ΔW = λ sum_i w_i v_i,  v_i = τ_i / density with probability density, else 0

"mergekit" rescales every update to the L1 norm that it had instead. Which entries are dropped
depends on the seed, the adapter's place in the list, the module's name, the row and the column.
Source: arXiv 2311.03099.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.entry_rules import Election
from . import elementwise

__all__ = ["METHOD", "rescale"]


@dataclass(frozen=True)
class DareOptions:
    density: float = elementwise.density(0.5)
    conventions: str = elementwise.conventions()
    seed: int = elementwise.seed()


def rescale(conventions: str) -> str:
    return "norm" if conventions == "mergekit" else "probability"


def rule(options: DareOptions) -> elementwise.Rule:
    return elementwise.Rule(
        Election(),
        keep=options.density,
        rescale=rescale(options.conventions),
        seed=options.seed,
    )


METHOD = elementwise.method(
    "dare",
    "entries dropped at random, the rest rescaled and summed",
    DareOptions,
    rule,
    source="arXiv 2311.03099",
)
