"""Figures of how much adapters interfere before they are merged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from ..errors import printable, some
from ..results.details import Details
from ..results.report import Direction, Interference, OnInputs
from .drawings import Lines, Matrix, Ranges, Series
from .figure import MOST_ROWS, Figure, Row, Table, capped
from .kinds import MOST_KINDS, by_kind

__all__ = [
    "MOST_RANGES",
    "along",
    "by_depth",
    "conflicts",
    "moved",
    "numbered",
    "of_first",
    "of_kinds",
    "overlaps",
    "sizes",
]

MOST_RANGES = 64
"""Adapters that have a row in a drawing."""


def numbered(names: Sequence[str]) -> list[str]:
    """Names with their numbers, by which the tables call the adapters."""
    return [f"{k} {name}" for k, name in enumerate(names, 1)]


def sizes(found: Interference, names: Sequence[str]) -> Figure:
    """How large the updates of every adapter are."""
    head = ("adapter", "‖ΔW‖, all modules", "least of a module", "median", "largest")
    rows = [(name, norm, *own) for name, norm, own in zip(names, found.norms, found.spread)]
    return Figure(
        "sizes",
        "Size of the updates",
        "‖ΔW‖, Frobenius norm in the units of the weights",
        "Each row is an adapter: the line goes from its smallest module to its largest, the dot is "
        "the median. An adapter that lies far to the right outweighs the others in a plain sum.",
        [Ranges(names[:MOST_RANGES], found.spread[:MOST_RANGES], "‖ΔW‖ of a module", log=True)],
        capped(head, rows, "adapters"),
        of_first(len(names)),
    )


def of_first(count: int) -> tuple[str, ...]:
    if count <= MOST_RANGES:
        return ()
    return (f"The first {MOST_RANGES} of {count} adapters are drawn.",)


def overlaps(found: Interference) -> Iterator[Figure]:
    """The three tables of every two adapters."""
    numbers = [str(k) for k in range(1, len(found.adapters) + 1)]
    angles = "0 orthogonal, 1 the same"
    cosines = "-1 opposite, 0 apart, 1 the same"
    told = (
        ("rows", "Overlap of row spaces (A)", angles, "read the same inputs"),
        ("columns", "Overlap of column spaces (B)", angles, "write the same outputs"),
        ("cosine", "Cosine between the updates", cosines, "change the weights alike"),
    )
    for (key, title, unit, what), values in zip(told, found.tables or ()):
        hollow = (
            "; a hollow one is negative: they work against each other" if key == "cosine" else ""
        )
        yield Figure(
            key,
            title,
            unit,
            f"The larger the square of two adapters, the more they {what}{hollow}. Numbers are "
            "those of the list of adapters.",
            [Matrix(numbers, values)],
            _pairs(numbers, values),
        )


def _pairs(numbers: Sequence[str], values: Sequence[Sequence[float]]) -> Table:
    """The pairs, the farthest from 0 first."""
    pairs = itertools.combinations(range(len(values)), 2)
    rows = [(f"{numbers[i]} and {numbers[j]}", values[i][j]) for i, j in pairs]
    rows.sort(key=lambda row: -abs(row[1]))
    return capped(("adapters", "value"), rows, "pairs")


def of_kinds(
    key: str,
    title: str,
    unit: str,
    reading: str,
    names: Sequence[str],
    modules: Mapping[str, Sequence[float]],
) -> Figure:
    """Numbers of modules, one line for each of `names`, by kind of module over depth: those of
    which the first is largest first."""
    curves = by_kind(modules)
    means = {
        kind: [sum(x) / len(x) for x in zip(*(row for _, row in curve))]
        for kind, curve in curves.items()
    }
    order = sorted(curves, key=lambda kind: -abs(means[kind][0]))
    values = [x for curve in curves.values() for _, row in curve for x in row]
    low, high = min(values, default=0.0), max(values, default=1.0)
    drawings = [
        Lines(
            kind,
            [
                Series(name, [(at, row[k]) for at, row in curves[kind]], strong=k == 0)
                for k, name in enumerate(names)
            ],
            "layer",
            "mean",
            low=min(low, 0.0),
            high=high if high > 0 else 1.0,
        )
        for kind in order[:MOST_KINDS]
    ]
    left = len(order) - MOST_KINDS
    notes = (f"{left} more kinds of modules are in the table alone.",) if left > 0 else ()
    head = ("kind of module", *(f"{name}, mean" for name in names))
    rows: list[Row] = [(kind, *means[kind]) for kind in order]
    table = capped(head, rows, "kinds")
    return Figure(key, title, unit, reading, drawings, table, notes)


def by_depth(details: Details) -> Figure:
    """Interference by kind of module over depth."""
    return of_kinds(
        "depth",
        "Interference by module",
        "0 none, 1 the same update",
        "Means over pairs of adapters, by kind of module from the first layer to the last. Peaks "
        "are where adapters get in each other's way.",
        ("|cosine| of ΔW", "overlap of A", "overlap of B"),
        {name: (x.cosine, x.rows, x.columns) for name, x in details.modules.items()},
    )


def along(direction: Direction, names: Sequence[str]) -> Figure:
    """Cosines with another adapter's update."""
    return _by_module(
        "direction",
        f"Along {printable(direction.name)}",
        "cosine, -1 to 1",
        "How far the updates go along that of another adapter; those that go farthest come first.",
        names,
        direction.cosine,
        direction.modules,
    )


def moved(found: OnInputs, names: Sequence[str]) -> Figure:
    """How far updates move outputs on other tasks' inputs."""
    return _by_module(
        "on_inputs",
        "Moved on other tasks' inputs",
        "1 as on inputs without a preferred direction",
        f"How far an adapter moves outputs on the inputs of {printable(some(found.tasks))}, its "
        "own left out; the modules in which one moves them most come first.",
        names,
        found.moved,
        found.modules,
    )


def _by_module(
    key: str,
    title: str,
    unit: str,
    reading: str,
    names: Sequence[str],
    whole: Sequence[float],
    modules: Mapping[str, Sequence[float | None]],
) -> Figure:
    """A number of every adapter: of all modules, and of each, those with the largest first."""
    order = sorted(modules, key=lambda n: -max(abs(x or 0.0) for x in modules[n]))
    rows: list[Row] = [("all modules", *whole), *((name, *modules[name]) for name in order)]
    table = capped(("module", *names), rows, "modules")
    return Figure(key, title, unit, reading, [], table, shown=True)


def conflicts(details: Details) -> Figure:
    """The modules whose adapters interfere most."""
    order = sorted(details.modules, key=lambda name: -abs(details.modules[name].strongest))
    head = (
        "module",
        "strongest cosine",
        "adapters",
        "mean |cosine|",
        "overlap of A",
        "overlap of B",
    )
    rows: list[Row] = []
    for name in order[:MOST_ROWS]:
        x = details.modules[name]
        pair = f"{x.pair[0] + 1} and {x.pair[1] + 1}"
        rows.append((name, x.strongest, pair, x.cosine, x.rows, x.columns))
    left = f"The {MOST_ROWS} that conflict most of {len(order)} modules are shown; --json has all."
    return Figure(
        "conflicts",
        "The most conflicting modules",
        "cosines -1 to 1, overlaps 0 to 1",
        "The first rows are the modules in which two adapters change the weights most alike, or "
        "most against each other. A press on a column's name sorts by it.",
        [],
        Table(head, rows, left if len(order) > MOST_ROWS else ""),
        shown=True,
    )
