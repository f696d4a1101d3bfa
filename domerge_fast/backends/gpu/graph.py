"""A function of tensors on a GPU as a CUDA graph: its launches are recorded once, and repeated with
other numbers in the same memory, without the host.

What is asked of the device is `Device`, so that a test can stand in for a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .tables import keeping

__all__ = ["Cuda", "Device", "Graph"]

R = TypeVar("R")
Make = Callable[[Sequence[Tensor]], R]


class Device(Protocol):
    """What runs graphs. A mark is a place in the work of a stream, which others can wait for.
    place: the device itself."""

    place: torch.device

    def __init__(self, place: torch.device) -> None: ...

    def room(self) -> int:
        """Bytes that are free."""

    def warm(self, run: Callable[[], object]) -> None:
        """Runs once, which compiles kernels and makes libraries ready."""

    def capture(self, run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """The launches of run(), not executed, as a function that repeats them; and its result,
        which is in memory of the graph's own."""

    def mark(self) -> Any:
        """Of what was launched so far on the current stream."""

    def after(self, mark: Any) -> None:
        """Lets what is launched next on the current stream wait for a mark."""

    def wait(self, mark: Any) -> None:
        """Lets the host wait for a mark."""


class Cuda:
    """Device by torch's CUDA graphs."""

    def __init__(self, place: torch.device) -> None:
        self.place, self._stream = place, torch.cuda.Stream(place)

    def room(self) -> int:
        return torch.cuda.mem_get_info(self.place)[0]

    def warm(self, run: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.synchronize(self.place)

    def capture(self, run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        graph = torch.cuda.CUDAGraph()
        # Pinned tables are allocated meanwhile, which stricter modes may take for an error.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="relaxed"):
            result = run()
        return graph.replay, result

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.place))
        return event

    def after(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.place).wait_event(mark)

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


class Graph(Generic[R]):
    """make(inputs) of inputs that have the shapes and dtypes of those given first.

    make may launch and allocate, and must not wait for the device, read host memory that changes,
    or depend on numbers of the inputs in Python. What it reads besides its inputs must stay where
    it is as long as the graph. The inputs' copies, the results and the tables of the ops in it
    (`tables.upload`) are the graph's: they are freed with it, after its last replay.
    """

    def __init__(self, make: Make[R], inputs: Sequence[Tensor], device: Device) -> None:
        self._device, self._make = device, make
        self._last: Sequence[Tensor] | None = inputs
        self._inputs = [x.detach().to(device.place, copy=True) for x in inputs]
        self._lock = threading.Lock()
        kept: list[Tensor] = []
        with torch.no_grad(), keeping(kept):
            device.warm(lambda: make(self._inputs))
            self._replay, self._results = device.capture(lambda: make(self._inputs))
        self._replay()
        self._marks = [device.mark()]
        weakref.finalize(self, _free, device, self._marks, kept).atexit = False

    @contextmanager
    def results(self, inputs: Sequence[Tensor]) -> Iterator[R]:
        """make(inputs), to be copied from until the context ends. The same object as the inputs of
        the last call: they are there already."""
        with self._lock, torch.no_grad():
            self._device.after(self._marks[0])
            try:
                if inputs is not self._last:
                    self._last = None
                    for own, x in zip(self._inputs, inputs, strict=True):
                        own.copy_(x)
                    self._replay()
                    self._last = inputs
                yield self._results
            finally:
                self._marks[0] = self._device.mark()


def _free(device: Device, marks: list[Any], kept: list[Tensor]) -> None:
    """Host memory that a replay reads is not another's before that is done."""
    device.wait(marks[0])
    kept.clear()
