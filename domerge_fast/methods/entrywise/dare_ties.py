"""DARE's random dropping and rescaling, then the sign election of TIES.

    v_i as in `dare`, s = sign(sum_i v_i),  ΔW = λ sum_{v_i s > 0} w_i v_i / #{v_i s > 0}

"mergekit" elects by sum_i w_i v_i, rescales to the L1 norm and does not divide.
Sources: arXiv 2311.03099, 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.entry_rules import Election
from . import elementwise
from .dare import rescale

__all__ = ["METHOD"]


@dataclass(frozen=True)
class DareTiesOptions:
    density: float = elementwise.density(0.5)
    majority_sign_method: str = elementwise.majority_sign_method()
    conventions: str = elementwise.conventions()
    seed: int = elementwise.seed()


def rule(options: DareTiesOptions) -> elementwise.Rule:
    weighted = options.conventions == "mergekit"
    return elementwise.Rule(
        Election(options.majority_sign_method, weighted, "sum" if weighted else "count"),
        keep=options.density,
        rescale=rescale(options.conventions),
        seed=options.seed,
    )


METHOD = elementwise.method(
    "dare_ties",
    "entries dropped at random, the rest averaged where they agree on a sign",
    DareTiesOptions,
    rule,
    source="arXiv 2311.03099",
)
