"""Tables of module names: of a model's first code, and of diffusers, for the same weights.

A table is a file of rows (written by tools/name_tables.py; `flux.txt` says how to read one). Names
are looked up, dotted or with all dots made underscores, never taken apart: where such a name has no
row, nothing is known of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

__all__ = ["Found", "Part", "Row", "Table", "table"]

_FOLDER = Path(__file__).parent
_NUMBERS = re.compile(r"(?<![^._])\d+(?![^._])")

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A module of diffusers. ratio: its outputs by its inputs, where the table says so. swapped:
    whether its first half is the second of the rows in the original."""

    name: str
    ratio: Fraction | None = None
    swapped: bool = False


@dataclass(frozen=True)
class Row:
    """original: what the first code calls a module; parts: diffusers' modules that have its rows,
    in order. '#' stands for a number."""

    original: str
    parts: tuple[Part, ...]

    @property
    def ratio(self) -> Fraction | None:
        """Outputs of the original by its inputs, where known."""
        return sum((p.ratio for p in self.parts if p.ratio), Fraction(0)) or None


@dataclass(frozen=True)
class Found:
    """A name's row, and its numbers. part: which part of the row has that name, None for all of
    it, the original."""

    row: Row
    numbers: Numbers
    part: int | None = None

    def fits(self, m: int, n: int) -> bool:
        """Whether a module of m outputs and n inputs can be this one."""
        ratio = self.row.ratio if self.part is None else self.row.parts[self.part].ratio
        return ratio is None or m == ratio * n

    @property
    def original(self) -> str:
        return _filled(self.row.original, self.numbers)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(_filled(part.name, self.numbers) for part in self.row.parts)


class Table:
    """The rows of one file, found by either name. joint: what stands between the components of a
    name that is looked up: "." or "_"."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows
        self._originals: dict[str, list[tuple[Row, int | None]]] = {}
        self._parts: dict[str, list[tuple[Row, int | None]]] = {}
        for row in rows:
            self._originals.setdefault(_shape(row.original), []).append((row, None))
            for k, part in enumerate(row.parts):
                self._parts.setdefault(_shape(part.name), []).append((row, k))

    def of_original(self, name: str, joint: str) -> list[Found]:
        """What the first code may mean by a name; several rows where its size decides."""
        return list(_matches(self._originals, name, joint))

    def of_part(self, name: str, joint: str) -> list[Found]:
        """The same of a name in diffusers."""
        return list(_matches(self._parts, name, joint))


def _matches(
    index: dict[str, list[tuple[Row, int | None]]], name: str, joint: str
) -> Iterator[Found]:
    given = [int(text) for text in _NUMBERS.findall(name)]
    for row, k in index.get(_shape(name), ()):
        template = row.original if k is None else row.parts[k].name
        numbers = _numbers(template, given)
        if _filled(template, numbers).replace(".", joint) == name:
            yield Found(row, numbers, k)


def _shape(name: str) -> str:
    """A name or template with no numbers of its own, and underscores for dots."""
    return _NUMBERS.sub("#", name).replace(".", "_")


def _numbers(template: str, given: list[int]) -> Numbers:
    """Those of a name's numbers that the template leaves open."""
    places = re.findall(r"(?<![^._])(?:\d+|#)(?![^._])", template)
    return tuple(number for place, number in zip(places, given) if place == "#")


def _filled(template: str, numbers: Numbers) -> str:
    pieces = template.split("#")
    return "".join(f"{piece}{number}" for piece, number in zip(pieces, numbers)) + pieces[-1]


@functools.cache
def table(name: str) -> Table:
    """The table of this name."""
    lines = (_FOLDER / f"{name}.txt").read_text("utf-8").splitlines()
    return Table(tuple(_row(line) for line in lines if not line.startswith("#")))


def _row(line: str) -> Row:
    left, _, right = line.partition(" = ")
    return Row(left, tuple(map(_part, (right or left).split())))


def _part(text: str) -> Part:
    name, _, ratio = text.partition("*")
    ratio, swapped = ratio.removesuffix("~"), ratio.endswith("~")
    return Part(name, Fraction(ratio) if ratio else None, swapped)
