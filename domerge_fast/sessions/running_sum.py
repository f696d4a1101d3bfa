"""The sum that a sequential merge keeps, as factors: how it is written, and read times a number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..adapters import Adapter
from ..adapters.plan import Stack
from ..algebra import powers
from ..algebra.side import Side
from ..engine.interference import own_norms
from ..formats.peft import write as peft
from ..formats.target import Target
from ..storage.stream import SafetensorsWriter

__all__ = ["Scaled", "Sink"]


class Sink:
    """Writes factors as they come; `energy` is ||B A||_F^2 of all of them."""

    def __init__(self, writer: SafetensorsWriter, target: Target) -> None:
        self._writer = writer
        self._layouts = target.layouts
        self.energy = 0.0

    def __call__(self, name: str, a: Tensor, b: Tensor) -> None:
        layout = self._layouts[name]
        for key, tensor in zip(peft.keys(layout), layout.stored(a, b)):
            self._writer.add(key, tensor)
        whole = Stack((name,), (0,), Side((a,), (1.0,)), Side((b.T,), (1.0,)), (1.0,))
        self.energy += float(own_norms([whole], "auto")[0]) ** 2


class Scaled(Mapping[str, tuple[Tensor, Tensor]]):
    """A [R, n] and B [m, R] of every module of an adapter, with B times a gain."""

    def __init__(self, adapter: Adapter, gain: float, dtype: torch.dtype) -> None:
        self._adapter, self._gain, self._dtype = adapter, gain, dtype

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self._adapter.factors(name)
        part, power = math.frexp(self._gain)
        return powers.fitted(name, a, part * b, (0, power), self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.modules)

    def __len__(self) -> int:
        return len(self._adapter.modules)
