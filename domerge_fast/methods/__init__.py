"""The merge methods by name. A new method is one new file and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .. import options
from ..errors import OptionError
from ..registry import Registry
from . import auto, do, doge, lego, opcm, robust
from .base import Chosen, Method
from .entrywise import breadcrumbs, dare, dare_ties, della, magnitude_prune, ties
from .nested import core_space, ctm, knots
from .spectral import dc_merge, iso_c, iso_cts, pico, subspace_boost, svd, tsvm, wudi
from .weighted import cat, linear, multislerp, slerp

__all__ = ["TABLE", "choose"]

TABLE = Registry(
    "method",
    Method,
    (
        m.METHOD
        for m in (
            *(auto, do, linear, cat, svd, tsvm, iso_c, iso_cts, subspace_boost, wudi, pico),
            *(slerp, multislerp, robust, lego, core_space, knots, ctm, opcm, dc_merge, doge),
            *(ties, dare, dare_ties, della, breadcrumbs, magnitude_prune),
        )
    ),
)


def choose(name: str, given: Mapping[str, Any], option: str = "method") -> Chosen:
    """A method with its options, and the one that works inside it, from keyword arguments.

    Raises OptionError for an unknown method, option or value.
    """
    row = TABLE.choose(option, name)
    if row.taken:
        _check_none_of_others(name, given)
    inner = None
    known: list[str] = []
    theirs: dict[str, Any] = {}
    if row.inner:
        own = {f.name: f.default for f in dataclasses.fields(row.options)}
        chosen = given.get(row.inner, own[row.inner])
        within = TABLE.choose(row.inner, chosen, lambda m: m.taken is None)
        known = [n for n in _names(within, given) if n not in own]
        theirs = {k: v for k, v in given.items() if k in known}
        inner = choose(chosen, theirs, row.inner)
    mine = {k: v for k, v in given.items() if k not in theirs}
    return Chosen(row, options.build(row.options, mine, f"method {name!r}", known), inner)


def _check_none_of_others(name: str, given: Mapping[str, Any]) -> None:
    """OptionError for an option of a method that stands for others."""
    for option in given:
        for other, row in TABLE.items():
            if option in {f.name for f in dataclasses.fields(row.options)}:
                problem = f"{name!r} takes a method as it is"
                raise OptionError(option, problem, f"name a method that has it, as {other!r}")


def _names(row: Method, given: Mapping[str, Any]) -> list[str]:
    """The names of a method's options and of those of the one inside it."""
    own = {f.name: f.default for f in dataclasses.fields(row.options)}
    if row.inner is None:
        return [*own]
    inner = TABLE.choose(row.inner, given.get(row.inner, own[row.inner]))
    return [*own, *_names(inner, {})]
