"""A prepared merge in a model's own weights, for methods whose merges are made anew every time
(kind "tiles"): there are no bases that an adapter could have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..sessions.coefficients import Kappa
from ..sessions.prepared import Prepared

__all__ = ["InWeights", "in_weights"]


class InWeights:
    """ΔW on top of weights that are kept beside, m n numbers a module."""

    def __init__(self, prepared: Prepared, model: nn.Module) -> None:
        """OptionError for modules that are no plain linear layers of the model."""
        self._prepared = prepared
        self._weights: dict[str, Tensor] = {}
        for name, shape in prepared.shapes.items():
            try:
                layer = model.get_submodule(name)
            except AttributeError as error:
                problem = f"has no module {name!r}"
                raise OptionError("model", problem, "give the adapters' base") from error
            if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != shape:
                problem = f"{name!r} is no linear layer {list(shape)}"
                raise OptionError("model", problem, "take a method of another kind, as 'tsvm'")
            self._weights[name] = layer.weight
        self._before = {name: x.detach().clone() for name, x in self._weights.items()}

    @torch.no_grad()
    def set(self, kappa: Kappa, level: str | None = None) -> None:
        """Let the model be merged at coefficients."""
        merged = self._prepared.merge(kappa, level)
        for name, weight in self._weights.items():
            weight.copy_(self._before[name] + merged.delta(name).to(weight.device))

    @torch.no_grad()
    def undo(self) -> None:
        """Bit by bit the weights of before."""
        for name, weight in self._weights.items():
            weight.copy_(self._before[name])


@contextlib.contextmanager
def in_weights(prepared: Prepared, model: nn.Module) -> Iterator[InWeights]:
    """The merge in the model's weights for as long as the block runs."""
    live = InWeights(prepared, model)
    try:
        yield live
    finally:
        live.undo()
