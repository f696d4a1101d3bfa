"""Drawings as inline SVG: no colour is needed to read one (lines are dashed, bars hatched, squares
filled or hollow), and what colours there are come from the page's style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch
from unicodedata import east_asian_width

from markupsafe import Markup, escape

from ..errors import printable
from .drawings import Bars, Drawing, Lines, Matrix, Ranges, Series, styled
from .scales import Axis, axis_of, number

__all__ = ["DASHES", "WIDTH", "draw", "element", "shortened"]

WIDTH = 340
"""Of every drawing, in units of its own: it is as wide as its place on the page."""

DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 2", "12 4")
"""By which lines are told apart, one after the other."""

SIZE, LONGEST = 11, 400
"""Of letters, in the same units; and characters of a name that are looked at."""

MOST_NUMBERS = 6
"""Rows of a matrix up to which its numbers are written into it."""


def element(tag: str, *inside: object, **attributes: object) -> Markup:
    """`class_` and the like lose their last underscore; other underscores become hyphens."""
    named = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    text = "".join(f' {key}="{escape(_plain(value))}"' for key, value in named)
    return Markup(f"<{tag}{text}>{''.join(map(escape, inside))}</{tag}>")


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def shortened(text: str, room: float) -> str:
    """As people can see it, in so much room; what is too long loses its middle."""
    text = printable(text)[:LONGEST]
    head, tail = text, ""
    while head and _width(f"{head}…{tail}" if tail else head) > room:
        half = (len(head) + len(tail)) // 2
        head, tail = text[:half], text[len(text) - half + 1 :] if half > 1 else ""
    return f"{head}…{tail}" if tail else head


def _width(text: str) -> float:
    """Of a text on a drawing, at most."""
    wide = sum(c in "mwMW@%…" or c.isupper() or east_asian_width(c) in "WF" for c in text)
    return SIZE * (0.65 * len(text) + 0.4 * wide)


@singledispatch
def draw(drawing: Drawing, label: str) -> Markup:
    """The drawing as an <svg>. label: what a reader who does not see it is told."""
    raise TypeError(f"{type(drawing).__name__} is no drawing")


def _svg(height: float, label: str, *inside: object) -> Markup:
    box = f"0 0 {WIDTH} {height:.0f}"
    return element("svg", *inside, viewBox=box, role="img", aria_label=label)


def _text(
    x: float, y: float, text: str, anchor: str = "start", class_: str | None = None
) -> Markup:
    return element("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def _title(text: str) -> Markup:
    return element("title", printable(text))


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", class_=class_, **ends)


def _rect(x: float, y: float, width: float, height: float, class_: str, title: str = "") -> Markup:
    inside = [_title(title)] if title else []
    place = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return element("rect", *inside, class_=class_, **place)


@draw.register
def _(drawing: Matrix, label: str) -> Markup:
    count, left, top = len(drawing.labels), 26.0, 20.0
    cell = (WIDTH - left - 4) / max(count, 3)
    largest = drawing.largest
    few = count <= MOST_NUMBERS
    every = max(1, -(-count // 16))
    marks = []
    for k, name in enumerate(drawing.labels):
        middle = (k + 0.5) * cell
        if k % every == 0:
            marks.append(_text(left - 5, top + middle + 4, name, "end"))
            marks.append(_text(left + middle, top - 6, name, "middle"))
    for i, row in enumerate(drawing.values):
        for j, value in enumerate(row):
            x, y = left + (j + 0.5) * cell, top + (i + 0.5) * cell
            if i == j:
                marks.append(_rect(x - cell / 2, y - cell / 2, cell, cell, "own"))
            elif few and j > i:
                marks.append(_text(x, y + 4, number(round(value, 3)), "middle"))
            elif largest:
                side = 0.84 * cell * (abs(value) / largest) ** 0.5
                kind = "full" if value >= 0 else "hollow"
                title = f"{drawing.labels[i]}, {drawing.labels[j]}: {number(value)}" if few else ""
                marks.append(_rect(x - side / 2, y - side / 2, side, side, kind, title))
    frame = _rect(left, top, count * cell, count * cell, "frame")
    bottom = top + count * cell
    told = f"largest square: {number(largest)}"
    return _svg(bottom + 20, label, frame, *marks, _text(left, bottom + 15, told, class_="soft"))


@draw.register
def _(drawing: Ranges, label: str) -> Markup:
    left, row = 112.0, 20.0
    bottom = 6 + row * len(drawing.rows)
    values = [x for one in drawing.rows for x in one] + [0.0] * drawing.zero
    axis = axis_of(values, left, WIDTH - 14.0, drawing.log)
    marks = list(_ticks_below(axis, 4, bottom))
    for k, (name, (low, middle, high)) in enumerate(zip(drawing.labels, drawing.rows)):
        y = 6 + row * (k + 0.5)
        marks.append(_text(left - 8, y + 4, shortened(name, left - 8), "end"))
        marks.append(_line(axis(low), y, axis(high), y, "span"))
        marks += [_line(axis(x), y - 4, axis(x), y + 4, "span") for x in (low, high)]
        told = f"{name}: {number(low)}, {number(middle)}, {number(high)}"
        marks.append(element("circle", _title(told), cx=axis(middle), cy=y, r=4.0, class_="full"))
    return _svg(bottom + 34, label, *marks, _text(left, bottom + 30, drawing.axis, class_="soft"))


def _ticks_below(axis: Axis, top: float, bottom: float) -> Iterator[Markup]:
    for tick in axis.ticks:
        x = axis(tick)
        yield _line(x, top, x, bottom, "grid")
        yield _text(x, bottom + 14, number(tick), "middle")


@draw.register
def _(drawing: Lines, label: str) -> Markup:
    left, top, bottom = 46.0, 24.0, 150.0
    points = [point for series in drawing.series for point in series.points]
    across = axis_of([x for x, _ in points], left, WIDTH - 12.0)
    up = axis_of([y for _, y in points], bottom, top, drawing.log, drawing.low, drawing.high)
    marks = [_text(0, 12, shortened(drawing.title, WIDTH / 1.25), class_="title")]
    for tick in up.ticks:
        marks.append(_line(left, up(tick), WIDTH - 12, up(tick), "grid"))
        marks.append(_text(left - 6, up(tick) + 4, number(tick), "end"))
    for tick in across.ticks:
        if tick == round(tick):
            marks.append(_text(across(tick), bottom + 14, number(tick), "middle"))
    for series, dash in styled(drawing.series, DASHES):
        places = [(across(x), up(y)) for x, y in series.points if y > 0 or not drawing.log]
        marks += _joined(series, places, dash)
    legend, height = _legend(drawing.series, left, bottom + 46)
    marks.append(
        _text(left, bottom + 29, f"{drawing.x_axis} → · {drawing.y_axis} ↑", class_="soft")
    )
    return _svg(height, label, *marks, *legend)


def _joined(series: Series, places: Sequence[tuple[float, float]], dash: str) -> list[Markup]:
    """A line, or a dot where there is one point."""
    kind = "line strong" if series.strong else "line"
    if len(places) == 1:
        x, y = places[0]
        return [element("circle", cx=x, cy=y, r=3.0, class_="full")]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return [element("polyline", points=path, class_=kind, stroke_dasharray=dash or None)]


def _legend(series: Sequence[Series], left: float, top: float) -> tuple[list[Markup], float]:
    """Line samples with their names, two in a row, and where they end."""
    if len(series) < 2:
        return [], top
    marks: list[Markup] = []
    for k, (one, dash) in enumerate(styled(series, DASHES)):
        x, y = left + (k % 2) * 150, top + (k // 2) * 16
        marks += _joined(one, [(x, y - 4), (x + 26, y - 4)], dash)
        marks.append(_text(x + 32, y, shortened(one.label, 112)))
    return marks, top + (len(series) - 1) // 2 * 16 + 8


@draw.register
def _(drawing: Bars, label: str) -> Markup:
    left, top, bottom = 46.0, 10.0, 140.0
    counts = [x for _, values in drawing.series for x in values]
    up = axis_of(counts, bottom, top, low=0.0)
    width = (WIDTH - left - 12) / max(1, len(drawing.labels))
    every = max(1, -(-len(drawing.labels) * 26 // int(WIDTH - left)))
    marks = []
    for tick in up.ticks:
        marks.append(_line(left, up(tick), WIDTH - 12, up(tick), "grid"))
        marks.append(_text(left - 6, up(tick) + 4, number(tick), "end"))
    own = 0.8 * width / max(1, len(drawing.series))
    for k, name in enumerate(drawing.labels):
        if k % every == 0:
            marks.append(_text(left + (k + 0.5) * width, bottom + 14, name, "middle"))
        for p, (series, values) in enumerate(drawing.series):
            x, y = left + (k + 0.1) * width + p * own, up(values[k])
            kind, told = ("full", "hatched")[p % 2], f"{series}, {name}: {number(values[k])}"
            marks.append(_rect(x, y, own, bottom - y, kind, told))
    marks.append(_text(left, bottom + 30, drawing.axis, class_="soft"))
    for p, (series, _) in enumerate(drawing.series if len(drawing.series) > 1 else ()):
        x = left + p * 130
        marks.append(_rect(x, bottom + 40, 14, 10, ("full", "hatched")[p % 2]))
        marks.append(_text(x + 20, bottom + 49, series))
    return _svg(bottom + 56, label, *marks)
