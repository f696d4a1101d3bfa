"""Limits of time that hold on a machine that does other work too."""

from __future__ import annotations

from collections.abc import Callable


def least(measure: Callable[[], float], limit: float, tries: int = 5) -> float:
    """The least of up to `tries` measurements: other work only makes them longer.

    Stops at the first that is within `limit`.
    """
    found = measure()
    while found > limit and (tries := tries - 1):
        found = min(found, measure())
    return found
