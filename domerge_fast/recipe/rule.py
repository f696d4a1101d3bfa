"""What is asked of some modules, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import options
from ..errors import OptionError
from ..methods import choose
from ..methods.base import Chosen
from .checks import check_cut, numbers

__all__ = ["Rule", "all_options", "listed", "of_patterns"]


@dataclass(frozen=True)
class Rule:
    """What is asked of modules whose names match a pattern ("*" any characters, "?" one, "[ab]" one
    of these); None: what is asked of all."""

    modules: str
    leave_out: bool = False
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    energy: float | None = None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asks(self) -> dict[str, Any]:
        """What it sets, by name; a method goes with its options."""
        method = (self.method, dict(self.options)) if self.method else None
        found = {
            "leave_out": self.leave_out or None,
            "weights": self.weights,
            "rank": self.rank,
            "energy": self.energy,
            "method": method,
        }
        return {name: value for name, value in found.items() if value is not None}

    def plain(self) -> dict[str, Any]:
        asks = self.asks | ({"method": self.method, **self.options} if self.method else {})
        return {"modules": self.modules} | {k: listed(v) for k, v in asks.items()}

    @classmethod
    def of(cls, plain: Any) -> Rule:
        """From a mapping with `modules` and what is asked. OptionError."""
        if not isinstance(plain, Mapping) or not isinstance(plain.get("modules"), str):
            problem = f"{str(plain)[:60]!r} names no modules"
            raise OptionError("rules", problem, "give 'modules', a pattern of their names")
        given = dict(plain)
        modules = given.pop("modules")
        leave_out = options.check("leave_out", given.pop("leave_out", False), bool)
        weights, (rank, energy) = given.pop("weights", None), check_cut(given)
        if weights is not None:
            weights = tuple(numbers(weights))
            if not any(weights):
                problem = f"all weights of {modules!r} are zero"
                raise OptionError("rules", problem, "say leave_out")
        method = given.pop("method", None)
        if method is None and given:
            problem = f"{next(iter(given))!r} of {modules!r} is no part of a rule"
            known = "leave_out, weights, rank, energy, or a method with its options"
            raise OptionError("rules", problem, f"give {known}")
        if method is not None:
            given = all_options(choose(method, given))
        made = cls(modules, leave_out, weights, rank, energy, method, given)
        if not made.asks:
            raise OptionError("rules", f"nothing is asked of {modules!r}", "say what")
        return made


def all_options(chosen: Chosen) -> dict[str, Any]:
    """A method's options, those of the one inside it among them."""
    found: dict[str, Any] = {}
    one: Chosen | None = chosen
    while one:
        found = vars(one.options) | found
        one = one.inner
    return found


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def of_patterns(given: Any) -> tuple[Rule, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        problem = "is no mapping of patterns to weights"
        raise OptionError("weights_for", problem, 'give one: {"double_blocks.*": [0.5, 1]}')
    return tuple(Rule.of({"modules": name, "weights": w}) for name, w in given.items())
