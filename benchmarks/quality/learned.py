"""Merges that see a little data beside those that see none: runs, scores and writes the page.

    python benchmarks/quality/learned.py             # what is missing, then the page
    python benchmarks/quality/learned.py --kept      # the page of what was run before

Adapters, and what merges put out, are kept under benchmarks/data/quality as those of run.py are;
figures go to benchmarks/results/quality/learned.json and learned.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))

import bases  # noqa: E402
import encoders  # noqa: E402
import measure  # noqa: E402
import score  # noqa: E402
import torch  # noqa: E402
from sets import DATA, SETS  # noqa: E402
from transformers.utils import logging  # noqa: E402
from with_data import ROWS, Given, Row  # noqa: E402

import domerge_fast as dm  # noqa: E402

RESULTS = HERE / "results" / "quality"
FIGURES, PAGE = RESULTS / "learned.json", RESULTS / "learned.md"
KEPT = DATA / "learned"
TRAININGS = (("L3 even", 0), ("L3 uneven", 0), ("L3 shared A", 0), ("L3 even", 1))
"""Sets with seeds; the rate was chosen on the first."""
DRAWS = 400


def run(name: str, seed: int, rows: tuple[Row, ...]) -> None:
    """Keep what is missing of a training."""
    folder = KEPT / name / str(seed)
    missing = [row for row in rows if not (folder / f"{row.name}.pt").exists()]
    if not missing:
        return
    bench, adapters = SETS[name].bench(seed), SETS[name].adapters(seed)
    known = measure.keep(folder / "training.pt", lambda: measure.training(bench, adapters))
    base = bases.SMALL if name.startswith("L3") else bases.FULL
    batches, heads = encoders.examples(base, seed, DATA)
    paths = [a.path for a in adapters]
    model = bases.load(base, DATA)
    alone = measure.keep(folder / "alone.pt", lambda: _alone(paths, model, batches, heads))
    given = Given(paths, model, batches, heads, alone)
    for row in missing:
        kept = measure.keep(folder / f"{row.name}.pt", lambda row=row: _made(row, given, bench))
        share = score.shares(known, kept["outputs"]).mean().item()
        told = f"{share:.3f}, {kept['batches']} batches, {kept['seconds']:.0f} s"
        print(f"{name}, {seed}: {row.name}: {told}", flush=True)


def _alone(paths: Any, model: Any, batches: Any, heads: Any) -> dict[str, float]:
    """The entropy of each adapter on its own task."""
    found = {}
    for path, task in zip(paths, batches, strict=True):
        one = dm.prepare([path], "linear")
        given = {task: batches[task]}
        settings = {"loss": "entropy", "heads": heads}
        found[task] = dm.cocktail(one, model, given, **settings).history[0].mean
    return found


def _made(row: Row, given: Given, bench: Any) -> dict[str, Any]:
    started = time.process_time()
    found = row.find(given)
    seconds = time.process_time() - started
    return {
        "outputs": bench.outputs(found.deltas, 1.0, list(given.batches)),
        "batches": found.batches,
        "seconds": seconds,
        "coefficients": found.coefficients,
    }


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Of all that is kept: by row, shares by training; means and intervals over the trainings that
    all rows have."""
    found: dict[str, Any] = {row.name: {"data": row.data, "shares": {}} for row in rows}
    whole: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for name, seed in TRAININGS:
        folder = KEPT / name / str(seed)
        kept = {row.name: folder / f"{row.name}.pt" for row in rows}
        there = {key: path for key, path in kept.items() if path.exists()}
        known = torch.load(folder / "training.pt") if there else {}
        for key, path in there.items():
            own = _scored(known, torch.load(path))
            found[key]["shares"][f"{name}, {seed}"] = own["share"]
            if len(there) == len(rows):
                whole[key].append(own)
    drawn = {name: [x["drawn"] for x in of] for name, of in whole.items()}
    picks = _picks(len(next(iter(drawn.values()))))
    against = _mean(drawn[rows[0].name], picks)
    for name, own in found.items():
        sample = _mean(drawn[name], picks)
        for key in ("share", "accuracy", "batches", "seconds"):
            own[key] = sum(x[key] for x in whole[name]) / len(whole[name])
        own["trainings"] = len(whole[name])
        own["interval"] = _interval(sample)
        own["difference interval"] = _interval(sample - against)
    return found


