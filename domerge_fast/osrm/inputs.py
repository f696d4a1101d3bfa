"""What the layers of a model are given: which share a tensor, and what of a tensor are tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DomergeError, OptionError
from .layers import Linear

__all__ = ["Batch", "Input", "forward", "masks_of", "shared", "tokens_of", "watched"]

Batch = Tensor | Mapping[str, Any]
"""Token numbers [texts, length], or what a model takes by name: input_ids, attention_mask, …"""

MASK = "attention_mask"
"""What the names of masks end in: decoders have one of their own."""


@dataclass(frozen=True)
class Input:
    """What some layers are given, [tokens, n]: query, key and value share one tensor."""

    layers: tuple[str, ...]
    n: int

    @property
    def first(self) -> str:
        return self.layers[0]


@contextmanager
def watched(
    model: nn.Module, linears: Iterable[Linear], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call see(name, input) whenever one of the layers is about to run; the model is in evaluation
    mode without gradients meanwhile, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]

    def hook(name: str) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return before

    handles = []
    try:
        for linear in linears:
            handle = linear.layer.register_forward_pre_hook(hook(linear.name), with_kwargs=True)
            handles.append(handle)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def forward(model: nn.Module, batch: Batch) -> None:
    """Run the model on a batch, on the device of its first parameter."""
    first = next(model.parameters(), None)
    device = None if first is None or first.is_meta else first.device
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, Mapping):
        model(**{k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()})
    else:
        problem = f"a batch is a {type(batch).__name__}"
        raise OptionError(
            "batches", problem, "give tensors of token numbers, or what a model takes"
        )


def shared(
    model: nn.Module, linears: Mapping[str, Linear], batches: Iterable[Batch]
) -> list[Input]:
    """The inputs of the layers, in the order in which the model comes to them: layers that one
    after the other are given the same tensor, on each of these batches, have one input."""
    calls: list[tuple[str, Tensor]] = []
    leaders: dict[str, list[str]] = {name: [] for name in linears}
    order: dict[str, int] = {}
    with watched(model, linears.values(), lambda name, x: calls.append((name, x))):
        for batch in batches:
            forward(model, batch)
            own = {name: name for name in linears}
            for (name, x), (before, other) in zip(calls[1:], calls):
                own[name] = own[before] if x is other else name
            for name, leader in own.items():
                leaders[name].append(leader)
            for name, _ in calls:
                order.setdefault(name, len(order))
            calls.clear()
    together: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(linears, key=lambda name: order.get(name, len(order))):
        together.setdefault(tuple(leaders[name]), []).append(name)
    return [Input(tuple(names), linears[names[0]].n) for names in together.values()]


def masks_of(batch: Batch) -> list[Tensor]:
    """Which tokens of a batch are no padding, [texts, length] each; what has no mask has none."""
    if isinstance(batch, Tensor):
        return []
    masks = [x for key, x in batch.items() if key.endswith(MASK) and isinstance(x, Tensor)]
    for mask in masks:
        if mask.ndim != 2:
            problem = f"the attention mask of a batch has the shape {list(mask.shape)}"
            raise OptionError("batches", problem, "give one of shape [texts, length]")
    return [mask.bool() for mask in masks]


def tokens_of(name: str, n: int, x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows [tokens, n] of a layer's input that are no padding, in float32.

    DomergeError where the input is not the layer's whole one, or cannot be told from padding.
    """
    if x.shape[-1:] != (n,):
        problem = f"its input has the shape {list(x.shape)}, and the layer takes {n} columns"
        raise DomergeError(f"layer {name!r}: {problem}; give a model that is not sharded")
    rows = x.detach().reshape(-1, n)
    if all(bool(mask.all()) for mask in masks):
        return rows.float()
    lead = x.shape[:-1]
    fit = [mask for mask in masks if lead == mask.shape or lead == (mask.numel(),)]
    if not fit or any(not torch.equal(fit[0], other) for other in fit[1:]):
        problem = f"which rows of its input (shape {list(x.shape)}) are padding cannot be told"
        raise DomergeError(f"layer {name!r}: {problem}; give batches of texts of one length")
    return rows[fit[0].flatten().to(rows.device)].float()
