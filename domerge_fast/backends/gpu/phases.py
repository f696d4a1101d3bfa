"""A descent as launches of one phase of many problems each: their scratch memory, and when to end.

Problems take turns in the memory. After a step the host asks, once, whether any goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Descent", "descend"]

MEMORY = 256 << 20
"""Bytes that the problems of one launch may hold, unless one needs more."""

MAX_PROBLEMS = 1 << 15
"""Of one launch."""


class Descent(Protocol):
    """The launches for the problems of a batch."""

    def begin(self) -> None:
        """From G to C = I."""

    def step(self, first: bool) -> None:
        """A step of every problem that goes on."""

    def finish(self) -> None:
        """C and the statistics to where results are."""


def descend(
    work: Tensor, each: int, running: int, steps: int, start: Callable[[Tensor, Tensor], Descent]
) -> None:
    """Descends on the problems of `work`, of which a row of memory [., each] in float64 is for one.

    start(batch, memory) gives the launches for rows of `work`; memory[i, running] is not 0 as long
    as problem i goes on. Where a CUDA graph is captured nothing is asked: it gets all `steps`, and
    those that are not needed do nothing.
    """
    count = min(len(work), max(1, MEMORY // (8 * each)), MAX_PROBLEMS)
    memory = torch.empty(count, each, dtype=torch.float64, device=work.device)
    captured = _is_captured(work)
    for batch in work.split(count):
        descent = start(batch, memory)
        descent.begin()
        for step in range(steps):
            descent.step(step == 0)
            if not captured and not memory[: len(batch), running].any():
                break
        descent.finish()


def _is_captured(work: Tensor) -> bool:
    return work.is_cuda and torch.cuda.is_current_stream_capturing()
