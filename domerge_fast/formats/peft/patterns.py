r"""PEFT's patterns of module names, matched in linear time.

PEFT's rule: of several keys that one holds for which ``re.match(rf"(.*\.)?({key})$", name)`` is the
first to find something. Keys come from files, and Python's `re` can take for ever over one: it is
never given any. Most keys are names, or several of them (their dots stand for any character); these
are looked up. The others become one automaton, see there. Names must have no line breaks, which
mean something else to `re`; no adapter's have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .automaton import Automaton, BadPattern, parse

__all__ = ["BadPattern", "Patterns"]

_ANY = "\0"
_MOST_WORK = 20_000_000
"""Indices looked into: ten seconds or so."""
_PLAIN = re.compile(r"(?:[^\\^$*+?{}\[\]()\0\n]|\\[^A-Za-z0-9|\0\n])*")


class Patterns:
    """Raises BadPattern for a key that is no regular expression, or none that is understood."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._whole, self._tails = _Names(), _Names()
        others = []
        for i, key in enumerate(keys):
            if (names := _names(key)) is None:
                others.append((i, key, parse(key)))
                continue
            where = self._whole if key.startswith("^") else self._tails
            for name in names:
                where.add(name, i)
        self._automaton = Automaton(others) if others else None

    def first(self, name: str) -> int | None:
        """The position of the first key that matches a module's name."""
        found = [self._whole.find(name), self._tails.find(name)]
        at = name.find(".")
        while at >= 0:
            found.append(self._tails.find(name[at + 1 :]))
            at = name.find(".", at + 1)
        if self._automaton:
            found.append(self._automaton.first(name))
        return min((i for i in found if i is not None), default=None)


class _Names:
    """The names that keys stand for, found by what they say outside of their "any" places.

    Kept by their length, those places and their dots, of which a model has few: one index each.
    """

    def __init__(self) -> None:
        self._found: dict[int, dict[tuple[int, int], dict[str, int]]] = {}
        self._work = 0

    def add(self, name: str, index: int) -> None:
        """The earliest index of a name counts."""
        kind = _places(name, _ANY), _places(name, ".")
        self._found.setdefault(len(name), {}).setdefault(kind, {}).setdefault(name, index)

    def find(self, name: str) -> int | None:
        if not (kinds := self._found.get(len(name))):
            return None
        dots, found = _places(name, "."), []
        for (free, fixed), names in kinds.items():
            self._work += 1
            if fixed & ~dots or dots & ~(free | fixed):
                continue
            masked = name.replace(".", _ANY) if free == dots else _masked(name, free)
            found.append(names.get(masked))
        if self._work > _MOST_WORK:
            raise BadPattern(next(iter(names)).replace(_ANY, "."), "is one of too many to match")
        return min((i for i in found if i is not None), default=None)


def _places(name: str, c: str) -> int:
    """The positions of a character, as bits."""
    bits, at = 0, name.find(c)
    while at >= 0:
        bits |= 1 << at
        at = name.find(c, at + 1)
    return bits


def _masked(name: str, places: int) -> str:
    return "".join(_ANY if places >> k & 1 else c for k, c in enumerate(name))


def _names(key: str) -> list[str] | None:
    """The names in a key with _ANY for dots; None for a key that is more than names."""
    body = key.removeprefix("^")
    if body.startswith("(?:") and body.endswith(")"):
        body = body[3:-1]
    elif body != key and "|" in body:
        return None  # "^" belongs to the first name alone
    if not _PLAIN.fullmatch(body):
        return None
    return [_unescaped(name) for name in body.split("|")]


def _unescaped(name: str) -> str:
    if "\\" not in name:
        return name.replace(".", _ANY)
    return "".join(_ANY if x == "." else x[-1] for x in re.findall(r"\\.|.", name))
