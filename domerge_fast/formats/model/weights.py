"""How ΔW [m, n] of a module lies in the weight of the base model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import DomergeError
from ...storage.lazy import dtype_name
from ..target import Layout, Target

__all__ = ["Realised", "check_no_replication", "is_turned", "rounded", "stored", "stored_shape"]


def is_turned(layout: Layout, target: Target) -> bool:
    """Whether the base stores the weight as [n, m]: embeddings do, and GPT-2's Conv1D, which PEFT
    calls `fan_in_fan_out` and states once for all linear modules of an adapter."""
    linear = layout.kind == "linear"
    return layout.kind == "embedding" or (linear and bool(target.config["fan_in_fan_out"]))


def stored_shape(layout: Layout, turned: bool, rows: int | None = None) -> tuple[int, ...]:
    """rows: of ΔW that the weight has, None: all m."""
    m = layout.m if rows is None else rows
    return (*layout.inputs, m) if turned else (m, *layout.inputs)


def stored(layout: Layout, delta: Tensor, turned: bool) -> Tensor:
    """ΔW [m, n], or some of its rows, in the weight's shape: a view."""
    return (delta.T if turned else delta).reshape(stored_shape(layout, turned, len(delta)))


def rounded(module: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype of the output; DomergeError if it is not finite there."""
    found = x.to(dtype)
    if not all(math.isfinite(end) for end in torch.aminmax(found)):
        name = dtype_name(dtype)
        problem = f"module {module!r}: the result has values that are not finite in {name}"
        raise DomergeError(f"{problem}; merge with a smaller scale, or into a wider dtype")
    return found


@dataclass
class Realised:
    """How much of ΔW is in W0 + ΔW once that is rounded: <rounded - W0, ΔW> / ||ΔW||^2.

    Rounding to the base's dtype moves every weight by up to half a step of its own size, to either
    side, so that most of a ΔW of about a step is kept in the mean. One that is far smaller changes
    only weights near zero.
    """

    wanted: float = 0.0
    kept: float = 0.0

    def add(self, before: Tensor, change: Tensor, after: Tensor) -> None:
        wide = change.double()
        self.wanted += float(wide.square().sum())
        self.kept += float(((after.double() - before.double()) * wide).sum())

    @property
    def share(self) -> float:
        return self.kept / self.wanted if self.wanted else 1.0


def check_no_replication(target: Target) -> None:
    """DomergeError for replicated layers: each has its own update of a weight that they share."""
    if target.config["layer_replication"]:
        problem = "the adapters replicate layers (layer_replication), which then share base weights"
        raise DomergeError(f"{problem}; write an adapter")
