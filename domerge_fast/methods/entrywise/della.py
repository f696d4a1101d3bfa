"""DELLA: drop entries at random, small ones of a row more often, then elect signs.

    p = density + epsilon (2 q - 1),  q = rank of |τ| in its row, from 0 (smallest) to 1 (largest)
    v_i = τ_i / p with probability p, else 0;  then as in `ties`

Density 0 keeps nothing, 1 everything. "mergekit" rescales every update to the L1 norm that it had
instead of dividing by p, elects by sum_i w_i v_i and divides by the sum of the w_i that agree.
Source: arXiv 2406.11617.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.entry_rules import Election
from ...errors import OptionError
from ...options import option
from . import elementwise
from .dare import rescale

__all__ = ["METHOD"]


@dataclass(frozen=True)
class DellaOptions:
    density: float = elementwise.density(0.5)
    epsilon: float = option(0.15, "how much probabilities differ from the density", low=0.0)
    majority_sign_method: str = elementwise.majority_sign_method()
    conventions: str = elementwise.conventions(("paper", "mergekit"), "paper")
    seed: int = elementwise.seed()


def rule(options: DellaOptions) -> elementwise.Rule:
    density, epsilon = options.density, options.epsilon
    spread = epsilon if 0 < density < 1 else 0.0
    if spread and not (density - spread > 0 and density + spread < 1):
        problem = f"{epsilon} takes probabilities {density} ± {epsilon} out of (0, 1)"
        raise OptionError("epsilon", problem, "give a smaller one")
    weighted = options.conventions == "mergekit"
    return elementwise.Rule(
        Election(options.majority_sign_method, weighted, "weight" if weighted else "count"),
        keep=density,
        spread=spread,
        rescale=rescale(options.conventions),
        seed=options.seed,
    )


METHOD = elementwise.method(
    "della",
    "small entries dropped more often, the rest averaged where they agree on a sign",
    DellaOptions,
    rule,
    source="arXiv 2406.11617",
)
