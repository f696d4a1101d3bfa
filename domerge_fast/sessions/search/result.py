"""What a search found, and the gate that it went through."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import options
from ...errors import Infeasible, OptionError
from ...merged import Merged
from ..prepared import Prepared
from ._optuna import optuna
from .limits import Verdict
from .mixing import combined
from .outcome import Outcome
from .pictures import pictures
from .rules import FAILED, Rules, outcome_of
from .space import Candidate, Layout
from .store import LOST

__all__ = ["SearchResult", "Trial", "gated"]

State = optuna.trial.TrialState


@dataclass(frozen=True)
class Trial:
    """One candidate. values: by choice. examples: on how many it was evaluated; None where the
    evaluator decides. complete: whether that is all of them. verdicts: of the constraints, which
    hold only where it is complete. failed: why it has no score."""

    number: int
    values: Mapping[str, float | str]
    examples: int | None
    complete: bool
    score: float
    tasks: Mapping[str, float]
    verdicts: tuple[Verdict, ...]
    failed: str | None = None

    @property
    def feasible(self) -> bool:
        """Whether every constraint was shown to hold, on all examples."""
        return self.complete and not self.failed and all(v.holds for v in self.verdicts)

    @property
    def missing(self) -> float:
        """How much is missing in all constraints together."""
        return math.fsum(max(0.0, v.gap) for v in self.verdicts)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """best: the trial with the highest score of those that are shown to be within all constraints.
    trials: all, in order. interrupted: whether it was ended by Ctrl-C. study: Optuna's.
    data: the sum of the evaluator's data, where it states one (`digest`)."""

    best: Trial
    trials: tuple[Trial, ...]
    prepared: Mapping[str, Prepared]
    layout: Layout
    rules: Rules
    study: optuna.Study
    data: str | None
    interrupted: bool = False

    @property
    def candidate(self) -> Candidate:
        """The best one's methods, coefficients and scales, by module."""
        return self.layout.candidate(self.best.values)

    @cached_property
    def merge(self) -> tuple[Prepared, Tensor]:
        """The best one as a prepared merge, with every module as it has it, and coefficients
        [modules, T] for `Prepared.merge`."""
        return combined(self.prepared, self.candidate)

    @property
    def coefficients(self) -> Tensor:
        """The best one's, [modules, T]."""
        return self.merge[1]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What was found of the best one's constraints, on all examples."""
        return self.best.verdicts

    @cached_property
    def pareto(self) -> tuple[Trial, ...]:
        """Of the trials within all constraints, those that no other one exceeds in an objective
        without falling behind in another."""
        names = self.rules.objectives
        if not names:
            return (self.best,)
        points: dict[tuple[float, ...], Trial] = {}
        for trial in self.trials:
            if trial.feasible:
                points.setdefault(tuple(trial.tasks[n] for n in names), trial)
        return tuple(
            t
            for x, t in points.items()
            if not any(y != x and all(b >= a for a, b in zip(x, y)) for y in points)
        )

    def save(
        self, output: str | os.PathLike[str], trial: Trial | None = None, **asked: Any
    ) -> Merged:
        """Write the best merge, or that of another trial within the constraints, as
        `Prepared.save` does; the card says what the constraints were found to be, on which
        data. OptionError for a trial that is not within them."""
        chosen = self.best if trial is None else trial
        if not chosen.feasible:
            problem = f"{chosen.number} is not shown to be within the constraints"
            raise OptionError("trial", problem, "take one of `pareto`, or the best")
        prepared, kappa = combined(self.prepared, self.layout.candidate(chosen.values))
        remarks = (*prepared.remarks, *self.notes(chosen))
        return dataclasses.replace(prepared, remarks=remarks).save(kappa, output, **asked)

    def pictures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Draw the study into a folder (pictures.py); needs the extra `plot`."""
        return pictures(self.study, self.rules, options.folder("folder", folder))

    def notes(self, trial: Trial | None = None) -> tuple[str, ...]:
        """What a card says of a trial."""
        chosen = self.best if trial is None else trial
        done = sum(t.complete for t in self.trials)
        on = "" if chosen.examples is None else f" on {chosen.examples} examples"
        data = f", data sha256 {self.data}" if self.data else ", no sum of its data stated"
        found = f"found by search: trial {chosen.number} of {len(self.trials)}, {done} of them"
        notes = [f"{found} on all examples; score {chosen.score:.6g}{on}{data}"]
        notes += (f"constraint {verdict}" for verdict in chosen.verdicts)
        if chosen.verdicts:
            notes.append(
                "constraints are shown on these data alone, for the best of several candidates "
                "on the same data: measure once more on others"
            )
        return tuple(notes)


def gated(
    study: optuna.Study,
    prepared: Mapping[str, Prepared],
    layout: Layout,
    rules: Rules,
    data: str | None,
    interrupted: bool,
) -> SearchResult:
    """The best trial that is within all constraints; Infeasible where there is none."""
    found = study.get_trials(deepcopy=False)
    trials = tuple(t for x in found if (t := _trial(x, rules)))
    feasible = [t for t in trials if t.feasible]
    if not feasible:
        raise Infeasible(*_how_far(trials), trials)
    best = min(feasible, key=lambda t: (-t.score, t.number))
    return SearchResult(best, trials, prepared, layout, rules, study, data, interrupted)


def _trial(trial: optuna.trial.FrozenTrial, rules: Rules) -> Trial | None:
    """None of one that is not done, or was put back in the queue."""
    if LOST in trial.user_attrs or not trial.state.is_finished():
        return None
    rung, outcome = _last(trial, rules)
    failed = trial.user_attrs.get(FAILED)
    if outcome is None:
        return None
    complete = rules.is_full(rung)
    measured = outcome.is_finite
    return Trial(
        trial.number,
        trial.params,
        rules.rungs[rung],
        complete,
        outcome.score,
        outcome.tasks,
        outcome.verdicts(rules.limits, complete) if measured else (),
        failed if failed or measured else "the evaluator's answer is not finite",
    )


def _last(trial: optuna.trial.FrozenTrial, rules: Rules) -> tuple[int, Outcome | None]:
    for rung in reversed(range(len(rules.rungs))):
        if outcome := outcome_of(trial, rung):
            return rung, outcome
    return 0, None


def _how_far(trials: Sequence[Trial]) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    complete = [t for t in trials if t.complete and not t.failed]
    if not complete:
        failed = next((t.failed for t in trials if t.failed), None)
        return (
            f"none of {len(trials)} candidates was evaluated on all examples"
            + (f" ({failed})" if failed else ""),
            "try more" if failed is None else "mend the evaluator, or narrow the space",
        )
    nearest = min(complete, key=lambda t: (t.missing, -t.score))
    broken = "; ".join(str(v) for v in nearest.verdicts if not v.holds)
    problem = f"none of {len(complete)} candidates is within the constraints; trial "
    problem += f"{nearest.number} comes nearest: {broken}"
    needed = max((v.needed or 0 for v in nearest.verdicts), default=0)
    if needed:
        return problem, f"give {needed} examples or more: fewer cannot show it"
    return problem, "widen the space, try more, or leave out what `leave_one_out` names"
