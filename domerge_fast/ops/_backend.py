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
    backend: str, things: Sequence[Tensor | Side], *others: Sequence[Tensor | Side | None] | None
) -> Any:
    """What runs an op on these: a backend's module, which takes sides of several modules or is
    given one at a time; of nothing, any makes nothing. others: what else the op reads. ValueError
    where that is not all on one device: kernels are handed addresses, which tell nothing of it."""
    devices = {x.device for group in (things, *others) if group for x in group if x is not None}
    if len(devices) > 1:
        first, second, *_ = sorted(map(str, devices))
        raise ValueError(f"tensors on {first} and on {second} in one call; bring all to one device")
    name = registry.choose(backend, things[0].device.type) if things else "torch"
    module = registry.load(name)
    return module if getattr(module, "BATCHES", False) else Singly(module)


def op(function: Callable[P, T]) -> Callable[P, T]:
    """The op, which a profile of torch's shows by the name that it has in `torch.ops`."""

    @functools.wraps(function)
    def named(*given: P.args, **options: P.kwargs) -> T:
        if not torch.autograd._profiler_enabled():  # to say so anyway takes 10 µs
            return function(*given, **options)
        with record_function(f"domerge_fast::{function.__name__}"):
            return function(*given, **options)

    return named
