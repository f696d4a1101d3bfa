"""The figures as Markdown tables and a plot."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from merges import CUT, DEFAULT
from sets import DECODER, OVERTRAINED, PRETRAINED, SEEN, SETS

Figures = dict[str, Any]
"""Of one training, or of one merge."""
Sets = dict[str, dict[str, Figures]]
"""Trainings by set, each called by its seed; with a comma where it is of a part of the adapters."""

Shares = dict[str, Sequence[float]]
"""By merge, of every training."""

CHOSEN = 0.6
"""The constant of the rule that is a candidate for the default."""
CANDIDATE = f"{CHOSEN} S16 rms"
RULES: dict[str, Callable[[Figures, int], float]] = {"λ = 1": lambda merge, count: 1.0}
RULES |= {
    f"S{q} {mean}": lambda merge, count, key=f"S{q} {mean}": merge["matched"][key]
    for q in ("4", "6", "8", "16", "inf")
    for mean in ("mean", "rms")
}
RULES["0.6 T"] = lambda merge, count: 0.6 * count
RULES[CANDIDATE] = lambda merge, count: CHOSEN * merge["matched"]["S16 rms"]
"""λ of a merge's figures and the number of adapters."""


TITLES = {
    PRETRAINED: "Pretrained encoders",
    DECODER: "A pretrained decoder",
    OVERTRAINED: "Over-trained sets",
}
ABOUT_SETS = {
    PRETRAINED: "The tasks above.",
    DECODER: """SmolLM2-135M-Instruct with an adapter for each of six kinds of text: news, verses,
diagnoses, records of cities, names of symbols, Python. Losses are means over the tokens of an
example; λ is chosen on 16 examples a kind, 40 others are tested on.""",
    OVERTRAINED: """Small bases that are trained from scratch, and updates that are large beside
them: a byte-level Llama on four packages of the standard library, a vision transformer on digits
that are turned, mirrored, shifted or mixed up.""",
}


def share_at(merge: Figures, scale: float) -> float | None:
    """On the curve; None beyond its end."""
    scales, shares = merge["curve"]
    return float(np.interp(scale, scales, shares)) if scale <= scales[-1] else None


def page(result: Figures) -> str:
    """The whole page of a set of measurements."""
    found: Sets = result["sets"]
    parts = [HEAD, ABOUT.format(**result), "## The sets", _sets(found)]
    for regime, title in TITLES.items():
        chosen = _of_regime(found, regime)
        if chosen:
            parts += [f"## {title}", ABOUT_SETS[regime], BEST_TEXT, _best(chosen)]
            parts += [f"### {title}: against `do`", AGAINST_TEXT, _against(chosen)]
            parts += [f"### {title}: rules for λ", RULES_TEXT, _rules(chosen)]
            if any(e["defaults"] for x in chosen.values() for e in x.values()):
                parts += [f"### {title}: what is kept by default", DEFAULT_TEXT, _defaults(chosen)]
            parts += [f"### {title}: λ by {CANDIDATE}", CANDIDATE_TEXT, _candidate(chosen)]
            parts += [f"### {title}: constants", FITTED_TEXT, _fitted(chosen)]
    parts += ["## At the rank of one adapter", CUT_TEXT, _cut(found)]
    parts += ["## Fewer adapters", FEW_TEXT, _few(found)]
    parts += ["## Nothing tuned", KEPT_TEXT, kept(result)]
    parts += ["## What was tried and did not help", TRIED]
    return "\n\n".join(parts) + "\n"


RIVALS = ("mean", "ties", "tsvm", "do")


OWN = "tsvm, power 0.5, svc"
"""What the default takes on gentle adapters; on others it takes `do`."""


def kept(result: Figures) -> str:
    """What is kept with nothing tuned, and what others keep at their best λ: a row a training."""
    found = _complete(result)
    rows = [[_called(name, seed), *_cells(entry)] for name, seed, entry in found]
    for regime, title in TITLES.items():
        inside = [e for name, _, e in found if SETS[name].regime == regime]
        fresh = [e for n, seed, e in found if SETS[n].regime == regime and (n, seed) not in SEEN]
        for label, entries in ((title, inside), (f"{title}, not seen", fresh)):
            if len(entries) > 1:
                means = [statistics.fmean(column) for column in zip(*map(_kept, entries))]
                rows.append([f"**{label}**: {len(entries)}", *map(_text, means)])
    head = ["training", "nothing said", "`do`, λ auto", "mean, λ = 1"]
    head += [f"`{name}`, best λ" for name in RIVALS]
    return _table([*head, "nothing said, over its own best λ", "`do`, over its own"], rows)


