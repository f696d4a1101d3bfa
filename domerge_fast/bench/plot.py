"""The figures of a bench as a picture: a roofline, and bars beside their bounds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..errors import DomergeError
from .measure import Result, Row

__all__ = ["draw", "figure"]

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def figure() -> Any:
    """An empty matplotlib figure; DomergeError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DomergeError(
            "--plot needs matplotlib; pip install matplotlib, or leave --plot out"
        ) from error
    return Figure(figsize=(13, 5), layout="constrained")


def draw(result: Result, path: Path) -> None:
    """Write the picture as PNG."""
    canvas = figure()
    left, right = canvas.subplots(1, 2)
    labels = list(dict.fromkeys(_label(row) for row in result.rows))
    colours = dict(zip(labels, COLOURS))
    _roofline(left, result, colours)
    _bars(right, result, colours)
    canvas.suptitle(result.summary()[0], fontsize="medium")
    canvas.savefig(path, dpi=120, format="png")


def _roofline(axes: Any, result: Result, colours: dict[str, str]) -> None:
    rows = [row for row in result.rows if row.flops]
    intensities = [row.flops / row.bytes for row in rows] or [1.0]
    top = max(result.rates.gemm.values())
    span = (min(intensities) / 2, 2 * max(*intensities, top / result.rates.copy))
    for name, rate in result.rates.gemm.items():
        corner = max(rate / result.rates.copy, span[0])
        heights = [min(rate, x * result.rates.copy) / 1e12 for x in (span[0], corner, span[1])]
        axes.plot([span[0], corner, span[1]], heights, color="grey", linewidth=1)
        axes.annotate(name, (span[1], heights[-1]), ha="right", va="bottom", fontsize="small")
    for row in rows:
        point = row.flops / row.bytes, row.flops / _median(row) / 1e12
        axes.plot(*point, "o", color=colours[_label(row)])
        axes.annotate(row.op, point, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set(xscale="log", yscale="log", xlabel="flops / byte", ylabel="TFLOP/s")


def _bars(axes: Any, result: Result, colours: dict[str, str]) -> None:
    ops = list(dict.fromkeys(row.op for row in result.rows))
    width = 0.8 / max(1, len(colours))
    for k, (label, colour) in enumerate(colours.items()):
        rows = [row for row in result.rows if _label(row) == label]
        places = [ops.index(row.op) + k * width for row in rows]
        axes.bar(places, [1e6 * _median(row) for row in rows], width, color=colour, label=label)
        bounds = [1e6 * row.bound for row in rows]
        axes.scatter(places, bounds, marker="_", color="black", zorder=3, s=60)
    axes.set(yscale="log", ylabel="µs (black: bound)")
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(ops))], ops, rotation=40, ha="right")
    if colours:
        axes.legend(fontsize="small")


def _label(row: Row) -> str:
    return row.backend + (" graph" if row.graph else "")


def _median(row: Row) -> float:
    return statistics.median(row.seconds)
