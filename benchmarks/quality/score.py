"""The share of each adapter's own gain that a merge keeps, over a grid of scales.

    share_i = (base_i - merge_i) / (base_i - own_i)

where base_i, merge_i and own_i are the losses of the base, the merge and adapter i on held-out
examples of adapter i's own task. 1 is as good as the adapter itself, 0 no better than the base,
below 0 worse. A merge's score is the mean over its adapters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from merges import Adapter, Candidate, Deltas
from torch import Tensor

import domerge_fast as dm

SCALES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


class Bench:
    """A base model, and held-out examples of every task with what the loss on them is."""

    def __init__(
        self,
        model: torch.nn.Module,
        held: Mapping[str, Any],
        loss: Callable[[torch.nn.Module, Any], Tensor],
    ) -> None:
        self.model, self.held, self.loss = model.eval(), held, loss
        self.weights = {k: v.clone() for k, v in model.state_dict().items()}

    @torch.inference_mode()
    def losses(self, deltas: Deltas, scale: float, tasks: Sequence[str]) -> list[float]:
        """Losses on held-out examples of the tasks, with scale ΔW added to the base."""
        state = self.model.state_dict()
        for name, delta in deltas.items():
            state[f"{name}.weight"].copy_(self.weights[f"{name}.weight"] + scale * delta)
        found = {task: float(self.loss(self.model, self.held[task])) for task in set(tasks)}
        for name in deltas:
            state[f"{name}.weight"].copy_(self.weights[f"{name}.weight"])
        return [found[task] for task in tasks]


@dataclass(frozen=True)
class Training:
    """What the adapters of one training are worth on their own."""

    bench: Bench
    adapters: Sequence[Adapter]
    base: list[float]
    own: list[float]
    norms: list[float]

    @classmethod
    def measure(cls, bench: Bench, adapters: Sequence[Adapter]) -> Training:
        own, norms = [], []
        for adapter in adapters:
            alone = Candidate("", "linear").deltas([adapter.path])
            own += bench.losses(alone, 1.0, [adapter.task])
            norms.append(norm(alone))
        base = bench.losses({}, 1.0, [a.task for a in adapters])
        return cls(bench, adapters, base, own, norms)

    def shares(self, deltas: Deltas, scale: float) -> list[float]:
        losses = self.bench.losses(deltas, scale, [a.task for a in self.adapters])
        return [(b - m) / (b - o) for b, m, o in zip(self.base, losses, self.own)]

    def likeness(self) -> dict[str, float]:
        """How alike the adapters are: means over pairs, and the largest norm by the smallest."""
        found = dm.inspect([a.path for a in self.adapters])
        return {
            "cosine": _off_diagonal(found.cosine),
            "rows": _off_diagonal(found.rows),
            "columns": _off_diagonal(found.columns),
            "unevenness": max(found.norms) / min(found.norms),
        }


def norm(deltas: Deltas) -> float:
    return sum(float(d.square().sum()) for d in deltas.values()) ** 0.5


def _off_diagonal(table: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(x for i, row in enumerate(table) for j, x in enumerate(row) if i != j)


def curve(training: Training, candidate: Candidate) -> dict[str, Any]:
    """The shares kept at the scales tried, and the norm in units of the adapters' mean norm.

    From scale 1 the grid is walked down, or else up, for as long as the mean share rises.
    """
    deltas = candidate.deltas([a.path for a in training.adapters])
    shares: dict[int, list[float]] = {}

    def mean(k: int) -> float:
        if k not in shares:
            shares[k] = training.shares(deltas, SCALES[k])
        return statistics.fmean(shares[k])

    one = SCALES.index(1.0)
    best = _climb(mean, one)
    return {
        "relative_norm": norm(deltas) / statistics.fmean(training.norms),
        "mean_share": {str(SCALES[k]): mean(k) for k in sorted(shares)},
        "best_scale": SCALES[best],
        "best": mean(best),
        "best_per_adapter": shares[best],
        "at_scale_1": mean(one),
    }


def _climb(mean: Callable[[int], float], start: int) -> int:
    """The scale of the peak next to the start."""
    best = start
    for step in (-1, 1):
        while 0 <= best + step < len(SCALES) and mean(best + step) > mean(best):
            best += step
    return best
