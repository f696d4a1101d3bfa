"""The figures as Markdown tables, a row a candidate and a column a set, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merges import ADDING, AVERAGING, CANDIDATES, DIRECTIONS, DO, ORTHOGONALIZED, PLAIN, RULES

Sets = dict[str, list[dict[str, Any]]]
Cell = Callable[[list[dict[str, Any]], str], str]

HEAD = """# The share of each adapter's own gain that a merge keeps

Mean over eight adapters, then over three trainings with their spread (±: half the range from the
lowest to the highest). 1: as good as every adapter on its own task; 0: no better than the base
model. λ is walked from 1 on a grid for as long as the share rises; the best is its peak. Descents
run to `tol` 1e-6 where a row does not say otherwise. Made by `benchmarks/quality/run.py`; no figure
is typed.

![share against λ](share.png)"""

SECTIONS: tuple[tuple[str, str], ...] = (
    ("At its best λ", ""),
    (
        "At its best λ, against `do` in the same training",
        "The mean difference, and in how many of the trainings the candidate is above `do`.",
    ),
    ("At λ = 1", "What a user gets who has nothing to choose λ with."),
    ("The best λ", "Median over the trainings."),
    ("Norm at λ = 1", "Of the merged update, in units of the adapters' mean norm."),
)

RULES_TEXT = """`do` with λ of every module set from norms alone. "Of its best": the share kept in
parts of what `do` keeps at its best λ on that set, mean over the sets."""

RANKING_TEXT = """Each at its best λ, alone, on adapters that `do`'s descent has orthogonalized, and
in place of the weighted sum of `do`'s directions. Every share is divided by what `do` keeps in the
same training: the mean of three trainings on each set, and the mean of the sets, which orders the
rows by the best of the three. Dense results are not truncated; options are the defaults; updates
that a method adds up are given weights 1/8."""

SHOWN_BY_ADAPTER = ("mean", "orthogonalize", "decouple", "do")
EACH_TEXT = """What each gains on its own, and the shares kept at the best λ of each merge (which is
chosen for all eight): means over the trainings, in which every adapter had another effort."""


def page(found: Sets, ranking: str) -> str:
    """The whole page of a set of measurements, with the table of all methods."""
    cells: tuple[Cell, ...] = (_best, _against_do, _at_one, _best_scale, _norm)
    parts = [HEAD, "## The sets", _sets(found)]
    for (title, text), cell in zip(SECTIONS, cells, strict=True):
        parts += [f"## {title}", *([text] if text else []), _candidates(found, cell)]
    parts += ["## Rules for λ", RULES_TEXT, _rules(found)]
    parts += ["## All methods", RANKING_TEXT, ranking]
    parts += ["## Adapter by adapter", EACH_TEXT]
    parts += [f"### {name}\n\n{_each(entries)}" for name, entries in found.items()]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sets(found: Sets) -> str:
    head = ["set", "gain alone", "largest norm / smallest", "cosine of ΔW", "overlap of A", "of B"]
    rows = []
    for name, entries in found.items():
        likeness = [_mean(e["likeness"][key] for e in entries) for key in entries[0]["likeness"]]
        cosine, of_a, of_b, uneven = likeness
        gain = _mean(_mean(e["gains"]) for e in entries)
        texts = [f"{gain:.3f}", f"{uneven:.1f}", *(f"{x:.3f}" for x in (cosine, of_a, of_b))]
        rows.append([name, *texts])
    return _table(head, rows)


def _candidates(found: Sets, cell: Cell) -> str:
    rows = [[c.name, *(cell(e, c.name) for e in found.values())] for c in CANDIDATES]
    return _table(["merge", *found], rows)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _values(entries: list[dict[str, Any]], name: str, key: str) -> list[float]:
    return [entry["curves"][name][key] for entry in entries]


def _best(entries: list[dict[str, Any]], name: str) -> str:
    best = _values(entries, name, "best")
    return f"{_mean(best):.3f} ± {(max(best) - min(best)) / 2:.3f}"


def _against_do(entries: list[dict[str, Any]], name: str) -> str:
    if name == DO.name:
        return "0"
    pairs = zip(_values(entries, name, "best"), _values(entries, DO.name, "best"))
    differences = [x - y for x, y in pairs]
    above = sum(x > 0 for x in differences)
    return f"{_mean(differences):+.3f} ({above} of {len(differences)})"


def _at_one(entries: list[dict[str, Any]], name: str) -> str:
    return f"{_mean(_values(entries, name, 'at_scale_1')):.3f}"


def _best_scale(entries: list[dict[str, Any]], name: str) -> str:
    return f"{statistics.median(_values(entries, name, 'best_scale')):g}"


def _norm(entries: list[dict[str, Any]], name: str) -> str:
    return f"{_mean(_values(entries, name, 'relative_norm')):.2f}"


def _rules(found: Sets) -> str:
    tuned = {name: _mean(_values(e, DO.name, "best")) for name, e in found.items()}
    shares = {
        "`do` at its best λ": tuned,
        "λ = 1": {n: _mean(_values(e, DO.name, "at_scale_1")) for n, e in found.items()},
        **{r: {n: _mean(x["rules"][r] for x in e) for n, e in found.items()} for r in RULES},
        "plain mean, λ = 1": {
            n: _mean(_values(e, PLAIN.name, "at_scale_1")) for n, e in found.items()
        },
    }
    rows = [
        [rule, *(f"{x:.3f}" for x in row.values()), f"{_mean(row[n] / tuned[n] for n in row):.2f}"]
        for rule, row in shares.items()
    ]
    return _table(["λ", *found, "of its best"], rows)


def ranking(found: Sets) -> str:
    """All methods with and without the parts of `do`, the best first: in each cell the mean over
    the sets, and in brackets that of each set."""
    rows = {"do": [_of_do(found, DO.name)]}
    for method in (*ADDING, *AVERAGING):
        parts = ("", ORTHOGONALIZED, DIRECTIONS)
        names = [f"{part}{method}" for part in parts]
        known = [n for n in names if all(n in e["curves"] for x in found.values() for e in x)]
        if known:
            rows[method] = [_of_do(found, name) for name in known]
    order = sorted(rows, key=lambda method: -max(_mean(row) for row in rows[method]))
    shown = [
        [
            f"`{method}`",
            *(f"{_mean(row):.2f} ({', '.join(f'{x:.2f}' for x in row)})" for row in rows[method]),
        ]
        for method in order
    ]
    head = ["method", "alone", "orthogonalized first", "on `do`'s directions"]
    sets = f"In brackets: {', '.join(found)}."
    return _table(head, [row + [""] * (len(head) - len(row)) for row in shown]) + f"\n\n{sets}"


def _of_do(found: Sets, name: str) -> list[float]:
    """The share kept by a candidate over that kept by `do`, in the same training: means by set."""
    return [
        _mean(e["curves"][name]["best"] / e["curves"][DO.name]["best"] for e in entries)
        for entries in found.values()
    ]


def _each(entries: list[dict[str, Any]]) -> str:
    rows = []
    for k, label in enumerate(entries[0]["adapters"]):
        gain = _mean(e["gains"][k] for e in entries)
        kept = [
            _mean(e["curves"][c]["best_per_adapter"][k] for e in entries) for c in SHOWN_BY_ADAPTER
        ]
        rows.append([label, f"{gain:.3f}", *(f"{x:.3f}" for x in kept)])
    return _table(["adapter", "gain alone", *SHOWN_BY_ADAPTER], rows)


PLOTTED = ("mean", "orthogonalize", "decouple", "do", "do, renormalize")


def plot(found: Sets, path: Path) -> None:
    """Share against λ, a panel a set, the mean over trainings at the scales that all have tried."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for k, (name, entries) in enumerate(found.items()):
        axes = figure.add_subplot(2, 3, k + 1)
        for candidate in PLOTTED:
            curves = [entry["curves"][candidate]["mean_share"] for entry in entries]
            scales = sorted(set.intersection(*map(set, curves)), key=float)
            shares = [_mean(c[scale] for c in curves) for scale in scales]
            axes.plot([float(s) for s in scales], shares, ".-", label=candidate)
        axes.axvline(1, color="lightgrey", zorder=0)
        axes.set(xscale="log", xlim=(0.09, 4.5), ylim=(0, None), title=name)
        axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
        axes.set_xticks([], minor=True)
    figure.supxlabel("λ")
    figure.supylabel("share kept")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=80, format="png")
