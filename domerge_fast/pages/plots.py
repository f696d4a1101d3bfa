"""The figures of a page as pictures, by matplotlib."""

from __future__ import annotations

import functools
import importlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DomergeError, OutputError, printable
from ..results.report import Interference, Report
from ..storage import side_file
from .drawings import Bars, Drawing, Lines, Matrix, Ranges, styled
from .figure import Figure
from .page import page_of

__all__ = ["check_plots", "write_plots"]

STYLES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (8, 3)))
"""By which lines are told apart, one after the other, as on a page."""

INK, SOFT, ACCENT = "#1d2430", "#586271", "#0b5c8a"
COLUMNS = 3
"""Drawings side by side."""


def write_plots(found: Report | Interference, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every figure that `write_html` draws as a PNG into a folder, which is made if need be.

    An older picture is replaced, another file is not. Returns the paths. OutputError where they
    cannot be written; DomergeError without matplotlib (the extra `report`).
    """
    check_plots(folder)
    place, paths = Path(folder), []
    with side_file.told(os.fspath(folder)):
        place.mkdir(exist_ok=True)
    for figure in page_of(found).figures:
        if figure.drawings:
            path = place / f"{figure.key}.png"
            side_file.check_replaced(str(path))
            side_file.replace(str(path), _png(figure))
            paths.append(path)
    return paths


def check_plots(folder: str | os.PathLike[str]) -> None:
    """Raises as `write_plots` where pictures cannot be written there."""
    place = Path(folder)
    if not place.absolute().parent.is_dir():
        raise OutputError(str(place), "the folder that it is in does not exist", "make it first")
    if os.path.lexists(place) and not place.is_dir():
        raise OutputError(str(place), "is no folder", "say the name of a folder")
    for path in place.glob("*.png"):
        side_file.check_replaced(str(path))
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        problem = f"pictures need matplotlib ({error}); pip install 'domerge-fast[report]'"
        raise DomergeError(problem) from error


def _png(figure: Figure) -> bytes:
    from matplotlib.figure import Figure as Canvas

    count = len(figure.drawings)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    most = max(len(x.rows) if isinstance(x, Ranges) else 0 for x in figure.drawings)
    size = (max(6.0, 4.2 * columns), max(3.2, 0.22 * most + 1) * rows + 0.8)
    canvas = Canvas(figsize=size, layout="constrained")
    for place, drawing in zip(canvas.subplots(rows, columns, squeeze=False).flat, figure.drawings):
        draw(drawing, place)
    for place in canvas.axes[count:]:
        place.set_axis_off()
    canvas.suptitle(f"{_text(figure.title)}\n{_text(figure.unit)}", fontsize="medium", color=INK)
    content = io.BytesIO()
    canvas.savefig(content, dpi=120, format="png", metadata={"Software": side_file.MARK.decode()})
    return content.getvalue()


def _text(text: str) -> str:
    """matplotlib takes what stands between dollars for mathematics."""
    return printable(text).replace("$", r"\$")


@functools.singledispatch
def draw(drawing: Drawing, axes: Any) -> None:
    """Onto axes of matplotlib."""
    raise TypeError(f"{type(drawing).__name__} is no drawing")


@draw.register
def _(drawing: Matrix, axes: Any) -> None:
    from matplotlib.patches import Rectangle

    count, largest = len(drawing.labels), drawing.largest or 1.0
    for i, row in enumerate(drawing.values):
        for j, value in enumerate(row):
            if i != j:
                side = 0.9 * (min(1.0, abs(value) / largest)) ** 0.5
                corner = (j - side / 2, i - side / 2)
                face = ACCENT if value >= 0 else "none"
                axes.add_patch(Rectangle(corner, side, side, facecolor=face, edgecolor=INK))
    every = max(1, -(-count // 16))
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(range(0, count, every), [_text(x) for x in drawing.labels[::every]])
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    axes.set_xlabel(f"largest square: {drawing.largest:.3g}; hollow: negative", fontsize="small")


@draw.register
def _(drawing: Ranges, axes: Any) -> None:
    places = range(len(drawing.rows))
    low, middle, high = zip(*drawing.rows)
    axes.hlines(places, low, high, color=SOFT)
    axes.plot(middle, places, "o", color=ACCENT)
    axes.set_yticks(places, [_text(_shortened(x)) for x in drawing.labels])
    axes.invert_yaxis()
    axes.set_xlabel(_text(drawing.axis))
    if drawing.log:
        axes.set_xscale("log")
    if drawing.zero:
        axes.axvline(0.0, color=SOFT, linewidth=0.5)


def _shortened(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


@draw.register
def _(drawing: Lines, axes: Any) -> None:
    for series, style in styled([x for x in drawing.series if x.points], STYLES):
        x, y = zip(*series.points)
        look: dict[str, Any] = {"linestyle": style, "color": SOFT}
        if series.strong:
            look |= {"color": ACCENT, "linewidth": 2}
        axes.plot(
            x, y, marker="." if len(x) == 1 else None, label=_text(_shortened(series.label)), **look
        )
    axes.set_title(_text(_shortened(drawing.title, 40)), fontsize="small")
    axes.set(xlabel=_text(drawing.x_axis), ylabel=_text(_shortened(drawing.y_axis, 40)))
    axes.set_ylim(drawing.low, drawing.high and 1.02 * drawing.high)
    if drawing.log:
        axes.set_yscale("log")
    if len(drawing.series) > 1:
        axes.legend(fontsize="x-small")


@draw.register
def _(drawing: Bars, axes: Any) -> None:
    width = 0.8 / len(drawing.series)
    places: Sequence[float] = range(len(drawing.labels))
    for k, (name, values) in enumerate(drawing.series):
        look = {"color": ACCENT} if k % 2 == 0 else {"fill": False, "hatch": "///"}
        axes.bar([x + k * width for x in places], values, width, label=name, edgecolor=INK, **look)
    axes.set_xticks([x + 0.4 - width / 2 for x in places], drawing.labels)
    axes.set_xlabel(_text(drawing.axis))
    if len(drawing.series) > 1:
        axes.legend(fontsize="small")
