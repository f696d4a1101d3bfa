"""Sums over the tokens of each task, for every input that layers share: passes over the batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DomergeError, OptionError, is_text, some
from .inputs import Batch, Input, forward, masks_of, shared, tokens_of, watched
from .layers import Linear

__all__ = [
    "MEAN",
    "MOMENTS",
    "STATISTICS",
    "Sums",
    "checked",
    "energy_of",
    "inputs_of",
    "passes",
]

MOMENTS, MEAN = "moments", "mean"
STATISTICS = (MOMENTS, MEAN)
"""What is kept of an input x [n]: the sum of x xᵀ, or the sum of x."""

_LOG = logging.getLogger(__name__)


@dataclass
class Sums:
    """total: Σ x xᵀ [n, n], or Σ x [n], over so many tokens, in float32."""

    total: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, statistic: str) -> None:
        """x: [tokens, n]."""
        if self.total is None:
            n = x.shape[1]
            self.total = x.new_zeros(n, n) if statistic == MOMENTS else x.new_zeros(n)
        if statistic == MOMENTS:
            self.total.addmm_(x.T, x)
        else:
            self.total += x.sum(0)
        self.tokens += len(x)

    def unit_mean(self) -> Tensor:
        """[n], in float64, of length 1."""
        assert self.total is not None
        return torch.nn.functional.normalize(self.total.double(), dim=0)


def energy_of(layer: str, sums: Mapping[str, Sums]) -> Tensor:
    """Σ_tasks C / tr C [n, n] in float64: every task counts the same, however many tokens it has.
    DomergeError where one has only zeros."""
    total: Tensor | None = None
    for task, own in sums.items():
        assert own.total is not None
        c = own.total.double()
        trace = c.diagonal().sum()
        if not trace > 0:
            problem = f"its input is always zero on task {task!r}"
            raise DomergeError(f"layer {layer!r}: {problem}; leave it out of target_modules")
        total = c.div_(trace) if total is None else total.add_(c.div_(trace))
    assert total is not None
    return total


def checked(batches: Mapping[str, Iterable[Batch]]) -> dict[str, list[Batch]]:
    """The batches of every task as lists; OptionError for a task that has none."""
    if not isinstance(batches, Mapping) or not batches:
        raise OptionError("batches", "name no task", 'give {"task": [batch, …], …}')
    found = {}
    for task, own in batches.items():
        if not task or not is_text(task):
            raise OptionError("batches", f"{task!r} is no name of a task", "give a text")
        if isinstance(own, (Tensor, Mapping, str)):
            raise OptionError("batches", f"of {task!r} are no list", "give a list of batches")
        found[task] = list(own)
        if not found[task]:
            raise OptionError("batches", f"{task!r} has none", "give some, or leave the task out")
    return found


def passes(
    model: nn.Module,
    linears: Mapping[str, Linear],
    batches: Mapping[str, Sequence[Batch]],
    statistic: str,
    most_bytes: int,
    inputs: Sequence[Input] | None = None,
) -> Iterator[tuple[Input, dict[str, Sums]]]:
    """The sums of every task for every input. As many inputs as fit in so many bytes, one at least,
    are summed in one pass over all batches. inputs: those of the layers, where they are known.

    DomergeError where a layer is reached by no token of a task, or its input is not finite.
    """
    inputs = inputs or inputs_of(model, linears, batches)
    for group in _groups(inputs, len(batches), statistic, most_bytes):
        _LOG.info("a pass over %d tasks for %d inputs of layers", len(batches), len(group))
        found = {
            task: _summed(model, linears, group, own, statistic) for task, own in batches.items()
        }
        _check(group, found)
        for one in group:
            yield one, {task: sums.pop(one.first) for task, sums in found.items()}


def inputs_of(
    model: nn.Module, linears: Mapping[str, Linear], batches: Mapping[str, Sequence[Batch]]
) -> list[Input]:
    """Which layers share an input, told by the first batch of every task."""
    return shared(model, linears, [own[0] for own in batches.values()])


def _groups(
    inputs: Sequence[Input], tasks: int, statistic: str, most_bytes: int
) -> Iterator[list[Input]]:
    group: list[Input] = []
    taken = 0
    for one in inputs:
        size = 4 * tasks * (one.n**2 if statistic == MOMENTS else one.n)
        if group and taken + size > most_bytes:
            yield group
            group, taken = [], 0
        group.append(one)
        taken += size
    yield group


def _summed(
    model: nn.Module,
    linears: Mapping[str, Linear],
    group: Sequence[Input],
    batches: Sequence[Batch],
    statistic: str,
) -> dict[str, Sums]:
    """By the first layer of every input."""
    sums = {one.first: Sums() for one in group}
    first = {name: one.first for one in group for name in one.layers}
    masks: list[Tensor] = []
    calls = dict.fromkeys(first, 0)
    given: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        calls[name] += 1
        if name == first[name]:
            given[name] = id(x)
            sums[name].add(tokens_of(name, linears[name].n, x, masks), statistic)
        elif given.get(first[name]) != id(x):
            raise _unlike(first[name], name)

    with watched(model, (linears[name] for name in first), see):
        for batch in batches:
            masks[:] = masks_of(batch)
            given.clear()
            forward(model, batch)
            for name, count in calls.items():
                if count != calls[first[name]]:
                    raise _unlike(first[name], name)
    return sums


def _unlike(first: str, name: str) -> DomergeError:
    problem = f"is given what {first!r} is given on some batches, and something else on others"
    return DomergeError(f"layer {name!r}: {problem}; leave one of both out of target_modules")


def _check(group: Sequence[Input], found: Mapping[str, Mapping[str, Sums]]) -> None:
    for task, sums in found.items():
        missed = [name for one in group if not sums[one.first].tokens for name in one.layers]
        if missed:
            problem = (
                f"no token of task {task!r} reaches {len(missed)} layers, as {some(missed, 2)}"
            )
            raise DomergeError(f"{problem}; give more texts, or leave them out of target_modules")
        for one in group:
            total = sums[one.first].total
            if total is None or not torch.isfinite(total).all():
                problem = f"its input on task {task!r} is NaN, infinite or too large"
                raise DomergeError(f"layer {one.first!r}: {problem}; run the model in float32")
