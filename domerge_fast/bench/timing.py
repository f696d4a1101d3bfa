"""Seconds of a call on a device: by the clock, by CUDA events, or as the replay of a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..backends.gpu.graph import Cuda
from ..backends.gpu.tables import keeping

__all__ = ["Call", "captured", "seconds", "take_turns"]

Call = Callable[[], object]


def take_turns(calls: Mapping[str, Call], device: torch.device, repeat: int) -> dict[str, list]:
    """Seconds of every call, `repeat` times, taking turns after one call of warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times


def seconds(call: Call, device: torch.device) -> float:
    """One call; on CUDA from the start of its first kernel to the end of its last one, including
    what the device waits for the host in between."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph: each replay repeats its kernels and copies, without the host.

    The call must not wait for the device. It runs once outside the graph first, which compiles
    kernels and fills the allocators' caches.
    """
    on = Cuda(device)
    tables: list[Tensor] = []
    on.warm(call)
    with keeping(tables):
        replay, _ = on.capture(call)
    return partial(_replayed, replay, tables)


def _replayed(replay: Call, tables: Sequence[Tensor]) -> None:
    """tables: on the host, which every replay reads."""
    replay()
