"""The share of each adapter's own gain that a merge keeps, over a grid of scales.

    share_i = (base_i - merge_i) / (base_i - own_i)

where base_i, merge_i and own_i are the losses of the base, the merge and adapter i on held-out
examples of adapter i's own task. 1 is as good as the adapter itself, 0 no better than the base,
below 0 worse. A merge's score is the mean over its adapters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import domerge_fast as dm

SCALES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
Deltas = Mapping[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A method with its options; `mean` divides the weights by their number."""

    name: str
    method: str = "do"
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: bool = False

    def deltas(self, adapters: Sequence[Path]) -> Deltas:
        """ΔW of every module in float32, at scale 1."""
        weights = [1 / len(adapters)] * len(adapters) if self.mean else None
        merged = dm.merge(adapters, self.method, weights=weights, dtype="float32", **self.options)
        return {name: merged.delta(name) for name in merged.names}


CANDIDATES = (
    Candidate("mean", "linear", mean=True),
    Candidate("orthogonalize", options={"decouple": False}),
    Candidate("decouple", options={"orthogonalize": False}),
    Candidate("decouple, renormalize", options={"orthogonalize": False, "renormalize": True}),
    Candidate("do"),
    Candidate("do, frobenius", options={"penalty": "frobenius"}),
    Candidate("do, gamma 0.1", options={"gamma": 0.1}),
    Candidate("do, gamma 10", options={"gamma": 10.0}),
    Candidate("do, A only", options={"sides": "A"}),
    Candidate("do, B only", options={"sides": "B"}),
    Candidate("do, renormalize", options={"renormalize": True}),
    Candidate("do, 1 step", options={"steps": 1}),
    Candidate("do, 3 steps", options={"steps": 3}),
)


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
        """Losses on held-out text with scale ΔW added to the base."""
        state = self.model.state_dict()
        for name, delta in deltas.items():
            state[f"{name}.weight"].copy_(self.weights[f"{name}.weight"] + scale * delta)
        found = [float(self.loss(self.model, self.held[task])) for task in tasks]
        for name in deltas:
            state[f"{name}.weight"].copy_(self.weights[f"{name}.weight"])
        return found


@dataclass(frozen=True)
class Training:
    """What the adapters of one training are worth on their own."""

    adapters: Mapping[str, Path]
    base: list[float]
    own: list[float]
    norms: list[float]

    @classmethod
    def measure(cls, bench: Bench, adapters: Mapping[str, Path]) -> Training:
        own, norms = [], []
        for task, path in adapters.items():
            alone = Candidate("", "linear").deltas([path])
            own += bench.losses(alone, 1.0, [task])
            norms.append(norm(alone))
        return cls(adapters, bench.losses({}, 1.0, list(adapters)), own, norms)

    def shares(self, losses: Sequence[float]) -> list[float]:
        return [(b - m) / (b - o) for b, m, o in zip(self.base, losses, self.own)]


def norm(deltas: Deltas) -> float:
    return sum(float(d.square().sum()) for d in deltas.values()) ** 0.5


def curve(bench: Bench, training: Training, candidate: Candidate) -> dict[str, Any]:
    """The shares kept at every scale, and the merge's norm in units of the adapters' mean norm."""
    deltas = candidate.deltas(list(training.adapters.values()))
    shares = [
        training.shares(bench.losses(deltas, scale, list(training.adapters))) for scale in SCALES
    ]
    means = [statistics.fmean(s) for s in shares]
    best = max(range(len(SCALES)), key=means.__getitem__)
    return {
        "relative_norm": norm(deltas) / statistics.fmean(training.norms),
        "mean_share": dict(zip(map(str, SCALES), means)),
        "best_scale": SCALES[best],
        "best": means[best],
        "best_per_adapter": dict(zip(training.adapters, shares[best])),
        "at_scale_1": means[SCALES.index(1.0)],
    }
