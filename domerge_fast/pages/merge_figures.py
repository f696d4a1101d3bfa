"""Figures of what a merge did: what it keeps of every adapter, and how the factors were moved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ..methods.side_report import SideReport
from ..results.report import Report
from .drawings import Bars, Ranges
from .figure import Figure, Table, capped
from .interference_figures import MOST_RANGES, of_first, of_kinds

__all__ = ["descent", "shares", "shares_of"]

MOST_BARS = 20
"""Of a histogram; of more numbers of steps, neighbours are counted together."""

Sides = Mapping[str, tuple[SideReport, SideReport]]
"""A and B of modules by name."""


def shares(report: Report, names: Sequence[str]) -> Iterator[Figure]:
    """What share of every adapter the merge keeps, where that was asked for."""
    found: dict[str, list[float]] = {name: [] for name in report.adapters}
    for module in report.modules.values():
        for name, share in module.shares.items():
            found[name].append(share)
    if any(found.values()):
        yield shares_of(dict(zip(names, found.values())))


def shares_of(found: Mapping[str, Sequence[float]]) -> Figure:
    """The same of shares in modules, by adapter."""
    spread = {name: _spread(shares) for name, shares in found.items() if shares}
    labels, ranges = list(spread), list(spread.values())
    head = ("adapter", "least of a module", "median", "largest")
    return Figure(
        "shares",
        "Share of every adapter that the merge keeps",
        "⟨ΔW, ΔWᵢ⟩ / ‖ΔWᵢ‖², by projection",
        "At 1 the merge has all of an adapter's update in its own direction, at 0 nothing, below 0 "
        "its opposite; a mean of T adapters that do not overlap keeps 1/T of each. Adapters far to "
        "the left of the others are the ones that the merge gave up.",
        [Ranges(labels[:MOST_RANGES], ranges[:MOST_RANGES], "share kept in a module", zero=True)],
        capped(head, [(name, *own) for name, own in spread.items()], "adapters"),
        of_first(len(labels)),
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def descent(report: Report) -> Iterator[Figure]:
    """How the factors were orthogonalized, where they were."""
    sides = {
        name: (module.a, module.b)
        for name, module in report.modules.items()
        if module.a and module.b and len(module.magnitudes) > 1
    }
    if not sides:
        return
    yield _steps(sides)
    yield of_kinds(
        "left",
        "Interference after the merge",
        "share of the energy between adapters that is left",
        "Of what the factors of different adapters have in common, by layer: 1 is all of it, 0 "
        "none. Where a line is high, they could not be moved apart without changing them much.",
        ("A", "B"),
        {name: (a.cross_left, b.cross_left) for name, (a, b) in sides.items()},
    )


def _steps(sides: Sides) -> Figure:
    counts = [[pair[k].steps for pair in sides.values()] for k in range(2)]
    least, most = min(map(min, counts)), max(map(max, counts))
    width = math.ceil((most - least + 1) / MOST_BARS)
    starts = range(least, most + 1, width)
    labels = [str(x) if width == 1 else f"{x}-{x + width - 1}" for x in starts]
    series = [
        (side, [float(sum(x <= n < x + width for n in own)) for x in starts])
        for side, own in zip(("A", "B"), counts)
    ]
    head = ("side", "f before", "f after", "f left", "steps, median", "factors moved by, mean")
    return Figure(
        "descent",
        "The descent",
        "modules by number of steps",
        "How many steps moved the factors apart until that no longer paid. f is the objective: how "
        "much the adapters' factors have in common, and what it costs to change them.",
        [Bars(labels, series, "steps")],
        Table(
            head, [_side(name, [pair[k] for pair in sides.values()]) for k, name in enumerate("AB")]
        ),
    )


def _side(
    name: str, reports: Sequence[SideReport]
) -> tuple[str, float, float, float, float, float]:
    before = math.fsum(x.objective_before for x in reports)
    after = math.fsum(x.objective_after for x in reports)
    steps = statistics.median(x.steps for x in reports)
    moved = statistics.fmean(x.change for x in reports)
    return name, before, after, after / before if before else 0.0, float(steps), moved
