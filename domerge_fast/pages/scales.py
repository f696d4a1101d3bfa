"""Axes: from numbers to places, and the round numbers that are written beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "axis_of", "number"]


@dataclass(frozen=True)
class Axis:
    """From numbers between `low` and `high` to places between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log(max(x, self.low)) for x in (low, high, value))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers on the axis, few enough to read."""
        if self.log:
            first, last = (
                math.ceil(math.log10(self.low) - 1e-9),
                math.floor(math.log10(self.high) + 1e-9),
            )
            every = max(1, math.ceil((last - first) / 4))
            return [10.0**k for k in range(first, last + 1, every)] or [self.low, self.high]
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [(first + k) * step for k in range(count + 1)]


def axis_of(
    values: Sequence[float],
    start: float,
    end: float,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Axis:
    """An axis with all of the values on it. low, high: its ends, where they are settled."""
    used = [x for x in values if math.isfinite(x) and (x > 0 or not log)]
    least, most = min(used, default=1.0), max(used, default=1.0)
    if log:
        least, most = 10.0 ** math.floor(math.log10(least)), 10.0 ** math.ceil(math.log10(most))
        if least == most:
            most = 10 * least
    least, most = least if low is None else low, most if high is None else high
    if least == most:
        least, most = (least, least + 1.0) if least >= 0 else (least, 0.0)
    return Axis(least, most, start, end, log)


def number(value: float, aligned: bool = False) -> str:
    """With as many digits as a reader can use. aligned: always with three, for a column."""
    value += 0.0  # -0 is 0
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if aligned and value else f"{value:.3g}"


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below."""
    size = 10.0 ** math.floor(math.log10(least))
    return next(x * size for x in (1, 2, 2.5, 5, 10) if x * size >= least * (1 - 1e-9))
