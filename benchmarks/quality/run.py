"""How much of every adapter's gain a merge keeps: trains what is missing, scores, writes the page.

    python benchmarks/quality/run.py             # one training of every set
    python benchmarks/quality/run.py --full      # all trainings
    python benchmarks/quality/run.py --tables    # the page of what was measured before

Models and what they put out are kept under benchmarks/data/quality, and nothing is done twice;
figures go to benchmarks/results/quality.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))

import decoder  # noqa: E402
import measure  # noqa: E402
import score  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402
from bench import Adapter, Bench  # noqa: E402
from merges import CORE, DO, Candidate  # noqa: E402
from pages import fill  # noqa: E402
from sets import DATA, SETS, Set  # noqa: E402
from transformers.utils import logging  # noqa: E402

RESULTS = HERE / "results" / "quality"
FIGURES = RESULTS / "quality.json"
METHODS_PAGE = HERE.parent / "docs" / "methods.md"


def trainings(name: str, chosen: Set, seeds: int) -> dict[str, Any]:
    """Figures of a set by training, and of the first ones of its adapters."""
    found = {}
    for seed in chosen.seeds[:seeds]:
        bench, adapters = chosen.bench(seed), chosen.adapters(seed)
        first = seed == chosen.seeds[0]
        folder = DATA / "measured" / name / str(seed)
        found[str(seed)] = one(bench, adapters, CORE + tuple(chosen.first if first else ()), folder)
        for few in chosen.few if first else ():
            key = f"{seed}, T = {few}"
            found[key] = one(bench, adapters[:few], CORE, folder.with_name(key))
    return found


def one(
    bench: Bench, adapters: list[Adapter], candidates: tuple[Candidate, ...], folder: Path
) -> dict[str, Any]:
    """Figures of one training."""
    known = measure.keep(folder / "training.pt", lambda: measure.training(bench, adapters))
    merges = {}
    for candidate in candidates:
        started = time.perf_counter()
        path = folder / f"{candidate.name}.pt"
        merges[candidate.name] = measure.keep(
            path, lambda c=candidate: measure.merge(bench, adapters, c, known)
        )
        print(f"{path.relative_to(DATA)}: {time.perf_counter() - started:.0f} s", flush=True)
    do = merges[DO.name]
    return {
        "adapters": known["adapters"],
        "gains": score.gains(known, known["base"], score.TEST)[1].tolist(),
        "norms": known["norms"],
        "relative": known["relative"],
        "likeness": known["likeness"],
        "merges": {name: score.summary(known, merge, do) for name, merge in merges.items()},
    }


def publish(result: dict[str, Any]) -> None:
    """Keep the figures, with the tables and the plot of them."""
    result["sets"] = {name: result["sets"][name] for name in SETS if name in result["sets"]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(rounded(result)) + "\n")
    (RESULTS / "README.md").write_text(tables.page(result))
    METHODS_PAGE.write_text(fill(METHODS_PAGE.read_text(), {"quality": tables.ranking(result)}))
    tables.plot(result["sets"], RESULTS / "share.png")


def rounded(figures: Any) -> Any:
    """The same with five digits of every number."""
    return json.loads(json.dumps(figures), parse_float=lambda x: float(f"{float(x):.5g}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all trainings, not the first alone")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--tables", action="store_true", help="of the figures that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    result = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"sets": {}}
    for name in () if args.tables else args.sets:
        found = trainings(name, SETS[name], None if args.full else 1)
        result["sets"][name] = {**result["sets"].get(name, {}), **found}
        result |= {"python": platform.python_version(), "torch": torch.__version__}
        result["other texts"] = tasks.changed(DATA) + decoder.changed(DATA)
        publish(result)
    publish(result)


if __name__ == "__main__":
    main()
