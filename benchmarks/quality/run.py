"""How much of every adapter's gain a merge keeps, for each method and option, over three trainings.

    python benchmarks/quality/run.py            # trains what is not there yet, then scores
    python benchmarks/quality/run.py --seeds 1  # a first look
    python benchmarks/quality/run.py --missing  # scores only candidates without figures
    python benchmarks/quality/run.py --tables   # writes the tables and the plot anew, no more

Trained models are kept under benchmarks/data/quality; results go to benchmarks/results/quality.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))

import digits  # noqa: E402
import language  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
from merges import CANDIDATES, METHODS, RULES, scaled_by_rule  # noqa: E402
from pages import fill  # noqa: E402
from score import SCALES, Training, curve  # noqa: E402

DATA = HERE / "data" / "quality"
RESULTS = HERE / "results" / "quality"
METHODS_PAGE = HERE.parent / "docs" / "methods.md"

SETS = {
    "language": (language.bench, language.adapters(language.apart)),
    "language, even effort": (language.bench, language.adapters(language.even)),
    "language, shared A": (language.bench, language.adapters(language.shared_a)),
    "language, one from another": (language.bench, language.adapters(language.one_from_another)),
    "language, related tasks": (language.bench, language.adapters(language.related)),
    "digits": (digits.bench, digits.adapters),
}


RANKED = ("language", "digits")
"""Sets on which all methods are ranked: one of each kind of model and data."""


def measure(name: str, seeds: int, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What one set's adapters and merges are worth, by training. known: entries of these trainings
    whose figures stand."""
    make_bench, make_adapters = SETS[name]
    bench = make_bench(DATA)
    entries = []
    for seed in range(seeds):
        adapters = make_adapters(DATA, seed)
        started = time.perf_counter()
        training = Training.measure(bench, adapters)
        before = known[seed] if seed < len(known) else {"curves": {}, "rules": {}}
        curves, rules = before["curves"], before["rules"]
        entry = {
            "adapters": [a.label for a in adapters],
            "gains": [b - o for b, o in zip(training.base, training.own)],
            "norms": training.norms,
            "likeness": training.likeness(),
            "curves": {
                c.name: curves.get(c.name) or curve(training, c)
                for c in (*CANDIDATES, *(METHODS if name in RANKED else ()))
            },
            "rules": {rule: rules.get(rule) or _by_rule(training, rule) for rule in RULES},
        }
        entries.append(entry)
        print(f"{name}, training {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    return entries


def _by_rule(training: Training, rule: str) -> float:
    deltas = scaled_by_rule(RULES[rule], [a.path for a in training.adapters])
    shares = training.shares(deltas, 1.0)
    return sum(shares) / len(shares)


def known() -> dict[str, Any]:
    """What was measured before: sets that are not measured now keep their figures."""
    path = RESULTS / "quality.json"
    return json.loads(path.read_text())["sets"] if path.exists() else {}


def publish(found: dict[str, Any]) -> None:
    """Keep the figures, with the tables and the plot of them."""
    found = {name: found[name] for name in SETS if name in found}
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"scales": SCALES, "torch": torch.__version__, "sets": found}
    (RESULTS / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    ranking = tables.ranking({name: found[name] for name in RANKED if name in found})
    (RESULTS / "README.md").write_text(tables.page(found, ranking))
    METHODS_PAGE.write_text(fill(METHODS_PAGE.read_text(), {"quality": ranking}))
    tables.plot(found, RESULTS / "share.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--missing", action="store_true", help="keep the figures that are there")
    parser.add_argument("--tables", action="store_true", help="of the figures that are there")
    args = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    found = known()
    for name in () if args.tables else args.sets:
        found[name] = measure(name, args.seeds, found.get(name, []) if args.missing else [])
        publish(found)
    publish(found)
    print((RESULTS / "README.md").read_text())


if __name__ == "__main__":
    main()
