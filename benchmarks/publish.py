"""Puts what lies under results/cpu into the tables of README.md and the plots beside it.

python benchmarks/publish.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plots
import tables
from pages import fill

from domerge_fast.bench.workloads import WORKLOADS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cpu"
OTHERS = ("scaling", "orthogonalize", "methods")
PAGES = (HERE / "README.md", HERE.parent / "README.md")

Results = Mapping[str, Mapping[str, Any]]


def keep(name: str, result: Mapping[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def load() -> Results:
    """All results that are kept, workloads in their usual order."""
    names = [*WORKLOADS, *OTHERS]
    paths = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}


def sections(results: Results) -> dict[str, str]:
    """The generated text of every pair of markers."""
    compared = {name: r for name, r in results.items() if name in WORKLOADS}
    parts = [
        f"### {name}: {WORKLOADS[name].why}\n\n{tables.one(name, compared[name])}"
        for name in compared
    ]
    found = {"workloads": "\n\n".join(parts), "stages": tables.stages(compared)}
    for name in OTHERS:
        if name in results:
            found[name] = tables.one(name, results[name])
    if tables.HEADLINE in results:
        found["headline"] = tables.headline(results[tables.HEADLINE])
    return found


def main() -> None:
    results = load()
    texts = sections(results)
    for page in PAGES:
        page.write_text(fill(page.read_text(), texts))
    plots.draw(results, RESULTS)


if __name__ == "__main__":
    main()
