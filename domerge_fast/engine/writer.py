"""Hands what becomes of a plan's modules to the sink, behind the work on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import transfer

__all__ = ["Batch", "Sink", "Writer"]

Batch = tuple[Sequence[str], tuple[Tensor, ...]]
"""Names, and A [R, n] and B [m, R], or ΔW [m, n] in float32, of one module, or with P before their
shapes of P."""

Sink = Callable[[Sequence[Batch]], None]
"""Takes what becomes of every portion of the plan."""


class Writer:
    """Gives results to the sink: in a thread and in the host's memory where the sink wants them
    there, else at once, as they are."""

    def __init__(
        self,
        sink: Sink,
        device: torch.device,
        streams: Sequence[torch.cuda.Stream],
        thread: ThreadPoolExecutor | None,
    ) -> None:
        self._sink, self._device, self._streams, self._thread = sink, device, streams, thread
        self._written: Future[None] | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        sink: Sink,
        device: torch.device,
        streams: Sequence[torch.cuda.Stream],
        to_host: bool,
    ) -> Iterator[Writer]:
        """device: where the results are. streams: the caller's."""
        if not to_host:
            yield cls(sink, device, streams, None)
            return
        with ThreadPoolExecutor(1, "domerge-write") as thread:
            yield cls(sink, device, streams, thread)

    def write(self, results: Sequence[Batch]) -> None:
        """Give these to the sink, once those before them are written."""
        if self._thread is None:
            self._sink(results)
            return
        self.wait()
        ready = transfer.ready_event(self._device)
        self._written = self._thread.submit(_write, self._sink, results, ready, self._streams)

    def after(self, run: Callable[..., None], *arguments: Any) -> None:
        """Call this when all that was given so far is written."""
        if self._thread is None or self._written is None:
            run(*arguments)
        else:
            self._written = self._thread.submit(_after, self._written, run, *arguments)

    def wait(self) -> None:
        """Until all is written; raises what the sink did."""
        if self._written:
            self._written.result()


def _after(written: Future[None], run: Callable[..., None], *arguments: Any) -> None:
    written.result()
    run(*arguments)


def _write(
    sink: Sink,
    results: Sequence[Batch],
    ready: torch.cuda.Event | None,
    streams: Sequence[torch.cuda.Stream],
) -> None:
    tensors = [t for _, own in results for t in own]
    with transfer.on(streams):
        arrived = iter(transfer.download(tensors, ready) if ready else tensors)
        sink([(names, tuple(islice(arrived, len(own)))) for names, own in results])
