"""Options as typed dataclasses: one source of names, defaults, help texts and checks.

A method declares its options with `option(...)` fields; the API takes them as keyword arguments
and the CLI makes flags of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import OptionError, is_text

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A dataclass field with its help text, its allowed words, or its least and largest value."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "low": low, "high": high}
    )


def suggest(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown word: "did you mean ..." and the words there are."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}use one of: {', '.join(known)}"


def choose(name: str, value: Any, known: Iterable[str]) -> str:
    """`value`, if it is one of the known words; otherwise an OptionError that suggests one."""
    known = list(known)
    if value not in known:
        raise OptionError(name, f"{value!r} is not known", suggest(value, known))
    return value


def text(name: str, value: Any) -> str | None:
    """`value`, if it is None or a text that a file can hold; otherwise an OptionError."""
    if value is not None and not is_text(value):
        raise OptionError(name, f"{value!r} is no text", "give one, in Unicode")
    return value


UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}


def size(name: str, value: int | str | None) -> int | None:
    """Bytes, from a number of them or from words like "4GiB" and "1.5 GB"."""
    if value is None:
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
    if parts is None or parts[2] not in UNITS:
        raise OptionError(name, f"{value!r} is no size", "give bytes, or words like '4GiB'")
    return int(float(parts[1]) * UNITS[parts[2]])


def build(cls: type[T], given: Mapping[str, Any], owner: str, others: Iterable[str] = ()) -> T:
    """An options dataclass from keyword arguments, every name and value checked.

    others: names that the user might have meant besides.

    Raises OptionError for a name that `owner` does not have, a wrong type or a wrong value.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types = typing.get_type_hints(cls)
    for name in given:
        if name not in fields:
            known = [*fields, *others]
            remedy = suggest(name, known) if known else "leave it out"
            raise OptionError(name, f"{owner} has no such option", remedy)
    values = {
        name: check(name, value, types[name], **fields[name].metadata)
        for name, value in given.items()
    }
    return cls(**values)


def check(
    name: str,
    value: Any,
    kind: type,
    help: str = "",
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """`value` as the type `kind`, or an OptionError."""
    if choices:
        return choose(name, value, choices)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is bool and not isinstance(value, bool):
        raise OptionError(name, f"{value!r} is not True or False", "use one of them")
    if kind in (int, float):
        finite = number and abs(value) <= sys.float_info.max
        if not finite or kind(value) != value:
            word = "a whole number" if kind is int else "a finite number"
            raise OptionError(name, f"{value!r} is not {word}", "give one")
        if value < low:
            raise OptionError(name, f"{value!r} is too small", f"use at least {low:g}")
        if value > high:
            raise OptionError(name, f"{value!r} is too large", f"use at most {high:g}")
        return kind(value)
    return value