def _cells(entry: Figures) -> list[str]:
    """`_kept`, with the interval of the first."""
    first, *others = map(_text, _kept(entry))
    low, high = entry["defaults"][DEFAULT.name]["interval"]
    return [f"{first} ({low:.2f} to {high:.2f})", *others]


def headline(result: Figures) -> str:
    """The means over the trainings of pretrained encoders, in a sentence."""
    each, *others = _kept_by_merge(result)
    default, do, mean, *rivals = (statistics.fmean(x) for x in (each, *others))
    best = max(zip(rivals, RIVALS))
    names = ", ".join(f"`{x}`" for x in RIVALS)
    text = (
        f"On {len(each)} trainings of ten tasks on pretrained encoders it kept {default:.2f} of "
        f"what every adapter gains on its own task ({min(each):.2f} to {max(each):.2f}, by "
        f"training), with nothing tuned; DO-Merging at the scale "
        f"found for it {do:.2f}, the plain mean {mean:.2f}, and the best of {names} with its scale "
        f"tuned on data {best[0]:.2f} (`{best[1]}`)."
    )
    return textwrap.fill(text, 100)


def pictured(result: Figures) -> tuple[Shares, Shares]:
    """The shares of the same trainings, by merge: with nothing tuned, and at the best λ."""
    default, do, mean, *rivals = _kept_by_merge(result)
    untuned = {"the default": default, "DO-Merging": do, "the plain mean": mean}
    names = {"do": "DO-Merging", "mean": "the mean"}
    tuned = {f"{names.get(x, x)}, best λ": shares for x, shares in zip(RIVALS, rivals)}
    return untuned, dict(sorted(tuned.items(), key=lambda item: -statistics.fmean(item[1])))


def _kept_by_merge(result: Figures) -> list[tuple[float, ...]]:
    """`_kept` of the trainings of pretrained encoders, without the last two: a merge each."""
    entries = [e for name, _, e in _complete(result) if SETS[name].regime == PRETRAINED]
    return list(zip(*map(_kept, entries)))[:-2]


def _complete(result: Figures) -> list[tuple[str, str, Figures]]:
    """Trainings of all adapters that have all the figures of `kept`."""
    return [
        (name, seed, entry)
        for name, trainings in result["sets"].items()
        for seed, entry in trainings.items()
        if "," not in seed
        and {"do", "mean", DEFAULT.name} <= entry["defaults"].keys()
        and entry["merges"].keys() >= set(RIVALS)
    ]


def _kept(entry: Figures) -> list[float]:
    defaults, merges = entry["defaults"], entry["merges"]
    found = [defaults[name]["share"] for name in (DEFAULT.name, "do", "mean")]
    own = OWN if defaults[DEFAULT.name]["notes"].startswith("auto took tsvm") else "do"
    of_best = [found[0] / merges[own]["share"], found[1] / merges["do"]["share"]]
    return [*found, *(merges[name]["share"] for name in RIVALS), *of_best]


def _called(name: str, seed: str) -> str:
    return f"{name}, seed {seed}{'' if (name, seed) in SEEN else ' (not seen)'}"


def ranking(result: Figures) -> str:
    """Share at the best λ on the sets of pretrained bases."""
    return _best(_of_regime(result["sets"], PRETRAINED))


def parts_of_do(result: Figures) -> str:
    """The same of `do`, its parts and the mean."""
    names = ("do", "do, decouple only", "do, orthogonalize only", "mean")
    return _best(_of_regime(result["sets"], PRETRAINED), names)


def _of_regime(found: Sets, regime: str) -> Sets:
    return {name: x for name, x in found.items() if SETS[name].regime == regime}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _whole(trainings: Mapping[str, Figures]) -> list[Figures]:
    """The trainings of all adapters, but those that confirm."""
    return [e for key, e in trainings.items() if "," not in key]


def _mean(values: Iterable[float | None]) -> float | None:
    kept = list(values)
    return None if not kept or None in kept else statistics.fmean(kept)  # type: ignore[type-var]


