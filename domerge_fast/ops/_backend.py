"""Which backend's functions an op calls, and how it is called in a profile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from ..algebra.side import Side
from ..backends import registry
from ..backends.singly import Singly

P = ParamSpec("P")
T = TypeVar("T")


def implementation(
    name: str,
    backend: str,
    things: Sequence[Tensor | Side],
    *others: Sequence[Tensor | Side | None] | None,
) -> Any:
    """What runs the op of this name on these: a backend's module, which takes sides of several
    modules or is given one at a time; of nothing, any makes nothing. others: what else the op
    reads. ValueError where that is not all on one device: kernels are handed addresses, which tell
    nothing of it."""
    devices = {x.device for group in (things, *others) if group for x in group if x is not None}
    if len(devices) > 1:
        first, second, *_ = sorted(map(str, devices))
        raise ValueError(f"tensors on {first} and on {second} in one call; bring all to one device")
    if not things:
        backend = "torch"
    else:
        dtype = _dtype(things) if backend == registry.AUTO else None
        backend = registry.choose(backend, things[0].device.type, name, dtype)
    module = registry.load(backend)
    return module if getattr(module, "BATCHES", False) else Singly(module)


def _dtype(things: Sequence[Tensor | Side]) -> torch.dtype:
    """That of all of them; float32 where they differ, as that is what kernels bring them to."""
    found = {x.dtype for y in things for x in ([y] if isinstance(y, Tensor) else y.blocks)}
    return found.pop() if len(found) == 1 else torch.float32


def noting(module: Any, finite: list[Tensor] | None) -> dict[str, list[Tensor]]:
    """The list that takes results seen to be finite, for a backend that sees it."""
    if finite is None or not getattr(module, "SEES_FINITE", False):
        return {}
    return {"finite": finite}


def op(function: Callable[P, T]) -> Callable[P, T]:
    """The op, which a profile of torch's shows by the name that it has in `torch.ops`."""

    @functools.wraps(function)
    def named(*given: P.args, **options: P.kwargs) -> T:
        if not torch.autograd._profiler_enabled():  # to say so anyway takes 10 µs
            return function(*given, **options)
        with record_function(f"domerge_fast::{function.__name__}"):
            return function(*given, **options)

    return named
