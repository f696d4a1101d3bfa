"""What a merge must be shown to keep, and how sure the data makes that.

A measured share or mean stands for more than the examples it was taken of: what counts is the end
of its 95 % interval. Of a share that is Wilson's, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
with z = 1.96; of a mean, its standard error times Student's t.

Below the full number of examples nothing is shown to hold yet: there only what is shown *not* to
hold counts against a candidate, by the other end of the interval.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ... import options
from ...errors import OptionError, is_text

__all__ = ["AtLeast", "AtMost", "Limit", "Mean", "Measure", "Rate", "Verdict", "limits_of"]

Z = 1.959963984540054
"""Of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Rate:
    """How many of how many examples passed."""

    passed: int
    total: int

    def __post_init__(self) -> None:
        options.check("total", self.total, int, low=1)
        options.check("passed", self.passed, int, low=0, high=self.total)

    @property
    def value(self) -> float:
        return self.passed / self.total

    @property
    def bounds(self) -> tuple[float, float]:
        """Wilson's interval of 95 %."""
        n, p, zz = self.total, self.value, Z * Z
        half = Z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
        middle = p + zz / (2 * n)
        low, high = ((middle + sign * half) / (1 + zz / n) for sign in (-1, 1))
        # Exact at both ends, where the difference of two equal numbers is left otherwise.
        return (0.0 if self.passed == 0 else low), (1.0 if self.passed == n else high)


@dataclass(frozen=True)
class Mean:
    """The mean of `total` examples and its standard error."""

    value: float
    error: float
    total: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Mean:
        """Of one number an example."""
        if not samples:
            raise OptionError("samples", "there are none to take the mean of", "give some")
        spread = statistics.stdev(samples) if len(samples) > 1 else math.inf
        return cls(statistics.fmean(samples), spread / math.sqrt(len(samples)), len(samples))

    @property
    def bounds(self) -> tuple[float, float]:
        """The mean less and more its standard error times Student's t for 95 %."""
        half = self.error * _student(self.total - 1) if self.error else 0.0
        return self.value - half, self.value + half


def _student(degrees: int) -> float:
    """The quantile of Student's t for a two-sided 95 %, by its expansion in 1 / degrees; above
    the exact one by less than 1 % from 5 degrees on, and without an end below."""
    if degrees < 5:
        return math.inf
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / degrees + second / degrees**2 + 1.5 * third / degrees**3


Measure = Rate | Mean | float
"""What an evaluator says of a constraint: a float is taken for exact."""


@dataclass(frozen=True)
class Limit:
    """A constraint without a threshold: the evaluator's own number, which must be 0 or less."""

    def gap(self, measure: Measure, full: bool) -> float:
        """How much is missing; 0 or less where it holds (`full`), or may hold (otherwise)."""
        if not isinstance(measure, float):
            problem = f"is given as a {type(measure).__name__}, without a threshold"
            raise OptionError("constraints", problem, "give thresholds: {name: 0.95}")
        return measure

    def __str__(self) -> str:
        return "at most 0"


@dataclass(frozen=True)
class AtLeast(Limit):
    """The lower end of the measure's interval is to reach the threshold."""

    threshold: float

    def gap(self, measure: Measure, full: bool) -> float:
        low, high = _interval(measure)
        return self.threshold - (low if full else high)

    def __str__(self) -> str:
        return f"at least {self.threshold:g}"


@dataclass(frozen=True)
class AtMost(Limit):
    """The upper end of the measure's interval is to stay within the threshold."""

    threshold: float

    def gap(self, measure: Measure, full: bool) -> float:
        low, high = _interval(measure)
        return (high if full else low) - self.threshold

    def __str__(self) -> str:
        return f"at most {self.threshold:g}"


def _interval(measure: Measure) -> tuple[float, float]:
    if isinstance(measure, float):
        problem = "is given as one number, which says nothing of how sure it is"
        remedy = "let the evaluator give evaluators.Rate(passed, total) or Mean.of(samples)"
        raise OptionError("constraints", problem, remedy)
    return measure.bounds


@dataclass(frozen=True)
class Verdict:
    """What was found of one constraint. low, high: the interval of `value`; gap: how much is
    missing, 0 or less where it holds. total: of how many examples; None where nobody said. needed:
    the examples that could show the limit if all of them passed, where these are more."""

    name: str
    limit: str
    value: float
    low: float
    high: float
    total: int | None
    gap: float
    needed: int | None = None

    @property
    def holds(self) -> bool:
        return self.gap <= 0

    @classmethod
    def of(cls, name: str, limit: Limit, measure: Measure, full: bool) -> Verdict:
        gap = limit.gap(measure, full)
        if isinstance(measure, float):
            return cls(name, str(limit), measure, measure, measure, None, gap)
        low, high = measure.bounds
        needed = None
        if isinstance(measure, Rate) and isinstance(limit, AtLeast) and 0 < limit.threshold < 1:
            needed = math.ceil(Z * Z * limit.threshold / (1 - limit.threshold))
            needed = needed if needed > measure.total else None
        return cls(name, str(limit), measure.value, low, high, measure.total, gap, needed)

    def __str__(self) -> str:
        state = "holds" if self.holds else f"fails by {self.gap:.4g}"
        of = f" of {self.total} examples" if self.total else ""
        span = f" (95 %: {self.low:.4g} to {self.high:.4g})" if self.total else ""
        return f"{self.name} {self.value:.4g}{of}{span}, asked {self.limit}: {state}"

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"holds": self.holds}


def limits_of(given: Iterable[str] | Mapping[str, Any] | None) -> dict[str, Limit]:
    """By name: of names alone, or of thresholds, where a number is one at least. OptionError."""
    if given is None:
        return {}
    if isinstance(given, str):
        problem = f"{given!r} is a text, not names or thresholds"
        raise OptionError("constraints", problem, "give {name: threshold}")
    pairs = given.items() if isinstance(given, Mapping) else ((name, Limit()) for name in given)
    found: dict[str, Limit] = {}
    for name, value in pairs:
        if not is_text(name) or not name:
            raise OptionError("constraints", f"{name!r} is no name", "give one")
        if isinstance(value, (AtLeast, AtMost)):
            options.check(f"constraints[{name}]", value.threshold, float)
        elif not isinstance(value, Limit):
            value = AtLeast(options.check(f"constraints[{name}]", value, float))
        found[name] = value
    return found
