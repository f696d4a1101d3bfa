"""A stand-in for a GPU that records launches: torch's ops on the CPU, with the arguments they had.

What holds for a CUDA graph holds here. Recorded calls read and write the memory they had, and take
numbers of Python as they were; what waits for the device, or makes a tensor of numbers of Python,
cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

R = TypeVar("R")
WAITS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")
FROM_HOST = ("lift_fresh", "lift", "_pin_memory")


class NotRecorded(Exception):
    """What a GPU refuses while it captures."""


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """read: memory that calls took from outside. made: tensors in memory of the recording's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self.made: list[Tensor] = []
        self.read: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise NotRecorded(f"{name} waits for the device")
        if name in FROM_HOST:
            raise NotRecorded(f"{name} takes numbers of the host")
        result = function(*args, **kwargs)
        given = {memory(x) for x in tensors((args, kwargs))}
        self.read |= given - {memory(x) for x in self.made}
        fresh = [x for x in tensors(result) if memory(x) not in given]
        self.made += fresh
        self.calls.append((function, args, kwargs, tensors(result)))
        return result

    def spoil(self) -> None:
        """Put NaN into all memory of its own."""
        for x in self.made:
            x.fill_(torch.nan if x.is_floating_point() else 1)

    def replay(self) -> None:
        self.spoil()
        for function, args, kwargs, results in self.calls:
            given = {memory(x) for x in tensors((args, kwargs))}
            for old, new in zip(results, tensors(function(*args, **kwargs)), strict=True):
                if memory(old) not in given:
                    old.copy_(new)


class Recorder:
    """backends.gpu.graph.Device. of: those that there were, the last one last. events: what was
    asked of it, in order."""

    of: ClassVar[list[Recorder]] = []
    free = 1 << 40

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.events: list[str] = []
        self.recording = Recording()
        self.of.append(self)

    def room(self) -> int:
        return self.free

    def warm(self, run: Callable[[], object]) -> None:
        self.events.append("warm")
        run()

    def capture(self, run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        self.events.append("capture")
        with self.recording:
            result = run()

        def replay() -> None:
            self.events.append("replay")
            self.recording.replay()

        self.recording.spoil()  # what is captured is not executed
        return replay, result

    def mark(self) -> int:
        self.events.append("mark")
        return len(self.events)

    def after(self, mark: int) -> None:
        self.events.append(f"after {mark}")

    def wait(self, mark: int) -> None:
        self.events.append(f"wait {mark}")
