"""Factors onto a GPU and results off it: many small tensors in one pinned piece of memory.

Both ways the copies run on a stream of their own, beside the kernels of another group of modules.
On the CPU tensors pass as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..adapters.plan import Stack
from ..algebra.side import Side
from ..backends.layout import dense

__all__ = ["Upload", "current_streams", "download", "free_bytes", "on", "ready_event", "upload"]

ALIGNMENT = 256
"""Every tensor starts at a multiple of this many bytes, as one of its own would."""


@dataclasses.dataclass(frozen=True, eq=False)
class Upload:
    """Stacks on their device, there once `ready` has happened."""

    stacks: list[Stack]
    ready: torch.cuda.Event | None = None
    memory: Tensor | None = None
    """What all that came lies in."""

    def wait(self) -> list[Stack]:
        """The stacks, for work that is put on the current stream from now on."""
        if self.ready is not None and self.memory is not None:
            stream = torch.cuda.current_stream(self.memory.device)
            stream.wait_event(self.ready)
            self.memory.record_stream(stream)
        return self.stacks


def free_bytes(device: torch.device) -> int:
    """Memory that a GPU has free, or that torch holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def current_streams(devices: Iterable[torch.device]) -> list[torch.cuda.Stream]:
    """The caller's stream of every GPU among the devices, for threads to work on."""
    return [torch.cuda.current_stream(d) for d in set(devices) if d.type == "cuda"]


@contextlib.contextmanager
def on(streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """These streams made current: what is done waits for what the caller has started on them."""
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        yield


@functools.cache
def _own_stream(device: torch.device, way: str) -> torch.cuda.Stream:
    """The one stream for copies "up" or "down": memory is reused on the stream it was made on."""
    return torch.cuda.Stream(device)


def upload(stacks: list[Stack], device: torch.device) -> Upload:
    """The stacks with every block on the device; those that are there already stay."""
    if all(s.a.is_on(device) and s.b.is_on(device) for s in stacks):
        return Upload(stacks)
    given = [(s.a.matrices, s.b.matrices) for s in stacks]
    away = [x for pair in given for side in pair for x in side if x.device != device]
    if device.type != "cuda":
        return Upload(_replaced(stacks, given, [x.to(device) for x in away], device))
    sources = [dense(x.cpu()) for x in away]
    buffer, offsets = pack(sources, pin=True)
    side = _own_stream(device, "up")
    with torch.cuda.stream(side):
        memory = buffer.to(device, non_blocking=True)
        arrived = unpack(memory, offsets, sources)
        ready = torch.cuda.Event()
        ready.record(side)
    return Upload(_replaced(stacks, given, arrived, device), ready, memory)


def ready_event(device: torch.device) -> torch.cuda.Event | None:
    """Happens when the work that is on the current stream by now is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def download(tensors: Sequence[Tensor], ready: torch.cuda.Event) -> list[Tensor]:
    """Dense tensors of a GPU in the host's memory, once `ready` has happened."""
    side = _own_stream(tensors[0].device, "down")
    side.wait_event(ready)
    with torch.cuda.stream(side):
        buffer, offsets = _room(tensors, pin=True)
        found = unpack(buffer, offsets, tensors)
        for target, source in zip(found, tensors):
            target.copy_(source, non_blocking=True)
            source.record_stream(side)
    side.synchronize()
    return found


def pack(tensors: Sequence[Tensor], pin: bool) -> tuple[Tensor, list[int]]:
    """All tensors (dense) in one piece of the host's memory, and where each begins, in bytes."""
    buffer, offsets = _room(tensors, pin)
    for target, source in zip(unpack(buffer, offsets, tensors), tensors):
        target.copy_(source)
    return buffer, offsets


def unpack(buffer: Tensor, offsets: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the buffer with the dtypes, shapes and memory layouts of dense tensors."""
    found = []
    for at, x in zip(offsets, like):
        flat = buffer[at : at + x.nbytes].view(x.dtype)
        found.append(flat.view(x.shape) if x.is_contiguous() else flat.view(x.T.shape).T)
    return found


def _room(tensors: Sequence[Tensor], pin: bool) -> tuple[Tensor, list[int]]:
    offsets, end = [], 0
    for x in tensors:
        offsets.append(end)
        end += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    return torch.empty(end, dtype=torch.uint8, pin_memory=pin), offsets


def _replaced(
    stacks: Sequence[Stack],
    given: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    arrived: Iterable[Tensor],
    device: torch.device,
) -> list[Stack]:
    """The stacks with what was not on the device replaced by what arrived there. given: the
    matrices of both sides."""
    rest = iter(arrived)

    def moved(side: Side, matrices: Sequence[Tensor]) -> Side:
        return side.elsewhere([x if x.device == device else next(rest) for x in matrices])

    return [
        dataclasses.replace(s, a=moved(s.a, a), b=moved(s.b, b)) for s, (a, b) in zip(stacks, given)
    ]
