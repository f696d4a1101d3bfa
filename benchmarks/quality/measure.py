"""Runs models: what base, adapters and merges put out on held-out examples, kept in files.

A merge is run at a few λ around its peak on the validation examples; score.py interpolates between
them, and tries every rule for λ on what is kept, without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import score
import torch
from bench import Adapter, Bench, Deltas
from merges import Candidate
from torch import Tensor

import domerge_fast as dm

START = 0.7
"""The first λ brings the merge to this mean projection on the adapters."""
STEP = 1.5
"""From one λ to the next."""


def keep(path: Path, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in the file, made first where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(made(), partial)
        partial.rename(path)
    return torch.load(path)


def training(bench: Bench, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """base: outputs by task. own: of each adapter on its own task. labels, validation: as in
    Bench. schatten: [adapters, modules, len(score.POWERS)], 0 where an adapter lacks the module.
    norms, relative: ||τ_i||, and over that of the weights it is added to. likeness: means over
    pairs."""
    tasks = [a.task for a in adapters]
    updates = [_update(a.path) for a in adapters]
    names = sorted(set().union(*updates))
    state = bench.model.state_dict()
    weights = {name: float(state[f"{name}.weight"].norm()) ** 2 for name in names}
    norms = [_norm(update) for update in updates]
    found = dm.inspect([a.path for a in adapters])
    return {
        "adapters": [a.label for a in adapters],
        "tasks": tasks,
        "labels": {task: bench.labels[task] for task in set(tasks) & set(bench.labels)},
        "validation": bench.validation,
        "base": bench.outputs({}, 1.0, tasks),
        "own": [bench.outputs(u, 1.0, [a.task])[a.task] for u, a in zip(updates, adapters)],
        "modules": names,
        "schatten": torch.stack([_schatten(update, names) for update in updates]),
        "norms": norms,
        "relative": [x / math.sqrt(sum(weights[n] for n in u)) for x, u in zip(norms, updates)],
        "likeness": {
            key: _off_diagonal(torch.tensor(getattr(found, key)))
            for key in ("cosine", "rows", "columns")
        },
    }


def merge(
    bench: Bench, adapters: Sequence[Adapter], candidate: Candidate, known: dict[str, Any]
) -> dict[str, Any]:
    """scales: λ that were run around the peak, in order, 0 first. outputs: of each, by task.
    beyond: λ of rules that are larger, with outputs. schatten: of the merge at λ = 1
    [modules, len(score.POWERS)]. projections: <M, τ_i> [adapters]. known: the training."""
    deltas = candidate.deltas([a.path for a in adapters])
    norms = torch.tensor(known["norms"], dtype=torch.float64)
    projections = torch.tensor([_dot(deltas, _update(a.path)) for a in adapters]).double()
    first = START / float((projections / norms.square()).mean())
    outputs = {0.0: known["base"]}

    def share(scale: float) -> float:
        if scale not in outputs:
            outputs[scale] = bench.outputs(deltas, scale, known["tasks"])
        return score.shares(known, outputs[scale], score.VALIDATION).mean().item()

    _climb(share, first)
    found = {
        "scales": sorted(outputs),
        "outputs": [outputs[scale] for scale in sorted(outputs)],
        "schatten": _schatten(deltas, known["modules"]),
        "projections": projections,
    }
    larger = [x for x in score.published(known, found).values() if x > found["scales"][-1]]
    return {**found, "beyond": {x: bench.outputs(deltas, x, known["tasks"]) for x in larger}}


def default(
    bench: Bench,
    adapters: Sequence[Adapter],
    candidate: Candidate,
    known: dict[str, Any],
    merge: dict[str, Any] | None,
) -> dict[str, Any]:
    """scale: λ where a user gives none. outputs: at that λ, by the curve of the merge where there
    is one that reaches it, and the norm is not that from before a cut. notes: of the report."""
    scale, deltas, notes = candidate.default([a.path for a in adapters])
    if merge and not candidate.cut and scale <= merge["scales"][-1]:
        outputs = score.at(merge, scale)
    else:
        outputs = bench.outputs(deltas, 1.0, known["tasks"])
    return {"scale": scale, "outputs": outputs, "notes": notes}


def _climb(share: Callable[[float], float], first: float) -> None:
    """Tries λ one STEP apart until the best has a worse one on either side."""
    best, low, high = 0, -1, 1
    while True:
        best = max(range(low, high + 1), key=lambda k: share(first * STEP**k))
        if low < best < high:
            return
        low, high = min(low, best - 1), max(high, best + 1)


def _update(path: Path) -> Deltas:
    return Candidate("", "linear").deltas([path])


def _schatten(deltas: Deltas, names: Sequence[str]) -> Tensor:
    """Schatten norms [modules, len(score.POWERS)], from the eigenvalues of the smaller Gram."""
    rows = torch.zeros(len(names), len(score.POWERS), dtype=torch.float64)
    for row, name in zip(rows, names):
        if name in deltas:
            x = deltas[name].double()
            gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
            values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
            row.copy_(torch.stack([values.norm(q) for q in score.POWERS]))
    return rows


def _norm(deltas: Deltas) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in deltas.values()))


def _dot(x: Deltas, y: Deltas) -> float:
    return sum(float((x[name] * y[name]).sum()) for name in y)


def _off_diagonal(table: Tensor) -> float:
    return float((table.sum() - table.trace()) / (table.numel() - len(table)))
