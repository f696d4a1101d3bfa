"""How much of every adapter's gain a merge keeps: trains what is missing, scores, writes the page.

    python benchmarks/quality/run.py             # one training of every set
    python benchmarks/quality/run.py --full      # all trainings
    python benchmarks/quality/run.py --kept      # figures of what was run before
    python benchmarks/quality/run.py --tables    # the page of the figures that are there

Models and what they put out are kept under benchmarks/data/quality, and nothing is done twice;
figures go to benchmarks/results/quality.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))

import decoder  # noqa: E402
import measure  # noqa: E402
import picture  # noqa: E402
import score  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402
from bench import Adapter, Bench  # noqa: E402
from merges import CORE, DEFAULT, DO, Candidate  # noqa: E402
from pages import fill  # noqa: E402
from sets import DATA, SETS, Set  # noqa: E402
from transformers.utils import logging  # noqa: E402

RESULTS = HERE / "results" / "quality"
FIGURES = RESULTS / "quality.json"
PICTURES = [RESULTS / f"kept-{theme}.svg" for theme in picture.THEMES]
MEASURED, TRAINING, DEFAULTS = DATA / "measured", "training.pt", "defaults"
METHODS_PAGE, ALGORITHM_PAGE, CHOOSING_PAGE = (
    HERE.parent / "docs" / f"{x}.md" for x in ("methods", "algorithm", "choosing")
)
README = HERE.parent / "README.md"


def run(name: str, chosen: Set, full: bool) -> None:
    """Train what is missing of a set, and keep what its merges put out."""
    for seed in chosen.seeds if full else chosen.seeds[:1]:
        bench, adapters = chosen.bench(seed), chosen.adapters(seed)
        _run(bench, adapters, CORE, MEASURED / name / str(seed))
        if seed == chosen.seeds[0]:
            _run(bench, adapters, chosen.first, MEASURED / name / str(seed))
            for few in chosen.few:
                _run(bench, adapters[:few], CORE, MEASURED / name / f"{seed}, T = {few}")


def _run(
    bench: Bench, adapters: list[Adapter], candidates: Sequence[Candidate], folder: Path
) -> None:
    known = measure.keep(folder / TRAINING, lambda: measure.training(bench, adapters))
    for candidate in (DEFAULT, *candidates):
        started = time.perf_counter()
        name = f"{candidate.name}.pt"
        merge = None
        if candidate is not DEFAULT:
            made = functools.partial(measure.merge, bench, adapters, candidate, known)
            merge = measure.keep(folder / name, made)
        made = functools.partial(measure.default, bench, adapters, candidate, known, merge)
        measure.keep(folder / DEFAULTS / name, made)
        shown = (folder / name).relative_to(MEASURED)
        print(f"{shown}: {time.perf_counter() - started:.0f} s", flush=True)


def figures(name: str) -> dict[str, Any]:
    """Of all trainings of a set that are kept."""
    folders = sorted(path.parent for path in MEASURED.glob(f"{name}/*/{TRAINING}"))
    return {x.name: _of(x) for x in folders}


def _of(folder: Path) -> dict[str, Any]:
    known = torch.load(folder / TRAINING)
    merges = {p.stem: torch.load(p) for p in sorted(folder.glob("*.pt")) if p.name != TRAINING}
    do = merges[DO.name]
    defaults = {p.stem: torch.load(p) for p in sorted((folder / DEFAULTS).glob("*.pt"))}
    return {
        **{key: known[key] for key in ("adapters", "norms", "relative", "likeness")},
        "gains": score.gains(known, known["base"], score.TEST)[1].tolist(),
        "merges": {key: score.summary(known, merge, do) for key, merge in merges.items()},
        "defaults": {
            key: {
                "scale": found["scale"],
                **score.kept(known, found["outputs"]),
                "notes": found["notes"],
            }
            for key, found in defaults.items()
        },
    }


def publish(result: dict[str, Any]) -> None:
    """Keep the figures, with the tables and the plot of them."""
    result["sets"] = {name: result["sets"][name] for name in SETS if name in result["sets"]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(rounded(result)) + "\n")
    (RESULTS / "README.md").write_text(tables.page(result))
    for page, made in ((METHODS_PAGE, tables.ranking), (ALGORITHM_PAGE, tables.parts_of_do)):
        page.write_text(fill(page.read_text(), {"quality": made(result)}))
    README.write_text(fill(README.read_text(), {"quality": tables.headline(result)}))
    CHOOSING_PAGE.write_text(fill(CHOOSING_PAGE.read_text(), {"kept": tables.kept(result)}))
    tables.plot(result["sets"], RESULTS / "share.png")
    picture.draw(*tables.pictured(result), dict(zip(picture.THEMES, PICTURES)))


def rounded(figures: Any) -> Any:
    """The same with five digits of every number."""
    return json.loads(json.dumps(figures), parse_float=lambda x: float(f"{float(x):.5g}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all trainings, not the first alone")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="all that are quick")
    parser.add_argument("--kept", action="store_true", help="of what was run before, no more")
    parser.add_argument("--tables", action="store_true", help="of the figures that are there")
    args = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    result = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"sets": {}}
    wanted = args.sets or [name for name in SETS if SETS[name].quick or args.full or args.kept]
    for name in () if args.tables else wanted:
        if not args.kept:
            run(name, SETS[name], args.full)
        if found := figures(name):
            result["sets"][name] = found
            result |= {"python": platform.python_version(), "torch": torch.__version__}
            result["other texts"] = tasks.changed(DATA) + decoder.changed(DATA)
    publish(result)


if __name__ == "__main__":
    main()
