"""The picture of README.md: what merges keep, drawn for light pages and for dark ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """The colours of a page's text, of bars with nothing tuned and of those with λ tuned."""

    text: str
    untuned: str
    tuned: str


THEMES = {
    "light": Theme("#24292f", "#0969da", "#8c959f"),
    "dark": Theme("#e6edf3", "#58a6ff", "#6e7681"),
}

Shares = Mapping[str, Sequence[float]]
"""Of a merge by its name, the share kept in every training."""


def draw(untuned: Shares, tuned: Shares, paths: Mapping[str, Path]) -> None:
    """Write an SVG for every theme, to its path."""
    # The same figures make the same file; text as text keeps it small.
    matplotlib.rcParams.update({"svg.hashsalt": "domerge_fast", "svg.fonttype": "none"})
    for theme, path in paths.items():
        canvas = bars(untuned, tuned, THEMES[theme])
        canvas.savefig(path, transparent=True, metadata={"Date": None})


def bars(untuned: Shares, tuned: Shares, theme: Theme) -> Figure:
    """A bar a merge, up to its mean; a line from the least to the largest of its trainings."""
    shares = {**untuned, **tuned}
    means = {name: statistics.fmean(x) for name, x in shares.items()}
    canvas = Figure(figsize=(7.5, 0.36 * len(shares) + 0.8), layout="constrained")
    axes = canvas.subplots()
    colours = [theme.untuned] * len(untuned) + [theme.tuned] * len(tuned)
    axes.barh(list(means), list(means.values()), color=colours, height=0.7)
    for row, (name, found) in enumerate(shares.items()):
        axes.plot([min(found), max(found)], [row, row], color=theme.text, linewidth=1)
        axes.text(1.08, row, f"{means[name]:.2f}", color=theme.text, va="center")
    axes.set_xlabel("share kept of what each adapter gains on its own task", color=theme.text)
    axes.set(xlim=(0, 1.15), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.tick_params(colors=theme.text, length=0)
    axes.axvline(1, color=theme.text, linewidth=0.5, linestyle=":")
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    return canvas
