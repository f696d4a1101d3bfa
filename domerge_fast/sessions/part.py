"""A module as it is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapters.plan import Stack
from .kinds.alike import Alike

__all__ = ["Bases", "Part"]

Bases = tuple[Tensor, Tensor]
"""R [k, n] and L^T [k, m] of a module."""


@dataclass(frozen=True, eq=False)
class Part:
    """A module: its bases, and what `Alike` of this class keeps of it. norms: ||τ_i||_F. ranks: how
    many directions with coefficients each adapter has, where these are not the rows of its A."""

    stack: Stack
    bases: Bases
    cls: type[Alike]
    tensors: dict[str, Tensor]
    fields: dict[str, Any] = field(default_factory=dict)
    norms: Sequence[float] = ()
    ranks: tuple[int, ...] = ()

    @property
    def key(self) -> tuple:
        """The same for modules that are alike."""
        shapes = tuple((name, tuple(x.shape)) for name, x in self.tensors.items())
        return self.cls, self.stack.adapters, self.stack.a.ranks, shapes
