"""Which backend's functions an op calls, and how it is called in a profile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import ParamSpec, TypeVar

from torch import Tensor
from torch.autograd.profiler import record_function

from ..algebra.side import Side
from ..backends import registry

P = ParamSpec("P")
T = TypeVar("T")


def implementation(backend: str, things: Sequence[Tensor | Side]) -> ModuleType:
    """The module that runs an op on these; of nothing, any makes nothing."""
    if not things:
        return registry.load("torch")
    return registry.load(registry.choose(backend, things[0].device.type))


def op(function: Callable[P, T]) -> Callable[P, T]:
    """The op, which a profile of torch's shows by the name that it has in `torch.ops`."""

    @functools.wraps(function)
    def named(*given: P.args, **options: P.kwargs) -> T:
        with record_function(f"domerge_fast::{function.__name__}"):
            return function(*given, **options)

    return named
