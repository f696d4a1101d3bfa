"""What can be drawn, as data: svg.py draws it for a page, plots.py as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Bars", "Drawing", "Lines", "Matrix", "Ranges", "Series", "styled"]


@dataclass(frozen=True)
class Matrix:
    """A symmetric table of numbers between -1 and 1, one row and column a label. Squares have the
    number as their area, and are filled where it is positive, hollow where it is negative."""

    labels: Sequence[str]
    values: Sequence[Sequence[float]]

    @property
    def largest(self) -> float:
        """The magnitude that fills a cell: the largest beside the diagonal."""
        pairs = ((i, j) for i in range(len(self.values)) for j in range(i))
        return max((abs(self.values[i][j]) for i, j in pairs), default=0.0)


@dataclass(frozen=True)
class Ranges:
    """By label the least, the middle and the largest of some numbers, in the unit of `axis`. zero:
    whether 0 is on the axis."""

    labels: Sequence[str]
    rows: Sequence[tuple[float, float, float]]
    axis: str
    log: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Series:
    """Points that a line joins. strong: whether it is the one to look at first."""

    label: str
    points: Sequence[tuple[float, float]]
    strong: bool = False


Style = TypeVar("Style")


def styled(series: Sequence[Series], styles: Sequence[Style]) -> Iterator[tuple[Series, Style]]:
    """The lines with what they are told apart by: a strong one has the first style."""
    thin = itertools.cycle(styles[1:] if any(x.strong for x in series) else styles)
    for one in series:
        yield one, styles[0] if one.strong else next(thin)


@dataclass(frozen=True)
class Lines:
    """Lines over one pair of axes. low, high: the ends of the y axis, where they are not those of
    the points."""

    title: str
    series: Sequence[Series]
    x_axis: str
    y_axis: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """By label one bar for each of some series of counts."""

    labels: Sequence[str]
    series: Sequence[tuple[str, Sequence[float]]]
    axis: str


Drawing = Matrix | Ranges | Lines | Bars
