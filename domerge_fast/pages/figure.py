"""What a page is made of: sections of figures, each with its unit, a sentence on how to read it,
and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .drawings import Drawing

__all__ = ["MOST_ROWS", "Figure", "Page", "Row", "Section", "Table", "capped"]

MOST_ROWS = 200
"""Of a table on a page."""

Cell = str | int | float | None
Row = Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """head: names of the columns. rows: texts and numbers, None for nothing. left_out: what the
    page has to say of rows that are not shown."""

    head: Sequence[str]
    rows: Sequence[Row]
    left_out: str = ""


@dataclass(frozen=True)
class Figure:
    """key: what its picture is called. unit: of its numbers. reading: how to read it. notes: what
    is not in it. shown: whether its table is part of the page's text, not folded away."""

    key: str
    title: str
    unit: str
    reading: str
    drawings: Sequence[Drawing]
    table: Table
    notes: Sequence[str] = ()
    shown: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Page:
    """summary: labels and texts. adapters: what they are called; more_adapters: how many are not
    among them. notes: sentences. texts: titles and long texts, folded away."""

    title: str
    summary: Sequence[tuple[str, str]]
    adapters: Sequence[str]
    more_adapters: int
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    texts: Sequence[tuple[str, str]] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]


def capped(head: Sequence[str], rows: Sequence[Row], what: str, most: int = MOST_ROWS) -> Table:
    """The first rows. what: what the rows are, in words."""
    if len(rows) <= most:
        return Table(head, rows)
    said = f"The first {most} of {len(rows)} {what} are shown; --json has all."
    return Table(head, rows[:most], said)
