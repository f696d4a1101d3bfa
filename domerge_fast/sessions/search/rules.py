"""By what candidates are compared, and what a trial keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._optuna import optuna
from .limits import Limit
from .outcome import Outcome
from .space import Choice

__all__ = ["FAILED", "Rules", "distribution", "outcome_of"]

FAILED = "failed"
"""A trial's attribute: why it has no value."""

State = optuna.trial.TrialState


@dataclass(frozen=True)
class Rules:
    """limits: by constraint. objectives: tasks that are objectives; () for the score. rungs: the
    numbers of examples. penalized: whether the sampler knows no constraints."""

    limits: Mapping[str, Limit]
    objectives: tuple[str, ...]
    rungs: tuple[int | None, ...]
    penalized: bool

    def is_full(self, rung: int) -> bool:
        return rung == len(self.rungs) - 1

    def record(self, trial: optuna.Trial, rung: int, outcome: Outcome) -> None:
        """Keep what was found at a number of examples with the trial."""
        trial.set_user_attr(_key(rung), outcome.plain())
        if not self.objectives and outcome.is_finite:
            trial.report(outcome.score, self.rungs[rung] or rung)

    def key(self, outcome: Outcome, rung: int) -> tuple[float, float]:
        """Less is better: first what is missing in the constraints, then the score."""
        return outcome.violation(self.limits, self.is_full(rung)), -outcome.score

    def goes_on(
        self, trials: Iterable[optuna.trial.FrozenTrial], number: int, rung: int, eta: int
    ) -> bool:
        """Whether a trial is among the best of every `eta` that have come as far as it has. The
        first of them is."""
        found = {t.number: o for t in trials if (o := outcome_of(t, rung)) and o.is_finite}
        if number not in found:
            return False
        order = sorted(found, key=lambda n: (*self.key(found[n], rung), n))
        return order.index(number) < max(1, len(order) // eta)

    def finish(self, study: optuna.Study, trial: optuna.Trial, rung: int, outcome: Outcome) -> None:
        """Tell the study how a trial ended: at all examples, or before."""
        if not outcome.is_finite:
            trial.set_user_attr(FAILED, f"the evaluator's answer is not finite: {outcome}"[:300])
            study.tell(trial, state=State.FAIL)
            return
        for verdict in outcome.verdicts(self.limits, self.is_full(rung)):
            if not self.penalized:
                trial.set_constraint(verdict.name, verdict.gap)
        if self.is_full(rung):
            study.tell(trial, self.values(outcome))
        else:
            study.tell(trial, state=State.PRUNED)

    def finished(
        self,
        values: Mapping[str, Any],
        choices: Sequence[Choice],
        rung: int,
        outcome: Outcome,
    ) -> optuna.trial.FrozenTrial:
        """A trial that was made without a sampler."""
        full = self.is_full(rung) and outcome.is_finite
        state = State.COMPLETE if full else State.PRUNED if outcome.is_finite else State.FAIL
        return optuna.trial.create_trial(
            state=state,
            values=self.values(outcome) if full else None,
            params=dict(values),
            distributions={c.name: distribution(c) for c in choices},
            user_attrs={_key(rung): outcome.plain()},
            intermediate_values=(
                {self.rungs[rung] or rung: outcome.score} if outcome.is_finite else {}
            ),
        )

    def values(self, outcome: Outcome) -> list[float]:
        """What the sampler gets. One that knows no constraints gets numbers in the right order:
        within (-1, 1) where all hold, below otherwise; CMA-ES goes by the order alone."""
        if self.objectives:
            return [outcome.tasks[name] for name in self.objectives]
        if not self.penalized or not self.limits:
            return [outcome.score]
        missing = outcome.violation(self.limits, True)
        return [-1 - missing if missing > 0 else outcome.score / (1 + abs(outcome.score))]

    def asked(self) -> dict[str, Any]:
        """What makes two searches' trials comparable, for the study."""
        return {
            "constraints": {name: str(limit) for name, limit in self.limits.items()},
            "objectives": list(self.objectives),
            "fidelity": list(self.rungs),
        }


def outcome_of(trial: optuna.trial.FrozenTrial, rung: int) -> Outcome | None:
    """What was found of a trial at a number of examples."""
    plain = trial.user_attrs.get(_key(rung))
    return None if plain is None else Outcome.from_plain(plain)


def distribution(choice: Choice) -> optuna.distributions.BaseDistribution:
    if choice.names:
        return optuna.distributions.CategoricalDistribution(choice.names)
    return optuna.distributions.FloatDistribution(choice.low, choice.high)


def _key(rung: int) -> str:
    return f"outcome {rung}"
