"""Whether DO-Merging reads adapters in batches, pass after pass, instead of all at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...adapters.plan import Kind
from ...backends.descent_rates import on_factors
from ...errors import OptionError
from .descent import kept_bytes

__all__ = ["AUTO", "DESCENTS", "STREAMED", "WHOLE", "is_large", "streams"]

AUTO, WHOLE, STREAMED = "auto", "whole", "streamed"
DESCENTS = (AUTO, WHOLE, STREAMED)

MOST_BYTES = 2 << 30
"""What merging a module may take with the factors of all adapters at once, for `AUTO`. It is no
measure of the machine, so that a recipe does the same everywhere."""


def streams(options: Any, kinds: Iterable[Kind], hindrance: str | None) -> bool:
    """options: those of `do`. kinds: of all modules. hindrance: what is asked for that takes all
    adapters at once, in words. OptionError where `STREAMED` is asked for, and something is in its
    way."""
    if options.penalty != "squared":
        hindrance = f"penalty {options.penalty!r}"
    if not options.gamma:
        hindrance = "gamma 0"
    if options.descent == STREAMED:
        if hindrance:
            problem = f"{hindrance} takes all adapters at once"
            raise OptionError("descent", problem, "leave it out, or give descent='whole'")
        return True
    if options.descent == WHOLE or hindrance:
        return False
    return any(is_large(kind.rank, kind.m, kind.n) for kind in kinds)


def is_large(rank: int, m: int, n: int) -> bool:
    """Whether `AUTO` reads adapters of such a module in batches: by its factors and results, and on
    both sides five copies of X in float32 where it descends on the factors, R x R matrices
    elsewhere; and whether less is kept of it then."""
    descents = sum(20 * rank * d if on_factors(rank, d) else 48 * rank**2 for d in (m, n))
    return descents + 6 * rank * (m + n) > max(MOST_BYTES, kept_bytes(m, n))
