"""How much of every adapter's gain a merge keeps, for each method and option, over three trainings.

    python benchmarks/quality/run.py            # trains what is not there yet, then scores
    python benchmarks/quality/run.py --seeds 1  # a first look

Trained models are kept under benchmarks/data/quality; results go to benchmarks/results/quality.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import digits
import language
import torch
from score import CANDIDATES, SCALES, Training, curve

HERE = Path(__file__).parent.parent
DATA = HERE / "data" / "quality"
RESULTS = HERE / "results" / "quality"

HEAD = """# The share of each adapter's own gain that a merge keeps

Mean over eight adapters and three trainings, spread from training to training, at the best of the
scales tried and at λ = 1. "norm": of the merged update at λ = 1, in units of the adapters' mean
norm. Made by `benchmarks/quality/run.py`."""

SETS = {
    "language": (language.bench, language.adapters),
    "language, shared A": (
        language.bench,
        lambda folder, seed: language.adapters(folder, seed, shared_a=True),
    ),
    "digits": (digits.bench, digits.adapters),
}


def measure(seeds: int, sets: list[str]) -> dict[str, Any]:
    """Curves of every candidate, by set and seed."""
    found: dict[str, Any] = {}
    for name in sets:
        make_bench, make_adapters = SETS[name]
        bench = make_bench(DATA)
        for seed in range(seeds):
            started = time.perf_counter()
            training = Training.measure(bench, make_adapters(DATA, seed))
            entry: dict[str, Any] = {
                "gains": [b - o for b, o in zip(training.base, training.own)],
                "norms": training.norms,
                "curves": {c.name: curve(bench, training, c) for c in CANDIDATES},
            }
            found.setdefault(name, []).append(entry)
            print(f"{name}, training {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    return found


def table(entries: list[dict[str, Any]]) -> str:
    """A row a candidate: the share at its best scale and at 1, mean over trainings and spread."""
    lines = [
        "| merge | share kept at its best λ | spread | best λ | at λ = 1 | norm at λ = 1 |",
        "|---|---|---|---|---|---|",
    ]
    for candidate in CANDIDATES:
        curves = [entry["curves"][candidate.name] for entry in entries]
        best = [c["best"] for c in curves]
        scales = ", ".join(f"{c['best_scale']:g}" for c in curves)
        one = statistics.fmean(c["at_scale_1"] for c in curves)
        norm = statistics.fmean(c["relative_norm"] for c in curves)
        lines.append(
            f"| {candidate.name} | {statistics.fmean(best):.3f} | {min(best):.3f} to "
            f"{max(best):.3f} | {scales} | {one:.3f} | {norm:.2f} |"
        )
    return "\n".join(lines)


def publish(found: dict[str, Any]) -> str:
    """Keep the figures, and the tables of them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"scales": SCALES, "torch": torch.__version__, "sets": found}
    (RESULTS / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    tables = [f"## {name}\n\n{table(found[name])}" for name in SETS if name in found]
    text = "\n\n".join([HEAD, *tables])
    (RESULTS / "README.md").write_text(text + "\n")
    return text


def known() -> dict[str, Any]:
    """What was measured before: sets that are not measured now keep their figures."""
    path = RESULTS / "quality.json"
    return json.loads(path.read_text())["sets"] if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    args = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    print(publish(known() | measure(args.seeds, args.sets)))


if __name__ == "__main__":
    main()
