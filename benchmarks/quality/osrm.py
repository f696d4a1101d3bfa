"""Whether it pays to train from where other tasks' inputs have little energy (OSRM), or to project
to there afterwards: adapters of eight tasks, what each gains alone, and what merges keep.

    python benchmarks/quality/osrm.py             # three trainings from every start, and the page
    python benchmarks/quality/osrm.py --tables    # the page of the figures that are there

What is trained and measured is kept under benchmarks/data/quality/osrm, and nothing is done twice.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))

import bases  # noqa: E402
import encoders  # noqa: E402
import measure  # noqa: E402
import osrm_page  # noqa: E402
import score  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402
from bench import Adapter, Bench, Outputs  # noqa: E402
from merges import DEFAULT, DO, Candidate  # noqa: E402
from pages import fill  # noqa: E402
from sets import DATA  # noqa: E402
from transformers.utils import logging  # noqa: E402

import domerge_fast as dm  # noqa: E402

KEPT = DATA / "osrm"
RESULTS = HERE / "results" / "osrm"
FIGURES = RESULTS / "osrm.json"
PAGE = HERE.parent / "docs" / "osrm.md"
TASKS = list(tasks.TASKS)[:8]
SEEDS = (0, 1, 2)
TEXTS = 512
"""Of a task, that directions are found from; all of them are training texts."""
RANK, ALPHA = 8, 16
"""Those of encoders.KINDS["even"]."""
MERGES = (DO, Candidate("tsvm", "tsvm"))


@dataclass(frozen=True)
class Start:
    """What adapters begin with: options of `osrm_init_all`, or None for PEFT's own values.
    projected: after training, off the directions that hold this share of the others' energy."""

    name: str
    options: dict[str, Any] | None = None
    projected: float | None = None


STARTS = (
    Start("PEFT's own"),
    Start("smallest", {"avoid": "smallest", "norm": "kaiming"}),
    Start("project", {"avoid": "project", "energy": 0.9, "norm": "kaiming"}),
    Start("means", {"statistic": "mean", "norm": "kaiming"}),
    Start("PEFT's own, projected off 0.5", projected=0.5),
    Start("PEFT's own, projected off 0.9", projected=0.9),
)
"""Rows of A have the length of PEFT's own in all, so that directions are all that differs."""


def started(base: str, start: Start, seed: int, folder: Path) -> Path | None:
    """The folder with the adapters to start from, made where it is not there."""
    if start.options is None:
        return None
    path = folder / "starts"
    if not path.exists():
        partial = path.with_suffix(".partial")
        batches = {task: encoders.texts(task, seed, DATA, TEXTS) for task in TASKS}
        made = dm.osrm_init_all(
            bases.load(base, DATA),
            batches,
            target_modules=encoders.ALL,
            rank=RANK,
            alpha=ALPHA,
            seed=seed,
            output=partial,
            overwrite=True,
            **start.options,
        )
        told = {task: [vars(m) for m in one.modules.values()] for task, one in made.items()}
        torch.save(told, folder / "starts.pt")
        partial.rename(path)
    return path


def trained(base: str, start: Start, seed: int) -> list[Adapter]:
    """The adapters, of which those that are missing are trained."""
    folder = KEPT / base / str(seed) / start.name
    folder.mkdir(parents=True, exist_ok=True)
    if start.projected is not None:
        return projected(base, start.projected, seed, folder)
    return encoders.adapters(
        encoders.KINDS["even"],
        base,
        seed,
        DATA,
        folder / "adapters",
        TASKS,
        started(base, start, seed, folder),
    )


def projected(base: str, energy: float, seed: int, folder: Path) -> list[Adapter]:
    """Those from PEFT's own start, projected off the others' inputs."""
    kept = folder / "projected.pt"
    told = torch.load(kept) if kept.exists() else {}
    for adapter in trained(base, STARTS[0], seed):
        path = folder / "adapters" / adapter.task
        if not path.exists():
            batches = {task: encoders.texts(task, seed, DATA, TEXTS) for task in TASKS}
            model, task = bases.load(base, DATA), adapter.task
            features = dm.osrm_features(model, batches, task=task, target_modules=encoders.ALL)
            made = dm.osrm_project(adapter.path, features, energy=energy, output=path)
            told[task] = [vars(module) for module in made.modules.values()]
            torch.save(told, kept)
    return [Adapter(task, task, folder / "adapters" / task) for task in TASKS]


