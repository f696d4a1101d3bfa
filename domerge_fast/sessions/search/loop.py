"""The trials of a search, one process's part of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import OptionError
from ._optuna import optuna
from .budget import Budget
from .models import Models
from .outcome import Outcome
from .rules import Rules, outcome_of
from .samplers import sampler
from .space import Candidate, Layout
from .store import Store

__all__ = ["Evaluator", "Loop"]

Evaluator = Callable[..., Any]


@dataclass(frozen=True)
class Loop:
    """What a search runs with. show: called with the trials that are done, and all of them."""

    store: Store
    models: Models
    evaluator: Evaluator
    layout: Layout
    budget: Budget
    rules: Rules
    strategy: str
    population: int
    seed: int
    show: Callable[[int, int], None]

    def run(self) -> None:
        """Until as many trials as asked for are begun, here or elsewhere, or time is up."""
        started = time.monotonic()
        choices = self.layout.choices
        while not self.late(started):
            asked = self.store.ask(
                self.budget.trials,
                self.population,
                lambda number: sampler(
                    self.strategy, self.seed, number, len(choices), self.budget.trials
                ),
                choices,
            )
            if not asked:
                return
            try:
                self._try([t for t, _ in asked], [self.layout.candidate(v) for _, v in asked])
            except BaseException:
                self.store.give_up([t for t, _ in asked])
                raise
            self.show(min(self.store.begun, self.budget.trials), self.budget.trials)

    def late(self, started: float) -> bool:
        """Whether no more trials are to be begun."""
        return self.budget.seconds is not None and time.monotonic() - started > self.budget.seconds

    def evaluate(
        self, candidates: Sequence[Candidate], examples: int | range | None
    ) -> list[Outcome]:
        """Each one's outcome; several in one forward pass of the live model."""
        if self.population == 1:
            return [self._one(candidate, examples) for candidate in candidates]
        model = self.models.put_all(candidates)
        answers = self.evaluator(model, examples, candidates=len(candidates))
        if not isinstance(answers, Sequence) or len(answers) != len(candidates):
            problem = f"gave no list of {len(candidates)} answers for as many candidates"
            raise OptionError("evaluator", problem, "return one answer a candidate")
        return [self._outcome(answer) for answer in answers]

    def _one(self, candidate: Candidate, examples: int | range | None) -> Outcome:
        return self._outcome(self.evaluator(self.models.put(candidate), examples))

    def _outcome(self, answer: Any) -> Outcome:
        return Outcome.of(answer, self.rules.limits, self.rules.objectives)

    def _try(self, trials: Sequence[optuna.Trial], candidates: Sequence[Candidate]) -> None:
        """Evaluate candidates at more and more examples, each as long as it is among the best."""
        active = list(zip(trials, candidates))
        for rung, examples in enumerate(self.rules.rungs):
            known = {t.number: outcome_of(t, rung) for t in self.store.trials}
            new = [(t, c) for t, c in active if known[t.number] is None]
            found = self.evaluate([c for _, c in new], examples) if new else []
            for (trial, _), outcome in zip(new, found):
                known[trial.number] = outcome
            done = [(t, c, o) for t, c in active if (o := known[t.number])]
            for trial, _, outcome in done:
                self.rules.record(trial, rung, outcome)
            going = []
            there = self.store.trials
            for trial, candidate, outcome in done:
                last = self.rules.is_full(rung)
                if not last and self.rules.goes_on(there, trial.number, rung, self.budget.eta):
                    going.append((trial, candidate))
                else:
                    self.rules.finish(self.store.study, trial, rung, outcome)
            active = going
            if not active:
                return
