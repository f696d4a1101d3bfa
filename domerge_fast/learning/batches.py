"""Batches of tasks, and what a model puts out on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .losses import Measure

__all__ = ["Batches", "Clock", "Data", "Heads", "Runner", "by_task", "endless", "first"]

Batches = Iterable[Any]
"""Batches that can be gone through again: a list, a DataLoader. A batch is what the model is called
with: keyword arguments by name, one tensor, or a pair (either of these, labels)."""

Data = Mapping[str, Batches]
Heads = Mapping[str, Callable[[Any], Any]]
"""By task, what makes logits of what the model returns."""


def by_task(data: Data | Batches) -> Data:
    """The batches by task; those of one task alone are called "data". OptionError for none, and for
    those that can be gone through only once."""
    found = data if isinstance(data, Mapping) else {"data": data}
    if not found:
        raise OptionError("data", "has no tasks", "give batches for each, by its name")
    for task, batches in found.items():
        if isinstance(batches, (str, bytes, Tensor)) or not isinstance(batches, Iterable):
            problem = f"{task!r} has no batches, but a {type(batches).__name__}"
            raise OptionError("data", problem, "give a list of batches, or a DataLoader")
        if iter(batches) is batches:
            problem = f"the batches of {task!r} can be gone through only once"
            raise OptionError("data", problem, "put them in a list")
        if next(iter(batches), None) is None:
            raise OptionError("data", f"{task!r} has no batches", "give at least one")
    return found


def endless(batches: Batches, seed: int) -> Iterator[Any]:
    """The batches round after round; a list is brought into another order in each."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if isinstance(batches, Sequence):
            order = torch.randperm(len(batches), generator=generator).tolist()
            yield from (batches[k] for k in order)
        else:
            yield from batches


def first(batches: Batches, most: int | None) -> Iterator[Any]:
    """The first so many batches, or all."""
    for k, batch in enumerate(batches):
        if most is not None and k >= most:
            return
        yield batch


class Runner:
    """Losses of a model as it is now. ran: on how many batches, so far."""

    def __init__(self, model: torch.nn.Module, measure: Measure, heads: Heads | None) -> None:
        self._model, self._measure, self._heads = model, measure, heads or {}
        self._device = next(iter(model.parameters())).device
        self.ran = 0

    def loss(self, task: str, batch: Any) -> Tensor:
        """Of one batch, in one number. OptionError where it is not finite."""
        self.ran += 1
        batch = _on(batch, self._device)
        outputs = _called(self._model, batch)
        if task in self._heads:
            outputs = self._heads[task](outputs)
        found = self._measure(outputs, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise OptionError("loss", "is not one number", "return the mean over the batch")
        if not bool(torch.isfinite(found.detach())):
            problem = f"is {float(found.detach())} on {task!r}"
            raise OptionError("loss", problem, "see whether the model's outputs are finite")
        return found.reshape(())

    @torch.no_grad()
    def mean(self, data: Data, most: int | None = None) -> dict[str, float]:
        """By task, the mean over its batches."""
        found = {}
        for task, batches in data.items():
            losses = [float(self.loss(task, batch)) for batch in first(batches, most)]
            found[task] = sum(losses) / len(losses)
        return found


def _called(model: torch.nn.Module, batch: Any) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
    if isinstance(inputs, Mapping):
        return model(**{name: x for name, x in inputs.items() if name != "labels"})
    if isinstance(inputs, Tensor):
        return model(inputs)
    problem = f"a batch is a {type(inputs).__name__}"
    raise OptionError("data", problem, "give keyword arguments by name, or a tensor")


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on(x, device) for name, x in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_on(x, device) for x in batch]
    return batch


class Clock:
    """Tells how far something is, and how long it may still take, in seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()

    @property
    def passed(self) -> float:
        return time.monotonic() - self._started

    def left(self, done: int) -> float:
        return self.passed / max(1, done) * (self._total - done)