def _scored(known: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    return {
        "share": score.shares(known, kept["outputs"]).mean().item(),
        "accuracy": score.accuracy(known, kept["outputs"]),
        "batches": kept["batches"],
        "seconds": kept["seconds"],
        "drawn": score.bootstrap(known, kept["outputs"]),
    }


def _picks(count: int) -> torch.Tensor:
    """Trainings drawn with replacement, [DRAWS, count]."""
    return torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(1))


def _mean(drawn: list[torch.Tensor], picks: torch.Tensor) -> torch.Tensor:
    """[DRAWS]: over trainings and test examples drawn with replacement."""
    table = torch.stack(drawn, 1)
    return table.gather(1, picks).mean(1)


def _interval(sample: torch.Tensor) -> list[float]:
    return torch.quantile(sample, torch.tensor([0.05, 0.95], dtype=sample.dtype)).tolist()


def page(found: dict[str, Any]) -> str:
    lines = [INTRODUCTION, *table(found)]
    if left := [f"`{row.name}`" for row in ROWS if row.name not in found]:
        lines += ["", f"Not run on all of them yet (searched.md has one): {', '.join(left)}."]
    return "\n".join(lines) + "\n"


def table(found: dict[str, Any]) -> list[str]:
    """A line a merge: shares by training, and what is over those that all merges have."""
    shown = {x: None for own in found.values() for x in own["shares"]}
    trainings, whole = [*shown], next(iter(found.values()))["trainings"]
    head = [
        "merge",
        "sees",
        *trainings,
        f"mean of {whole}",
        "90 %",
        "beside the default",
        "accuracy",
    ]
    head += ["batches", "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, x in sorted(found.items(), key=lambda pair: -pair[1]["share"]):
        low, high = x["interval"]
        worse, better = x["difference interval"]
        cells = [
            f"`{name}`",
            x["data"] or "nothing",
            *(_cell(x["shares"].get(t)) for t in trainings),
        ]
        cells += [f"**{x['share']:.3f}**", f"{low:.3f} to {high:.3f}"]
        cells += [f"{worse:+.3f} to {better:+.3f}", f"{x['accuracy']:.3f}"]
        cells += [f"{x['batches']:.0f}", f"{x['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(share: float | None) -> str:
    return "not run" if share is None else f"{share:.3f}"


INTRODUCTION = """# Merges that see a little data

The share of each adapter's own gain that a merge keeps, as in [README.md](README.md): ten tasks, an
adapter each, of a pretrained sentence encoder. What sees data sees the 64 examples a task that
choose λ there, by their inputs alone or with labels; all are scored on the 256 others a task. The
mean is over the trainings that all rows have, as are all columns after it; 90 % of the bootstrap
samples of these trainings and of their test examples are within the interval, and the difference
from the default beside it is of the same samples. "batches":
forward passes of up to 16 inputs that were taken to find coefficients (with a backward pass for
`adamerge` and TARA); CPU seconds of one thread, to find and to merge. Gradients take 40 steps of
Adam at 0.005, of a batch of each task, from the automatic scale; 0.02, tried by task on the first
training, kept less. Made by `benchmarks/quality/learned.py`; no figure is typed.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", action="store_true", help="of what was run before, no more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if not args.kept:
        for name, seed in TRAININGS:
            run(name, seed, ROWS)
    folders = [KEPT / name / str(seed) for name, seed in TRAININGS]
    found = figures(tuple(r for r in ROWS if all((x / f"{r.name}.pt").exists() for x in folders)))
    rounded = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.5g}"))
    FIGURES.write_text(json.dumps(rounded) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
