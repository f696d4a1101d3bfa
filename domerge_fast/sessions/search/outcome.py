"""What an evaluator said of a candidate, in one shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import OptionError, some
from .limits import Limit, Mean, Measure, Rate, Verdict

__all__ = ["Outcome"]

_KEYS = ("score", "tasks", "constraints")


@dataclass(frozen=True)
class Outcome:
    """score: more is better; that of several tasks is their mean where nothing else was said.
    measures: by constraint."""

    score: float
    tasks: Mapping[str, float]
    measures: Mapping[str, Measure]

    @classmethod
    def of(cls, answer: Any, limits: Mapping[str, Limit], objectives: Sequence[str]) -> Outcome:
        """From a number, or {"score", "tasks", "constraints"}. OptionError for another answer."""
        if not isinstance(answer, Mapping):
            answer = {"score": answer}
        if unknown := sorted(str(k) for k in answer.keys() - set(_KEYS)):
            raise _wrong(f"has {some(unknown)}", f"use {', '.join(_KEYS)}")
        tasks = {str(k): _number(f"task {k!r}", v) for k, v in answer.get("tasks", {}).items()}
        if "score" in answer:
            score = _number("the score", answer["score"])
        elif tasks:
            score = math.fsum(tasks.values()) / len(tasks)
        else:
            raise _wrong("has no score", "give one, or tasks")
        given = answer.get("constraints", {})
        for kind, names, there in (("constraint", limits, given), ("task", objectives, tasks)):
            for name in names:
                if name not in there:
                    raise _wrong(f"has no {kind} {name!r}", f"give it under {kind}s")
        measures = {name: _measure(name, given[name]) for name in limits}
        return cls(score, tasks, measures)

    @property
    def is_finite(self) -> bool:
        """Whether there is anything to compare by."""
        numbers = [self.score, *self.tasks.values()]
        numbers += [m if isinstance(m, float) else m.bounds[0] for m in self.measures.values()]
        return not any(map(math.isnan, numbers)) and math.isfinite(self.score)

    def verdicts(self, limits: Mapping[str, Limit], full: bool) -> tuple[Verdict, ...]:
        """full: whether it is of all examples, so that what holds is shown to."""
        return tuple(Verdict.of(n, limit, self.measures[n], full) for n, limit in limits.items())

    def violation(self, limits: Mapping[str, Limit], full: bool) -> float:
        """How much is missing in all constraints together; 0 where all hold."""
        return math.fsum(max(0.0, v.gap) for v in self.verdicts(limits, full))

    def plain(self) -> dict[str, Any]:
        """For a study's journal."""
        return {
            "score": self.score,
            "tasks": dict(self.tasks),
            "measures": {n: _plain(m) for n, m in self.measures.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Outcome:
        measures = {n: _from_plain(m) for n, m in plain["measures"].items()}
        return cls(plain["score"], plain["tasks"], measures)


def _number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise _wrong(f"has {str(value)[:40]!r} as {what}", "give a number") from error


def _measure(name: str, value: Any) -> Measure:
    if isinstance(value, (Rate, Mean)):
        return value
    return _number(f"constraint {name!r}", value)


def _wrong(problem: str, remedy: str) -> OptionError:
    return OptionError("evaluator", f"its answer {problem}", remedy)


def _plain(measure: Measure) -> Any:
    if isinstance(measure, Rate):
        return {"passed": measure.passed, "total": measure.total}
    if isinstance(measure, Mean):
        return {"value": measure.value, "error": measure.error, "total": measure.total}
    return measure


def _from_plain(plain: Any) -> Measure:
    if not isinstance(plain, dict):
        return float(plain)
    return Rate(**plain) if "passed" in plain else Mean(**plain)
