"""The least of a function of one positive number in few evaluations: brackets, then parabolas."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["least"]

CLOSE = 0.02
"""Numbers whose logarithms are closer than this share of a step are one."""


def least(
    value: Callable[[float], float],
    start: float,
    ratio: float,
    most: int,
    known: dict[float, float] | None = None,
) -> float:
    """The x with the least value among those that were tried, `most` new ones.

    From `start`, times and over `ratio`, until the best lies between two worse ones; then where a
    parabola through these three, in log x, is least. known: values that are there, which come to
    have all that were tried.
    """
    found = {} if known is None else known
    tried = 0

    def at(x: float) -> float:
        nonlocal tried
        if x not in found:
            tried += 1
            found[x] = value(x)
        return found[x]

    at(start)
    while tried < most:
        x = _next(found, ratio)
        if x is None:
            break
        at(x)
    return min(found, key=found.__getitem__)


def _next(found: dict[float, float], ratio: float) -> float | None:
    """Where to look next, or None where nothing new is to be expected."""
    order = sorted(found)
    best = min(order, key=found.__getitem__)
    k = order.index(best)
    if k == len(order) - 1:
        return best * ratio
    if k == 0:
        return best / ratio
    low, high = order[k - 1], order[k + 1]
    x = math.exp(
        _vertex([math.log(v) for v in (low, best, high)], [found[low], found[best], found[high]])
    )
    gap = CLOSE * math.log(ratio)
    if min(abs(math.log(x / v)) for v in (low, best, high)) >= gap:
        return x
    wider = low if math.log(best / low) > math.log(high / best) else high
    middle = math.sqrt(wider * best)
    return middle if abs(math.log(middle / best)) >= gap else None


def _vertex(x: list[float], y: list[float]) -> float:
    """Where the parabola through three points is least: the middle one is the lowest."""
    left, right = x[1] - x[0], x[2] - x[1]
    down, up = (y[1] - y[0]) / left, (y[2] - y[1]) / right
    bend = up - down
    if not bend > 0:
        return x[1]
    slope = (down * right + up * left) / (left + right)
    return min(x[2], max(x[0], x[1] - slope * (left + right) / (2 * bend)))
