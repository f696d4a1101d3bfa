"""Searched merges beside those of learned.py: which strategy, which groups, and what few examples
save, at the same number of forward passes; runs, scores and writes the page.

    python benchmarks/quality/searched.py            # what is missing, then the page
    python benchmarks/quality/searched.py --kept     # the page of what was run before

What is kept is beside that of learned.py, on the same trainings, one after the other; figures go to
benchmarks/results/quality/searched.json and searched.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE))

import learned  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402
from with_data import ROWS, Found, Given, Row  # noqa: E402

import domerge_fast as dm  # noqa: E402

FIGURES, PAGE = (learned.RESULTS / f"searched.{x}" for x in ("json", "md"))
PASSES = 24
"""Times all examples: what every search is planned for."""


class Examples:
    """Less the mean cross-entropy over tasks; a budget is so many batches of each task, or a range
    of them, in an order that is drawn once."""

    def __init__(self, given: Given) -> None:
        self._given, self.batches = given, 0
        self._order = {task: list(x) for task, x in given.batches.items()}
        for batches in self._order.values():
            random.Random(0).shuffle(batches)
        self.most = min(map(len, self._order.values()))

    @torch.no_grad()
    def __call__(self, model: Any, budget: int | range) -> dict[str, Any]:
        chosen = range(budget) if isinstance(budget, int) else budget
        return {"tasks": {task: -self._loss(model, task, chosen) for task in self._order}}

    def _loss(self, model: Any, task: str, chosen: range) -> float:
        losses, count = 0.0, 0
        for k in chosen:
            batch = self._order[task][k]
            logits = self._given.heads[task](model(input_ids=batch["input_ids"]))
            losses += float(
                torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
            )
            count += len(batch["labels"])
            self.batches += 1
        return losses / count


def searched(
    given: Given,
    methods: Mapping[str, Mapping[str, Any]],
    strategy: str,
    space: dm.Space,
    few: int | None = None,
) -> Found:
    """few: batches of each task at first, None for all; there are so many more candidates then."""
    several = {
        name: dm.prepare(given.adapters, name, scale="auto", **options)
        for name, options in methods.items()
    }
    evaluator = Examples(given)
    fidelity = evaluator.most if few is None else (few, evaluator.most)
    begun = 1.0 if few is None else few / evaluator.most
    share = 0.9 * begun + 0.1 if strategy == "ppo" else begun + (begun < 1) / dm.Budget.eta
    budget = dm.Budget(round(PASSES / share), fidelity=fidelity)
    found = dm.search(several, evaluator, space, budget, strategy, live=given.model, seed=0)
    prepared, kappa = found.merge
    merged = prepared.merge(kappa)
    deltas = {name: merged.delta(name) for name in prepared.modules}
    return Found(deltas, evaluator.batches, found.coefficients)


TSVM: dict[str, Mapping[str, Any]] = {"tsvm": {}}
SEVERAL: dict[str, Mapping[str, Any]] = {"tsvm": {}, "linear": {}, "do": {}, "iso_c": {}}
WITH_DENSITY: dict[str, Mapping[str, Any]] = {**SEVERAL, "core": {"inner": "ties"}}
TIES: dict[str, Mapping[str, Any]] = {"core": {"inner": "ties"}}
PICKED: dict[str, Mapping[str, Any]] = {"linear": {}, "tsvm": {}}
NEAR = {"weight": (0.6, 1.4), "scale": (0.5, 2.0)}
TASK, LAYER = dm.Space(**NEAR), dm.Space(groups="layer", **NEAR)
DENSE = dm.Space(groups="layer", density=(0.05, 0.8), **NEAR)
PICKS = dm.Space(groups="layer", pick=True)


def _row(name: str, *given: Any, **more: Any) -> Row:
    return Row(f"{name}, searched", "labels", partial(_search, given, more))


def _search(given: tuple[Any, ...], more: dict[str, Any], of: Given) -> Found:
    return searched(of, *given, **more)


OWN = (
    _row("tsvm by task, TPE halved", TSVM, "tpe", TASK, few=1),
    _row("tsvm by layer, TPE halved", TSVM, "tpe", LAYER, few=1),
    _row("picks by layer, TPE halved", PICKED, "tpe", PICKS, few=1),
    _row("picks by layer, PPO on subsets (RMM)", PICKED, "ppo", PICKS, few=1),
    _row("tsvm by task, CMA-ES", TSVM, "cma", TASK),
    _row("picks by layer, PPO", PICKED, "ppo", PICKS),
    _row("four methods by layer (LFS), TPE halved", SEVERAL, "tpe", LAYER, few=1),
    _row("tsvm by layer, CMA-ES", TSVM, "cma", LAYER),
    _row("tsvm by task, TPE", TSVM, "tpe", TASK),
    _row("tsvm by task, random", TSVM, "random", TASK),
    _row("ties in core, with densities by layer, TPE halved", TIES, "tpe", DENSE, few=1),
    _row("five methods, with densities by layer (LFS), TPE halved", WITH_DENSITY, "tpe", DENSE, 1),
)
BESIDE = (
    *("default", "tsvm", "tsvm, tune", "tsvm, adamerge by layer"),
    *("linear, TARA (B)", "default, osrm_project", "tsvm, osrm_project off 0.5"),
)
"""Rows of learned.py that stand beside them; the first is what differences are from."""


def with_earlier(found: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """With the figures of before of those rows that nothing is kept of here, where they are of the
    same adapters: the default kept the same share, to the digits that are written."""
    earlier = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    first = BESIDE[0]
    shares = [x[first]["shares"] for x in (earlier, found) if first in x]
    if len(shares) < 2 or shares[0] != shares[1]:
        return found
    return {n: x for n, x in earlier.items() if n in names} | found


def page(found: dict[str, Any]) -> str:
    lines = [INTRODUCTION, *learned.table(found)]
    if left := [f"`{row.name}`" for row in OWN if row.name not in found]:
        lines += ["", f"Not run yet: {'; '.join(left)}."]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Searched merges

As in [learned.md](learned.md), whose columns these are: ten adapters of a pretrained sentence
encoder of three layers; the 64 labelled examples a task that choose λ elsewhere are what is
searched on (less the mean cross-entropy over tasks), 256 others a task are what is scored. Every
search is planned for the forward passes of 24 evaluations on all examples, those that begin with
few for more candidates; "batches" says how many it took. "by layer": coefficients of their own
for each layer; picks: every layer picks one adapter, a merge, or nothing. One seed of the search a
training: what lies within each other's intervals is not told apart. TARA's variant B learns one
coefficient for every adapter and joint left singular vector; `osrm_project` takes out of each
adapter the directions that hold 0.9 (or 0.5) of the energy of the other tasks' inputs. Made by
`benchmarks/quality/searched.py`; no figure is typed.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", action="store_true", help="of what was run before, no more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    beside = {row.name: row for row in ROWS}
    rows = (*(beside[name] for name in BESIDE), *OWN)
    if not args.kept:
        for name, seed in learned.TRAININGS:
            learned.run(name, seed, rows)
    first, seed = learned.TRAININGS[0]
    folder = learned.KEPT / first / str(seed)
    found = learned.figures(tuple(row for row in rows if (folder / f"{row.name}.pt").exists()))
    rounded = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.5g}"))
    rounded = with_earlier(rounded, [row.name for row in rows])
    FIGURES.write_text(json.dumps(rounded) + "\n")
    PAGE.write_text(page(rounded))


if __name__ == "__main__":
    main()
