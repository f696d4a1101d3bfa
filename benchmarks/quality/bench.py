"""What every set of adapters is to the benchmark: adapters with their tasks, and a base model with
held-out examples of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Deltas = Mapping[str, Tensor]
"""ΔW [m, n] of every module."""
Outputs = dict[str, Tensor]
"""Of every task: logits [examples, classes], or losses [examples]."""


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: what tables call it, the task it is scored on, and its PEFT folder."""

    label: str
    task: str
    path: Path


@dataclass(frozen=True)
class Bench:
    """A base model and its held-out examples.

    outputs_of: of the model as it is now on a task's examples: logits [examples, classes] where
        `labels` has the task, losses in nats [examples] otherwise. The examples that choose λ come
        first.
    labels: the classes of the examples [examples].
    validation: how many examples of each task choose λ; the others are tested on.
    """

    model: torch.nn.Module
    outputs_of: Callable[[torch.nn.Module, str], Tensor]
    labels: Mapping[str, Tensor]
    validation: int

    @torch.inference_mode()
    def outputs(self, deltas: Deltas, scale: float, tasks: Iterable[str]) -> Outputs:
        """On the tasks' examples, with scale ΔW added to the base."""
        weights = {name: self.model.get_parameter(f"{name}.weight") for name in deltas}
        before = {name: weight.clone() for name, weight in weights.items()}
        for name, delta in deltas.items():
            weights[name].add_(delta, alpha=scale)
        found = {task: self.outputs_of(self.model, task) for task in dict.fromkeys(tasks)}
        for name, weight in weights.items():
            weight.copy_(before[name])
        return found
