"""Which backend's functions an op calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from ..algebra.side import Side
from ..backends import registry


def implementation(backend: str, things: Sequence[Tensor | Side]) -> ModuleType:
    """The module that runs an op on these; of nothing, any makes nothing."""
    if not things:
        return registry.load("torch")
    return registry.load(registry.choose(backend, things[0].device.type))