def _text(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _sets(found: Sets) -> str:
    rows = []
    for name, trainings in found.items():
        entries = _whole(trainings)
        relative = [x for e in entries for x in e["relative"]]
        gains = [x for e in entries for x in e["gains"]]
        uneven = statistics.fmean(max(e["norms"]) / min(e["norms"]) for e in entries)
        rows.append(
            [
                name,
                str(len(entries[0]["adapters"])),
                str(len(entries)),
                f"{min(gains):.2f} - {max(gains):.2f}",
                f"{min(relative):.3f} - {max(relative):.3f}",
                f"{uneven:.1f}",
                *(
                    f"{statistics.fmean(e['likeness'][key] for e in entries):.3f}"
                    for key in ("cosine", "rows", "columns")
                ),
            ]
        )
    head = ["set", "adapters", "trainings", "gain alone, nats", "‖τ‖ / ‖W‖", "norms, max / min"]
    return _table([*head, "cosine of τ", "overlap of A", "of B"], rows)


def _names(found: Sets) -> list[str]:
    """All merges, those scored on most sets first and the best of them first."""
    names = dict.fromkeys(m for x in found.values() for e in _whole(x) for m in e["merges"])

    def order(name: str) -> tuple[int, float]:
        shares = [s for s in (_share(x, name) for x in found.values()) if s is not None]
        return -len(shares), -statistics.fmean(shares)

    return sorted(names, key=order)


def _values(trainings: Mapping[str, Figures], name: str, key: str) -> list[Any]:
    return [e["merges"][name][key] for e in _whole(trainings) if name in e["merges"]]


def _share(trainings: Mapping[str, Figures], name: str) -> float | None:
    return _mean(_values(trainings, name, "share"))


def _best(found: Sets, names: Sequence[str] | None = None) -> str:
    """Share at the tuned λ: a row a merge, a column a set, and means over the sets."""
    rows = []
    for name in names or _names(found):
        cells = []
        for trainings in found.values():
            shares = _values(trainings, name, "share")
            spread = f" ± {(max(shares) - min(shares)) / 2:.3f}" if len(shares) > 1 else ""
            cells.append(_text(_mean(shares)) + spread)
        means = [
            _mean(_mean(_values(x, name, key)) for x in found.values())
            for key in ("share", "pooled", "accuracy")
        ]
        rows.append([f"`{name}`", *cells, *map(_text, means)])
    return _table(["merge", *found, "mean", "pooled", "accuracy"], rows)


def _against(found: Sets) -> str:
    rows = []
    for name in _names(found):
        cells = []
        for trainings in found.values():
            means = _values(trainings, name, "difference")
            ends = _values(trainings, name, "difference interval")
            low, high = (_mean(end[k] for end in ends) for k in (0, 1))
            cells.append(f"{_mean(means):+.3f} [{low:+.3f} {high:+.3f}]" if means else "")
        rows.append([f"`{name}`", *cells])
    return _table(["merge", *found], rows)


def _by_rule(
    found: Sets, name: str, rule: Callable[[Figures, int], float]
) -> dict[str, tuple[float | None, float | None]]:
    """Share and its part of the tuned one, by set."""
    pairs = {}
    for key, trainings in found.items():
        scored = [e for e in _whole(trainings) if name in e["merges"]]
        merges = [(e["merges"][name], len(e["adapters"])) for e in scored]
        at = _mean(share_at(merge, rule(merge, count)) for merge, count in merges)
        tuned = _mean(merge["share"] for merge, _ in merges)
        pairs[key] = (at, None if at is None or tuned is None else at / tuned)
    return pairs


def _rules(found: Sets) -> str:
    rows = []
    for name in _names(found):
        cells = []
        for rule in RULES.values():
            pairs = _by_rule(found, name, rule).values()
            parts = [part for _, part in pairs]
            mean = _mean(share for share, _ in pairs)
            cells.append("" if mean is None else f"{mean:.3f} ({min(parts):.0%})")
        rows.append([f"`{name}`", _text(_mean(_share(x, name) for x in found.values())), *cells])
    return _table(["merge", "tuned", *RULES], [row for row in rows if row[1]])


def _candidate(found: Sets) -> str:
    rows = []
    for name in _names(found):
        pairs = _by_rule(found, name, RULES[CANDIDATE])
        cells = ["" if at is None else f"{at:.3f} ({part:.0%})" for at, part in pairs.values()]
        rows.append([f"`{name}`", *cells])
    return _table(["merge", *found], rows)


def _defaults(found: Sets) -> str:
    """Share at the product's own λ, and in brackets of the tuned one. First what nothing but the
    adapters gives."""
    cells = []
    for trainings in found.values():
        entries = [e for e in _whole(trainings) if "default" in e["defaults"]]
        share = _mean(e["defaults"]["default"]["share"] for e in entries)
        notes = [e["defaults"]["default"]["notes"] for e in entries]
        took = {hit[1] for note in notes if (hit := re.search(r"auto took (.*?):", note))}
        cells.append(f"{_text(share)} {', '.join(sorted(took))}")
    rows = [["nothing said", *cells, ""]]
    for name in _names(found):
        cells, parts = [], []
        for trainings in found.values():
            entries = [e for e in _whole(trainings) if name in e["defaults"]]
            share = _mean(e["defaults"][name]["share"] for e in entries)
            tuned = _mean(e["merges"][name]["share"] for e in entries)
            parts.append(None if share is None or tuned is None else share / tuned)
            cells.append(_text(share) + (f" ({parts[-1]:.0%})" if parts[-1] is not None else ""))
        rows.append([f"`{name}`", *cells, _text(None if None in parts else min(parts), ".0%")])
    return _table(["merge", *found, "worst"], rows)


MATCHED = [rule for rule in RULES if rule.startswith("S")]


def _fitted(found: Sets) -> str:
    rows = []
    for name in _names(found):
        if all(_share(x, name) is not None for x in found.values()):
            rows.append([f"`{name}`", *(_fit(found, name, rule) for rule in MATCHED)])
    return _table(["merge", *MATCHED], rows)


def _fit(found: Sets, name: str, rule: str) -> str:
    """The constant, what it keeps and at least keeps of the tuned share, and the range of constants
    with one set left out."""
    parts = np.stack([_parts(trainings, name, rule) for trainings in found.values()])
    chosen = _largest(parts)
    left = [_largest(np.delete(parts, k, axis=0)) for k in range(len(parts)) if len(parts) > 1]
    span = f", {CONSTANTS[min(left)]:.2f} - {CONSTANTS[max(left)]:.2f}" if left else ""
    kept = parts[:, chosen]
    return f"{CONSTANTS[chosen]:.2f}: {kept.mean():.0%} ({kept.min():.0%}){span}"


CONSTANTS = np.arange(0.2, 2.0, 0.02)


def _parts(trainings: Mapping[str, Figures], name: str, rule: str) -> np.ndarray:
    """Of the tuned share, at each of the constants times the rule's λ; NaN beyond the curve."""
    shares, tuned = [], []
    for entry in (e for e in _whole(trainings) if name in e["merges"]):
        merge = entry["merges"][name]
        scale = RULES[rule](merge, len(entry["adapters"]))
        shares.append(np.interp(CONSTANTS * scale, *merge["curve"], right=np.nan))
        tuned.append(merge["share"])
    return np.mean(shares, axis=0) / np.mean(tuned)


def _largest(parts: np.ndarray) -> int:
    """The constant with the largest mean over the sets."""
    return int(np.argmax(np.nan_to_num(parts.mean(0), nan=-np.inf)))


def _few(found: Sets) -> str:
    """Tuned shares and in brackets those of the candidate rule, by number of adapters."""
    blocks = []
    for set_name, trainings in found.items():
        first = next(iter(trainings))
        entries = {len(e["adapters"]): e for k, e in trainings.items() if k.split(",")[0] == first}
        if len(entries) > 1:
            rows = []
            for name in entries[min(entries)]["merges"]:
                cells = []
                for count in sorted(entries):
                    merge = entries[count]["merges"][name]
                    at = share_at(merge, RULES[CANDIDATE](merge, count))
                    cells.append(f"{merge['share']:.3f} ({_text(at)})")
                rows.append([f"`{name}`", *cells])
            head = [set_name, *(f"T = {count}" for count in sorted(entries))]
            blocks.append(_table(head, rows))
    return "\n\n".join(blocks)


def _cut(found: Sets) -> str:
    """Share and λ of merges of one adapter's rank."""
    trainings = {
        f"{name}, seed {seed}": entry
        for name, entries in found.items()
        for seed, entry in entries.items()
        if CUT[0].name in entry["merges"]
    }
    rows = []
    for name in (x.name for x in CUT):
        cells = []
        for entry in trainings.values():
            best, default = entry["merges"][name], entry["defaults"][name]["share"]
            cells.append(f"{best['share']:.3f} (λ {best['scale']:.2f}); {default:.3f}")
        rows.append([f"`{name}`", *cells])
    return _table(["merge", *trainings], rows)


PLOTTED = ("mean", "do", "tsvm", "tsvm, power 0.5, svc", "iso_c, equalized", "ties")


def plot(found: Sets, path: Path) -> None:
    """Share against λ over that of the S16 rule, a panel a set, of the first training."""
    from matplotlib.figure import Figure

    columns = 4
    figure = Figure(figsize=(12, 2.6 * -(-len(found) // columns)), layout="constrained")
    for k, (name, trainings) in enumerate(found.items()):
        axes = figure.add_subplot(-(-len(found) // columns), columns, k + 1)
        merges = _whole(trainings)[0]["merges"]
        for candidate in filter(merges.get, PLOTTED):
            scales, shares = merges[candidate]["curve"]
            unit = CHOSEN * merges[candidate]["matched"]["S16 rms"]
            near = [(x / unit, y) for x, y in zip(scales, shares) if x < 2.5 * unit]
            axes.plot(*zip(*near), label=candidate)
        axes.axvline(1, color="lightgrey", zorder=0)
        axes.set(xlim=(0, 2.5), ylim=(0, 1), title=name)
    figure.supxlabel(f"λ / ({CANDIDATE})")
    figure.supylabel("share kept")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=80, format="png")


HEAD = """# The share of each adapter's own gain that a merge keeps

(base_i − merge_i) / (base_i − own_i), of losses on held-out texts of adapter i's own task; 1: as
good as the adapter itself, 0: no better than the base. Means over a training's adapters, then over
trainings (±: half the range). Ten tasks of short labelled texts, each with a head that the base
itself gives; two pretrained sentence encoders, 17 and 23 million parameters (L3, L6). Every
training has a split, an order and first A's of its own. λ is chosen on 64 texts a task, between
values that were run on both sides of the peak; 256 others are tested on. Made by
`benchmarks/quality/run.py`; no figure is typed.

![share against λ](share.png)"""

ABOUT = """Python {python}, torch {torch}. Tasks with texts that differ from those pinned, as
another Python's may: {other texts}."""
BEST_TEXT = """At the best λ. "pooled": Σ gains of the merge over Σ gains of the adapters.
"accuracy": over the adapter's own. ", cut": to the rank of the largest adapter."""
AGAINST_TEXT = """Share less that of `do`, both at their best λ; in brackets 90 % of the samples of
a bootstrap over test texts, the same ones for both, means over trainings."""
RULES_TEXT = """λ = Σ_modules mean_i ‖τ_i‖_Sq / Σ_modules ‖M‖_Sq, M the merge at λ = 1, ‖·‖_Sq the
Schatten norm (Σ σ^q)^(1/q); "rms": the root of the mean square in place of the mean. Mean share
over the sets, and in brackets the lowest part of the tuned share on a set. Empty: beyond the λ
that were run."""
DEFAULT_TEXT = """At λ as it is where a user gives none, in brackets of the tuned share. The first
row is the merge that a user gets who names no method: its share, and what `auto` took."""
CANDIDATE_TEXT = """By set, in brackets of the tuned share."""
FITTED_TEXT = """The factor on each rule that keeps most on all sets: what it keeps of the tuned
share, in brackets on the worst set; and the range of the factors with any one set left out."""
CUT_TEXT = """At the best λ, which is in brackets, and what is kept at the default one. Cut by SVD
after the method (and `svc`), or merged in spaces of that rank (`ctm`)."""
KEPT_TEXT = """Shares on each training that has all of these figures; in brackets 90 % of the
bootstrap samples of test examples. The constants of the default λ and the choice of the default
method were fixed on the trainings that are not marked: "not seen" are those that confirm."""
TRIED = """\
- `iso_c` (a flat spectrum): as good as any on even adapters at its best λ, but no cut of it is
  defined.
- `tsvm` with power .25 and `svc`: no better than power .5 where A's were drawn apart, behind
  it where they were one.
- `ties`: behind the plain mean, both at their best λ, on all first trainings of encoders.
- `ctm`, merging in spaces of one adapter's rank: behind a cut of the merge.
- One constant on the Schatten norms for models of 3 and of 30 layers: what keeps most of `do`
  on one keeps little on the other. The damping by how far the adapters move the whole model is
  for that.
- The ratio of updates to weights alone (ρ) in its place: the decoder's is as small as the
  encoders'.
- λ = 1 after `svc`: far too much on the decoder and on adapters that are trained far.
- λ of 0.6 T for `do`, or by norms of lower order: behind on one set or another."""
FEW_TEXT = """The first T adapters of the first training; in brackets λ by the same rule."""