def run(base: str, seed: int, starts: Sequence[Start]) -> None:
    """Train what is missing, and keep what its merges put out."""
    bench = encoders.bench(base, seed, DATA, TASKS)
    for start in starts:
        began = time.process_time()
        adapters = trained(base, start, seed)
        _merged(bench, adapters, KEPT / base / str(seed) / start.name / "measured")
        print(f"{base} {seed} {start.name}: {time.process_time() - began:.0f} CPU s", flush=True)


def _merged(bench: Bench, adapters: list[Adapter], folder: Path) -> None:
    known = measure.keep(folder / "training.pt", lambda: measure.training(bench, adapters))
    for candidate in (DEFAULT, *MERGES):
        merge = None
        if candidate is not DEFAULT:
            made: Callable[[], dict[str, Any]] = functools.partial(
                measure.merge, bench, adapters, candidate, known
            )
            merge = measure.keep(folder / f"{candidate.name}.pt", made)
        made = functools.partial(measure.default, bench, adapters, candidate, known, merge)
        measure.keep(folder / "defaults" / f"{candidate.name}.pt", made)


def figures(folder: Path) -> dict[str, Any]:
    """Of the adapters of one training from one start, and of their merges."""
    measured = folder / "measured"
    known = torch.load(measured / "training.pt")
    outputs = {"default": _default(measured, DEFAULT)}
    for candidate in MERGES:
        outputs[f"{candidate.name}, λ found"] = _default(measured, candidate)
        merge = torch.load(measured / f"{candidate.name}.pt")
        outputs[f"{candidate.name}, λ tuned"] = score.at(merge, score.tuned(known, merge))
    own = score.gains(known, known["base"], score.TEST)[1]
    starts, projections = folder / "starts.pt", folder / "projected.pt"
    kept = _means(torch.load(projections), ("kept",))["kept"] if projections.exists() else None
    return {
        "own": own.tolist(),
        "likeness": known["likeness"],
        "seen": _means(torch.load(starts), ("others", "own")) if starts.exists() else None,
        "kept": kept,
        "merges": {
            name: {
                "gain": score.gains(known, x, score.TEST)[0].tolist(),
                "share": score.shares(known, x).tolist(),
            }
            for name, x in outputs.items()
        },
    }


def _default(measured: Path, candidate: Candidate) -> Outputs:
    return torch.load(measured / "defaults" / f"{candidate.name}.pt")["outputs"]


def _means(told: dict[str, list[dict[str, Any]]], keys: Sequence[str]) -> dict[str, float | None]:
    """Over tasks and layers, of what `osrm_init` and `osrm_project` say of each."""
    modules = [module for one in told.values() for module in one]
    found = {key: [m[key] for m in modules if m[key] is not None] for key in keys}
    return {key: sum(x) / len(x) if x else None for key, x in found.items()}


def publish() -> None:
    """Keep the figures of all that is there, and write the page and the section of them."""
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for base, seed, start in itertools.product((bases.SMALL, bases.FULL), SEEDS, STARTS):
        folder = KEPT / base / str(seed) / start.name
        if (folder / "measured" / "defaults" / f"{MERGES[-1].name}.pt").exists():
            found.setdefault(base, {}).setdefault(str(seed), {})[start.name] = figures(folder)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    found = json.loads(text, parse_float=lambda x: float(f"{float(x):.5g}"))
    FIGURES.write_text(json.dumps(found) + "\n")
    (RESULTS / "README.md").write_text(osrm_page.page(found))
    PAGE.write_text(fill(PAGE.read_text(), {"osrm": osrm_page.section(found)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bases", nargs="+", default=[bases.SMALL], choices=(bases.SMALL, bases.FULL)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, choices=SEEDS)
    names = [start.name for start in STARTS]
    parser.add_argument("--starts", nargs="+", default=names, choices=names)
    parser.add_argument("--tables", action="store_true", help="of what is there, no more")
    args = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if not args.tables:
        for base, seed in itertools.product(args.bases, args.seeds):
            run(base, seed, [start for start in STARTS if start.name in args.starts])
    publish()


if __name__ == "__main__":
    main()
