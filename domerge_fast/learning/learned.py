"""What was found: coefficients, how they were found, and the merge that they make."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..merged import Merged
from ..sessions.prepared import Prepared
from .in_weights import in_weights

__all__ = ["Learned", "Live", "Progress", "Step", "attached", "frozen"]


class Live(Protocol):
    """A model with the merge on it (`Prepared.attach`)."""

    def set(self, kappa: Any, level: str | None = None) -> None: ...


@dataclass(frozen=True)
class Step:
    """number: of steps or evaluations before. losses: by task, or by what was tried. held_out: the
    mean loss on what was held out, where it was looked at. seconds: since the start."""

    number: int
    losses: Mapping[str, float]
    held_out: float | None
    seconds: float

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


Progress = Callable[[Step, float], None]
"""Called after every step with it, and the seconds that may still be left."""


@dataclass(frozen=True, eq=False)
class Learned:
    """coefficients: of `level`, as `Prepared.merge` takes them. history: every step. evaluations:
    how many batches the model was run on. interrupted: whether Ctrl-C ended it early."""

    prepared: Prepared
    coefficients: Tensor
    level: str
    history: tuple[Step, ...]
    evaluations: int
    seconds: float
    interrupted: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)

    def save(self, output: str | os.PathLike[str], **asked: Any) -> Merged:
        """Write the merge at these coefficients (`Prepared.save`)."""
        return self.prepared.save(self.coefficients, output, level=self.level, **asked)


@contextlib.contextmanager
def attached(prepared: Prepared, model: torch.nn.Module, live: Live | None) -> Iterator[Live]:
    """The merge on the model: what is there already stays, else it is there as long as this."""
    if live is not None:
        yield live
        return
    made_anew = prepared.kind == "tiles"
    with in_weights(prepared, model) if made_anew else prepared.attach(model) as made:
        yield made


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of the model asks for a gradient as long as the block runs."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)
