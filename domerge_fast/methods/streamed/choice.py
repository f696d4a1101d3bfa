"""Whether DO-Merging reads adapters in batches, pass after pass, instead of all at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...adapters.plan import Kind
from ...errors import OptionError

__all__ = ["AUTO", "DESCENTS", "STREAMED", "WHOLE", "streams"]

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
    return any(_whole_bytes(kind) > MOST_BYTES for kind in kinds)


def _whole_bytes(kind: Kind) -> int:
    """The factors and results of a module, and on both sides five copies of X in float32 where
    there are more rows than columns, R x R matrices elsewhere."""
    rank = kind.rank
    descents = sum(20 * rank * d if rank > d else 48 * rank**2 for d in (kind.m, kind.n))
    return descents + 6 * rank * (kind.m + kind.n)
