"""Options as typed dataclasses: one source of names, defaults, help texts and checks.

A method declares its options with `option(...)` fields; the API takes them as keyword arguments
and the CLI makes flags of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import aliases
from .errors import OptionError, is_text

__all__ = ["build", "check", "choose", "folder", "meant", "option", "size", "suggest", "text"]

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


def suggest(
    word: str,
    known: Iterable[str],
    meanings: aliases.Meanings | None = None,
    besides: Iterable[str] = (),
) -> str:
    """What to do about an unknown word: what was meant, if that is near, and the words there are.

    meanings: what words of elsewhere are here. besides: names that they may lead to, too.
    """
    known = list(known)
    hint = meant(str(word), known, meanings or {}, besides)
    if known:
        words = f"use one of: {', '.join(known)}"
        return f"{hint}{' ' if hint.endswith('?') else '; '}{words}" if hint else words
    return hint or "leave it out"


def meant(
    word: str, known: Sequence[str], meanings: aliases.Meanings, besides: Iterable[str] = ()
) -> str:
    """What was probably meant by an unknown word, or "": what it is here, else by its spelling."""
    names = {*known, *besides}
    usable = {
        w: m for w, m in meanings.items() if w not in names and (m[0] is None or m[0] in names)
    }
    plain = aliases.plain(word)
    if plain in usable:
        return _meaning(*usable[plain])
    words = [*known, *usable]
    near = difflib.get_close_matches(word, words, 1) or difflib.get_close_matches(plain, words, 1)
    if not near:
        return ""
    hint = f"did you mean {near[0]!r}?"
    return hint if near[0] in known else f"{hint} {_meaning(*usable[near[0]])}"


def _meaning(name: str | None, remark: str) -> str:
    return remark if name is None else " ".join(f"it is {name!r} here {remark}".split())


def choose(name: str, value: Any, known: Iterable[str]) -> str:
    """`value`, if it is one of the known words; otherwise an OptionError that suggests one."""
    known = list(known)
    if value not in known:
        remedy = suggest(value, known, aliases.TABLES.get(name))
        raise OptionError(name, f"{value!r} is not known", remedy)
    return value


def text(name: str, value: Any) -> str | None:
    """`value`, if it is None or a text that a file can hold; otherwise an OptionError."""
    if value is not None and not is_text(value):
        raise OptionError(name, f"{value!r} is no text", "give one, in Unicode")
    return value


def folder(name: str, value: Any) -> Path:
    """`value` as an absolute path; an OptionError unless it is one."""
    if not isinstance(value, (str, os.PathLike)):
        raise OptionError(name, f"{str(value)[:40]!r} is no folder", "give a path")
    try:
        return Path(value).absolute()
    except OSError as error:  # of a relative one, where the current folder is gone
        problem = f"the current folder cannot be used ({error.strerror})"
        raise OptionError(name, problem, "change to another") from error


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
    types = _types(cls)  # type: ignore[arg-type]
    for name in given:
        if name not in fields:
            known = [*fields, *others]
            remedy = suggest(name, known, aliases.OPTIONS, aliases.ALWAYS)
            raise OptionError(name, f"{owner} has no such option", remedy)
    values = {
        name: check(name, value, types[name], **fields[name].metadata)
        for name, value in given.items()
    }
    return cls(**values)


@functools.cache
def _types(cls: type) -> Mapping[str, Any]:
    """Of an options dataclass; to evaluate them takes as long as an op on many modules."""
    return typing.get_type_hints(cls)


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
