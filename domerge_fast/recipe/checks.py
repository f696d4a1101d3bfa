"""Checks of single values of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .. import options
from ..errors import OptionError

__all__ = ["check_cut", "check_scale", "check_share", "check_weights", "numbers"]


def check_scale(given: float | str) -> float:
    scale: float = options.check("scale", given, float)
    if scale == 0:
        raise OptionError("scale", "0 leaves nothing of the merge", "give another factor")
    return scale


def check_weights(
    weights: Sequence[float] | None, count: int, each: str = "weights"
) -> list[float]:
    """One for each of `count` adapters; None is 1 for each. each: the option that one is of."""
    if weights is None:
        return [1.0] * count
    found = numbers(weights, each)
    if len(found) != count:
        problem = f"{len(found)} weights for {count} adapters"
        raise OptionError("weights", problem, "give one number for each adapter, in order")
    return found


def numbers(given: Any, each: str = "weights") -> list[float]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        problem = f"{str(given)[:40]!r} is no list of numbers"
        raise OptionError("weights", problem, "give one number for each adapter, in order")
    return [options.check(each, w, float) for w in given]


def check_share(name: str, given: float | None) -> float | None:
    """Between 0 and 1, both left out; OptionError."""
    if given is not None and not 0 < options.check(name, given, float) < 1:
        raise OptionError(name, f"{given!r} is no share", "give one between 0 and 1")
    return given


def check_cut(given: dict[str, Any]) -> tuple[int | None, float | None]:
    """Takes rank and energy out of what was given."""
    rank, energy = given.pop("rank", None), given.pop("energy", None)
    if rank is not None:
        rank = options.check("rank", rank, int, low=1)
    if energy is not None:
        energy = options.check("energy", energy, float)
        if not 0 < energy <= 1:
            raise OptionError("energy", f"{energy!r} is not a share", "give one in (0, 1]")
    return rank, energy
