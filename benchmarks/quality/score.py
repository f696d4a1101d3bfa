"""Figures from what measure.py keeps: shares, λ chosen on validation examples or by a rule.

    share_i = (base_i - merge_i) / (base_i - own_i)

where base_i, merge_i and own_i are the losses of the base, the merge and adapter i on held-out
examples of adapter i's own task. 1 is as good as the adapter itself, 0 no better than the base,
below 0 worse. A merge's score is the mean over its adapters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from bench import Outputs
from scipy.interpolate import CubicSpline
from torch import Tensor

VALIDATION, TEST = "validation", "test"
DRAWS = 400
"""Bootstrap samples of the test examples."""
FINE = 60
"""λ tried between the first that was run and the last."""

POWERS = (2.0, 4.0, 6.0, 8.0, 16.0, math.inf)
"""q of the Schatten norms (Σ σ^q)^(1/q) that are kept."""

Training = dict[str, Any]
Merge = dict[str, Any]


def losses(training: Training, task: str, outputs: Tensor) -> Tensor:
    """In nats [examples], float64."""
    outputs = outputs.double()
    if task not in training["labels"]:
        return outputs
    labels = training["labels"][task]
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


def part(training: Training, which: str) -> slice:
    first = training["validation"]
    return slice(0, first) if which == VALIDATION else slice(first, None)


def gains(training: Training, outputs: Outputs, which: str) -> tuple[Tensor, Tensor]:
    """What the merge and what each adapter takes off the base's mean loss [adapters]."""
    rows = part(training, which)
    merge, alone = [], []
    for task, own in zip(training["tasks"], training["own"], strict=True):
        base = losses(training, task, training["base"][task])[rows].mean()
        merge.append(base - losses(training, task, outputs[task])[rows].mean())
        alone.append(base - losses(training, task, own)[rows].mean())
    return torch.stack(merge), torch.stack(alone)


def shares(training: Training, outputs: Outputs, which: str = TEST) -> Tensor:
    """[adapters]"""
    merge, alone = gains(training, outputs, which)
    return merge / alone


def at(merge: Merge, scale: float) -> Outputs:
    """Outputs at a λ: a cubic spline through those that were run around the peak, or one beyond."""
    if scale > merge["scales"][-1]:
        return merge["beyond"][scale]
    if "splines" not in merge:
        merge["splines"] = _splines(merge)
    return {task: torch.from_numpy(spline(scale)) for task, spline in merge["splines"].items()}


def _splines(merge: Merge) -> dict[str, CubicSpline]:
    return {
        task: CubicSpline(merge["scales"], np.stack([x[task].numpy() for x in merge["outputs"]]))
        for task in merge["outputs"][0]
    }


def mean_share(training: Training, merge: Merge, scale: float, which: str = TEST) -> float:
    return shares(training, at(merge, scale), which).mean().item()


def tuned(training: Training, merge: Merge) -> float:
    """λ that keeps most of the validation examples' gain; ValueError where it is at an end."""
    run = [scale for scale in merge["scales"] if scale]
    fine = np.geomspace(run[0] / 2, run[-1], FINE).tolist()
    best = max(fine, key=lambda scale: mean_share(training, merge, scale, VALIDATION))
    if best in (fine[0], fine[-1]):
        raise ValueError(f"the peak is not between the λ that were run: {run}")
    return best


def matched(training: Training, merge: Merge, q: float, mean: str, constant: float) -> float:
    """λ = constant Σ_modules mean_i ||τ_i||_Sq / Σ_modules ||M||_Sq, the mean over the adapters
    that have the module: their "mean", or "rms", the root of the mean square."""
    norms = training["schatten"][..., POWERS.index(q)]
    has = (norms > 0).sum(0)
    means = (norms.square().sum(0) / has).sqrt() if mean == "rms" else norms.sum(0) / has
    return constant * float(means.sum() / merge["schatten"][:, POWERS.index(q)].sum())


def published(training: Training, merge: Merge) -> dict[str, float]:
    """λ of the rules of which every merge has figures, whatever its curve reaches."""
    return {"λ = 1": 1.0, "0.6 S16": matched(training, merge, 16.0, "rms", 0.6)}


def summary(training: Training, merge: Merge, against: Merge) -> dict[str, Any]:
    """The figures of a merge at its tuned λ, its curve and the λ of the rules.

    against: another merge of the training, for the difference at the tuned λ of both. Intervals
    hold 90 % of the bootstrap samples of test examples, the same ones for all merges."""
    scale = tuned(training, merge)
    outputs = at(merge, scale)
    gain, own = gains(training, outputs, TEST)
    other = at(against, tuned(training, against))
    drawn = bootstrap(training, outputs)
    grid = [0.0, *np.geomspace(merge["scales"][1] / 4, merge["scales"][-1], 30).tolist()]
    grid += sorted(merge["beyond"])
    return {
        "scale": scale,
        "share": (gain / own).mean().item(),
        "interval": _interval(drawn),
        "difference": (gain / own).mean().item() - shares(training, other).mean().item(),
        "difference interval": _interval(drawn - bootstrap(training, other)),
        "pooled": (gain.sum() / own.sum()).item(),
        "accuracy": accuracy(training, outputs),
        "each": (gain / own).tolist(),
        "projection": scale * (merge["projections"] / _norms(training).square()).mean().item(),
        "curve": [grid, [mean_share(training, merge, x) for x in grid]],
        "matched": {
            f"S{q:g} {mean}": matched(training, merge, q, mean, 1.0)
            for q in POWERS
            for mean in ("mean", "rms")
        },
    }


def kept(training: Training, outputs: Outputs) -> dict[str, Any]:
    """The share of a merge as it is, and the interval of 90 % of the bootstrap samples."""
    share = shares(training, outputs).mean().item()
    return {"share": share, "interval": _interval(bootstrap(training, outputs))}


def _norms(training: Training) -> Tensor:
    return torch.tensor(training["norms"], dtype=torch.float64)


def _interval(drawn: Tensor) -> list[float]:
    return torch.quantile(drawn, torch.tensor([0.05, 0.95], dtype=drawn.dtype)).tolist()


def bootstrap(training: Training, outputs: Outputs) -> Tensor:
    """Mean shares [DRAWS], each over test examples of every task drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(DRAWS, dtype=torch.float64)
    rows = part(training, TEST)
    for task, own in zip(training["tasks"], training["own"], strict=True):
        base, merge, alone = (
            losses(training, task, x)[rows] for x in (training["base"][task], outputs[task], own)
        )
        drawn = torch.randint(len(base), (DRAWS, len(base)), generator=generator)
        total += (base - merge)[drawn].mean(1) / (base - alone)[drawn].mean(1)
    return total / len(training["tasks"])


def accuracy(training: Training, outputs: Outputs) -> float | None:
    """Mean over adapters of the accuracy over the adapter's own; None where there are no labels."""
    ratios = []
    for task, own in zip(training["tasks"], training["own"], strict=True):
        if task in training["labels"]:
            right = [
                (x.argmax(1) == training["labels"][task])[part(training, TEST)].double().mean()
                for x in (outputs[task], own)
            ]
            ratios.append(float(right[0] / right[1]))
    return sum(ratios) / len(ratios) if ratios else None
