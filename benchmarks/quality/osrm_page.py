"""The figures of osrm.py as a page, and as a section of docs/osrm.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["page", "section"]

Figures = dict[str, Any]
"""Of the adapters of one training from one start, and of their merges."""
Trainings = Mapping[str, Mapping[str, Figures]]
"""By seed, then by start."""

PLAIN = "PEFT's own"
MERGES = {
    "default": "nothing said",
    "do, λ found": "`do`, λ auto",
    "do, λ tuned": "`do`, best λ",
    "tsvm, λ found": "`tsvm`, λ auto",
    "tsvm, λ tuned": "`tsvm`, best λ",
}
JUDGED = ("default", "do, λ tuned", "tsvm, λ tuned")
"""The merges that the verdict is about: what a user gets, and two with nothing left to choose."""

HEAD = """# Does it pay to keep adapters off other tasks' inputs (OSRM)?

`python benchmarks/quality/osrm.py` writes this page. Eight adapters of a small sentence encoder,
one a task, as in [the quality benchmark](../quality/README.md) (its set "even": rank 8 on all
linear layers, 130 steps of AdamW; 256 held-out texts a task), are trained from every start in
turn, with the same texts in the same order, and merged.

- **smallest**, **project**: `osrm_init_all` with that `avoid`, the second off 0.9 of the others'
  energy.
- **means**: the same with `statistic="mean"`, as the authors' code has it.
- **projected off**: trained from PEFT's own start, then `osrm_project` with that share of energy.

C is of 512 texts a task that the adapters are trained on. All rows of A begin with the length
that PEFT's have, so that directions are all that differs.

*Gain* is what is taken off the base's loss, in nats, mean over the eight tasks; *share* what a
merge keeps of every adapter's own gain, mean over tasks. A start that starves the adapters raises
shares while gains fall, so gains are what counts. λ is chosen on 64 texts a task where it says
best, on none elsewhere.
"""


def page(found: Mapping[str, Trainings]) -> str:
    """The whole page. found: by base."""
    parts = [HEAD.strip(), verdicts(found)]
    for base, trainings in _compared(found).items():
        parts += [f"## {base}", _starts(trainings), _merges(trainings, "gain")]
        parts += ["Shares:", _merges(trainings, "share"), _differences(trainings)]
    return "\n\n".join(parts) + "\n"


def section(found: Mapping[str, Trainings]) -> str:
    """What docs/osrm.md says of it."""
    parts = [verdicts(found)]
    parts += [_merges(trainings, "gain") for trainings in list(_compared(found).values())[:1]]
    link = "[The page](../benchmarks/results/osrm/README.md) has the shares, and every difference."
    return "\n\n".join([*parts, link])


def _compared(found: Mapping[str, Trainings]) -> dict[str, Trainings]:
    """Without the trainings that have one start alone."""
    return {
        base: {seed: of_seed for seed, of_seed in trainings.items() if len(of_seed) > 1}
        for base, trainings in found.items()
    }


def verdicts(found: Mapping[str, Trainings]) -> str:
    """A line a base and start, by the gains of the merges in every training."""
    lines = []
    for base, trainings in _compared(found).items():
        for start in _names(trainings):
            if start != PLAIN:
                lines.append(f"- {base}, {start}: {_verdict(trainings, start)}")
    return "\n".join(lines)


def _verdict(trainings: Trainings, start: str) -> str:
    """Whether merges gain more than from PEFT's own start: in all trainings, or in none. One is too
    few to say so."""
    count = len(_changes(trainings, start, lambda f: 0.0))
    if not count:
        return "not measured beside PEFT's own start."
    told: dict[str, list[str]] = {}
    for merge in JUDGED:
        change = _changes(trainings, start, lambda f, m=merge: _mean(f["merges"][m]["gain"]))
        kind = "is undecided"
        if count > 1 and min(change) > 0:
            kind = "**pays**"
        elif count > 1 and max(change) < 0:
            kind = "**costs**"
        told.setdefault(kind, []).append(f"{MERGES[merge]} ({_signed(_mean(change))})")
    own = _mean(_changes(trainings, start, lambda f: _mean(f["own"])))
    parts = [f"{kind} with {', '.join(names)}" for kind, names in told.items()]
    parts.append(f"the adapters alone {_signed(own)} nats")
    return f"{'; '.join(parts)}. {count} training{'s' * (count > 1)}."


def _names(trainings: Trainings) -> list[str]:
    return list(dict.fromkeys(start for of_seed in trainings.values() for start in of_seed))


def _changes(trainings: Trainings, start: str, figure: Callable[[Figures], float]) -> list[float]:
    """Against PEFT's own start, in every training that has both."""
    both = [x for x in trainings.values() if start in x and PLAIN in x]
    return [figure(x[start]) - figure(x[PLAIN]) for x in both]


def _of(trainings: Trainings, start: str, figure: Callable[[Figures], float | None]) -> str:
    values = [figure(x[start]) for x in trainings.values() if start in x]
    known = [x for x in values if x is not None]
    return f"{_mean(known):.3f}" if known else ""


def _starts(trainings: Trainings) -> str:
    """What is known of the adapters by themselves."""
    head = (
        *("start", "trainings", "others' energy let through at the start", "own"),
        *("own gain", "overlap of A's after training", "kept of ‖τ‖² by projection"),
    )
    rows = [
        (
            start,
            str(sum(start in x for x in trainings.values())),
            *(_of(trainings, start, lambda f, k=k: (f["seen"] or {}).get(k)) for k in _SEEN),
            _of(trainings, start, lambda f: _mean(f["own"])),
            _of(trainings, start, lambda f: f["likeness"]["rows"]),
            _of(trainings, start, lambda f: f["kept"]),
        )
        for start in _names(trainings)
    ]
    return _table(head, rows)


_SEEN = ("others", "own")


def _merges(trainings: Trainings, figure: str) -> str:
    """Means over trainings of the merges' gains, or of their shares."""
    rows = [
        (
            start,
            _of(trainings, start, lambda f: _mean(f["own"])) if figure == "gain" else "1",
            *(
                _of(trainings, start, lambda f, m=merge: _mean(f["merges"][m][figure]))
                for merge in MERGES
            ),
        )
        for start in _names(trainings)
    ]
    return _table(("start", "the adapters alone", *MERGES.values()), rows)


def _differences(trainings: Trainings) -> str:
    """Of gains, against PEFT's own start: the mean, and the least and the largest training."""
    figures: dict[str, Callable[[Figures], float]] = {
        "the adapters alone": lambda f: _mean(f["own"]),
        **{
            shown: lambda f, m=merge: _mean(f["merges"][m]["gain"])
            for merge, shown in MERGES.items()
        },
    }
    rows = []
    for start in _names(trainings):
        if start != PLAIN:
            changes = [_changes(trainings, start, figure) for figure in figures.values()]
            rows.append((start, *(_spread(change) for change in changes)))
    title = (
        "Gains less those from PEFT's own start, and the least and the largest of the trainings:"
    )
    return f"{title}\n\n{_table(('start', *figures), rows)}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{_signed(_mean(values))} ({_signed(min(values))} to {_signed(max(values))})"


def _signed(x: float) -> str:
    return f"{x:+.3f}".replace("-", "−")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
