"""Which adapter spoils a merge: the merge evaluated without each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ... import options
from ...errors import OptionError
from ..coefficients import Kappa
from ..prepared import Prepared
from .limits import limits_of
from .loop import Evaluator
from .models import Models
from .outcome import Outcome
from .space import Candidate

__all__ = ["LeftOut", "leave_one_out"]

Constraints = Iterable[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class LeftOut:
    """score, missing: of the merge of all, and `without` each adapter by name: (score, what is
    missing in the constraints together; 0 where all hold)."""

    score: float
    missing: float
    without: Mapping[str, tuple[float, float]]

    @property
    def worst(self) -> str | None:
        """The adapter without which least is missing in the constraints, or the score is highest
        where nothing is missing; None where the merge is no better without any."""
        best = min(self.without, key=lambda name: self._key(*self.without[name]))
        better = self._key(*self.without[best]) < self._key(self.score, self.missing)
        return best if better else None

    @staticmethod
    def _key(score: float, missing: float) -> tuple[float, float]:
        return missing, -score

    def __str__(self) -> str:
        lines = [f"all: score {self.score:.4g}, {self.missing:.4g} missing"]
        for name, (score, missing) in self.without.items():
            change = f"score {score - self.score:+.4g}, {missing - self.missing:+.4g} missing"
            lines.append(f"without {name}: {change}")
        return "\n".join(lines)


def leave_one_out(
    prepared: Prepared,
    evaluator: Evaluator,
    kappa: Kappa | None = None,
    *,
    level: str | None = None,
    live: Any = None,
    examples: int | None = None,
    constraints: Constraints = None,
) -> LeftOut:
    """Evaluate a merge, and the same with each adapter's coefficient 0.

    kappa, level: as of `Prepared.merge`; None is 1 for each. evaluator, live and constraints: as of
    `search`; examples: what the evaluator gets as its budget. What was prepared still counts an
    adapter whose coefficient is 0 (`Prepared`): a merge prepared without it may differ where its
    directions were orthogonalized against the others'. Raises as `search` does.
    """
    limits = limits_of(constraints)
    count = len(prepared.adapters)
    if count < 2:
        raise OptionError("prepared", "has one adapter", "there is none to leave out")
    if examples is not None:
        options.check("examples", examples, int, low=1)
    given = prepared.expand([1.0] * count if kappa is None else kappa, level).double()
    if given.shape != (len(prepared.modules), count):
        raise OptionError("kappa", f"is {list(given.shape)}", "give one coefficient an adapter")
    found = []
    with Models({"merged": prepared}, live) as models:
        for left_out in (None, *range(count)):
            weights = given.clone()
            if left_out is not None:
                weights[:, left_out] = 0.0
            ones = torch.ones(len(weights), dtype=torch.float64)
            of = ("merged",) * len(weights)
            candidate = Candidate(prepared.modules, prepared.adapters, of, weights, ones)
            answer = evaluator(models.put(candidate), examples)
            outcome = Outcome.of(answer, limits, ())
            found.append((outcome.score, outcome.violation(limits, True)))
    (score, missing), *others = found
    return LeftOut(score, missing, dict(zip(prepared.adapters, others)))
