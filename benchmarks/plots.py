"""Results as pictures: rivals as bars, where a merge's time goes, and how it grows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import tables
from files import FLOOR
from matplotlib.figure import Figure

OURS, THEIRS, BOUND = "tab:blue", "tab:gray", "black"
SIZES = ("adapters, R = 128", "threads")
"""Series whose axis starts at zero: the first should be flat, the last falls with the cores."""

Results = Mapping[str, Mapping[str, Any]]


def draw(results: Results, folder: Path) -> None:
    """Write rivals.svg, stages.svg and scaling.svg, as far as there are results."""
    # The same figures make the same file; text as text keeps it small.
    matplotlib.rcParams.update({"svg.hashsalt": "domerge_fast", "svg.fonttype": "none"})
    pictures = {
        "rivals": (tables.HEADLINE, lambda: rivals(results[tables.HEADLINE])),
        "stages": (tables.HEADLINE, lambda: stages(results)),
        "scaling": ("scaling", lambda: scaling(results["scaling"])),
    }
    for name, (needed, picture) in pictures.items():
        if needed in results:
            picture().savefig(folder / f"{name}.svg", metadata={"Date": None})


def rivals(result: Mapping[str, Any]) -> Figure:
    """Seconds of every contender, on a logarithmic axis."""
    found = [row for row in tables.rows(result).values() if row.seconds is not None]
    canvas = Figure(figsize=(8, 0.35 * len(found) + 1), layout="constrained")
    axes = canvas.subplots()
    labels = [row.name.replace("`", "") for row in found]
    ours = [row.name.startswith("`") for row in found]
    colours = [OURS if mine else THEIRS for mine in ours]
    bars = axes.barh(labels, [row.seconds or 0.0 for row in found], color=colours)
    axes.bar_label(bars, [f" {tables.digits(row.seconds)}" for row in found], fontsize="small")
    floor = statistics.median(result["seconds"][FLOOR])
    axes.axvline(floor, color=BOUND, linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="seconds (dashed: copy floor)", title=result["workload"])
    axes.margins(x=0.15)
    axes.invert_yaxis()
    return canvas


def stages(results: Results) -> Figure:
    """Shares of a merge's time by stage: the main thread's, and those beside it."""
    found = {name: r["stages"] for name, r in results.items() if "stages" in r}
    bars = {
        f"{name}, {thread}": stages
        for name, threads in found.items()
        for thread, stages in sorted(threads.items())
    }
    whole = {name: sum(threads["main"].values()) for name, threads in found.items()}
    names = list(dict.fromkeys(stage for stages in bars.values() for stage in stages))
    canvas = Figure(figsize=(9, 0.3 * len(bars) + 1.6), layout="constrained")
    axes = canvas.subplots()
    colours = matplotlib.colormaps["tab20"].colors
    left = dict.fromkeys(bars, 0.0)
    for stage, colour in zip(names, colours):
        shares = {
            bar: 100 * stages.get(stage, 0.0) / whole[bar.partition(", ")[0]]
            for bar, stages in bars.items()
        }
        axes.barh(
            list(bars), list(shares.values()), left=list(left.values()), color=colour, label=stage
        )
        left = {bar: left[bar] + share for bar, share in shares.items()}
    axes.set(xlabel="% of the merge's time")
    axes.invert_yaxis()
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


def scaling(result: Mapping[str, Any]) -> Figure:
    """A panel a series: medians with their spread, beside growth in proportion."""
    series = result["series"]
    canvas = Figure(figsize=(11, 6), layout="constrained")
    panels = canvas.subplots(2, 3).flat
    for axes, (name, points) in zip(panels, series.items(), strict=True):
        values = [int(x) for x in points]
        times = [[1000 * t for t in point["seconds"]] for point in points.values()]
        middle = [statistics.median(t) for t in times]
        spread = [
            [m - min(t) for m, t in zip(middle, times)],
            [max(t) - m for m, t in zip(middle, times)],
        ]
        axes.errorbar(values, middle, spread, marker="o", capsize=3, color=OURS)
        if name in SIZES:
            axes.set(ylim=(0, 1.2 * max(map(max, times))))
        else:
            line = [middle[0] * x / values[0] for x in values]
            axes.plot(values, line, color=BOUND, linewidth=0.8, linestyle="--")
            axes.set(xscale="log", yscale="log")
        axes.set_xticks(values, [str(x) for x in values])
        axes.minorticks_off()
        axes.set(xlabel=name, ylabel="ms")
    canvas.suptitle("compute of a merge (dashed: in proportion)")
    return canvas
