"""TIES: trim small entries, elect a sign for every entry, average what agrees with it.

    v_i = τ_i where |τ_i| is among the largest int(density N), else 0
    s = sign(sum_i v_i)  ("frequency": of their signs; 0 counts as +)
    ΔW = λ sum_{v_i s > 0} w_i v_i / #{v_i s > 0}

Where definitions differ: "paper" seeks the largest entries in the whole model, "peft" and
"mergekit" in each tensor (`scope` overrules both). "mergekit" elects by sum_i w_i v_i and divides
by the sum of the w_i that agree; the others elect unweighted and divide by their number. Entries
equal to the smallest one kept are kept too. (The authors' code keeps int(density N) + 1 entries
and lets a sum of 0 elect the sign that most entries have.) Source: arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.entry_rules import Election
from . import elementwise

__all__ = ["METHOD"]


@dataclass(frozen=True)
class TiesOptions:
    density: float = elementwise.density(0.2)
    majority_sign_method: str = elementwise.majority_sign_method()
    conventions: str = elementwise.conventions()
    scope: str = elementwise.scope()


def rule(options: TiesOptions) -> elementwise.Rule:
    weighted = options.conventions == "mergekit"
    election = Election(options.majority_sign_method, weighted, "weight" if weighted else "count")
    scope = options.scope
    if scope == "auto":
        scope = "model" if options.conventions == "paper" else "tensor"
    return elementwise.Rule(
        election,
        elementwise.largest(options.density, least=int(weighted and options.density > 0)),
        whole=scope == "model",
    )


METHOD = elementwise.method(
    "ties",
    "large entries only, averaged where they agree on a sign",
    TiesOptions,
    rule,
    source="arXiv 2306.01708",
)
