"""Figures of singular values: how few directions the updates have, and what a cut would keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..results.details import Details
from .drawings import Lines, Series
from .figure import Figure, Row, Table, capped

__all__ = ["spectra"]

MOST_LINES = 6
"""Adapters that have a line each; of more, the least, the median and the largest are drawn."""

FLOOR = 1e-3
"""Of the largest singular value: what is below it cannot be told from the rounding of float32
Grams."""


def spectra(
    details: Details, names: Sequence[str], merged: Sequence[float] | None
) -> Iterator[Figure]:
    """Singular values, and the energy that a cut would keep. merged: those of the merge."""
    energies = dict(zip(names, details.energies))
    whole = {name: x for name, x in energies.items() if sum(x) > 0}
    series = _summarised(whole, lambda x: [(v / max(x)) ** 0.5 for v in x])
    kept = _summarised(whole, lambda x: [sum(x[: k + 1]) / sum(x) for k in range(len(x))])
    if merged and sum(merged) > 0:
        whole["the merge"] = tuple(merged)
        series.append(_series("the merge", [(v / max(merged)) ** 0.5 for v in merged], True))
        shares = [sum(merged[: k + 1]) / sum(merged) for k in range(len(merged))]
        kept.append(_series("the merge", shares, True))
    visible = [_above(one) for one in series]
    of = f"Of {details.sampled} modules, evenly spaced."
    if len(energies) > MOST_LINES:
        of += " Of the adapters, the least, the median and the largest are drawn."
    yield Figure(
        "spectra",
        "Singular values",
        "relative to the largest",
        "How fast a line falls says how few directions an update has; a flat one uses its rank to "
        "the full. Root mean square over the modules, by index.",
        [Lines("", visible, "index", "relative singular value", log=True)],
        _ranks_table(whole),
        (
            of,
            f"Below {FLOOR:g} of the largest they cannot be told from rounding, and are not drawn.",
        ),
    )
    yield Figure(
        "energy",
        "Energy kept by a cut",
        "share of ‖ΔW‖²",
        "What would be left if every module were cut to a rank (--rank): a line that reaches 1 "
        "early can be cut to that rank for nothing.",
        [Lines("", kept, "rank", "share kept", low=0.0, high=1.0)],
        _ranks_table(whole),
        (of,),
    )


def _summarised(
    of: Mapping[str, Sequence[float]], values: Callable[[Sequence[float]], list[float]]
) -> list[Series]:
    """A line an adapter, or of many the least, the median and the largest."""
    rows = {name: values(x) for name, x in of.items()}
    if len(rows) <= MOST_LINES:
        return [_series(name, row) for name, row in rows.items()]
    longest = max(map(len, rows.values()))
    columns = [sorted(row[k] for row in rows.values() if k < len(row)) for k in range(longest)]
    picks = (("least", 0), ("median", 1), ("largest", 2))
    return [_series(name, [x[p * (len(x) - 1) // 2] for x in columns]) for name, p in picks]


def _series(name: str, values: Sequence[float], strong: bool = False) -> Series:
    return Series(name, [(float(k), x) for k, x in enumerate(values, 1)], strong)


def _above(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if y >= FLOOR]
    return Series(series.label, points, series.strong)


def _ranks_table(of: Mapping[str, Sequence[float]]) -> Table:
    """The ranks that keep some shares."""
    shares = (0.5, 0.9, 0.99, 0.999)
    head = ("update", *(f"rank for {100 * share:g} %" for share in shares))
    rows: list[Row] = [(name, *(_rank(x, share) for share in shares)) for name, x in of.items()]
    return capped(head, rows, "updates")


def _rank(energies: Sequence[float], share: float) -> int:
    sums, total = itertools.accumulate(energies), sum(energies)
    return next(k for k, x in enumerate(sums, 1) if x >= share * total * (1 - 1e-12))
