"""An adapter made of plain tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from ..adapters.adapter import Adapter, AdapterConfig
from ..errors import AdapterError, is_text
from ..storage.lazy import MemoryTensor
from .peft.assemble import assemble

__all__ = ["from_tensors"]


def from_tensors(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scaling: float | Mapping[str, float] = 1.0,
    *,
    name: str = "tensors",
    base_model: str | None = None,
    fan_in_fan_out: bool = False,
    embeddings: Collection[str] = (),
) -> Adapter:
    """An adapter of factors by module name: A [r, n] and B [m, r] (for convolutions A [r, in, k...]
    and B [m, r, 1...]), with delta = scaling * B @ A.

    ``scaling`` is one number or one for each module (alpha / r for a standard LoRA). ``embeddings``
    names the modules that are embeddings (A [r, vocabulary], B [dimension, r]). Tensors are not
    copied and keep their device. Raises AdapterError as for a saved adapter.
    """
    if base_model is not None and not is_text(base_model):
        problem = f"its base_model is {base_model!r}, which is no name"
        raise AdapterError(name, None, problem, "give a text")
    if not isinstance(factors, Mapping):
        problem = f"its factors are of type {type(factors).__name__}, no mapping of modules"
        raise AdapterError(name, None, problem, "give {module: (A, B)}")
    tensors = {}
    for module, pair in factors.items():
        if not _are_factors(pair):
            raise AdapterError(
                name, module, "has no two tensors", "give (A, B): A [r, n], B [m, r]"
            )
        a, b = pair
        if a.device != b.device:
            problem = f"factors are on different devices ({a.device}, {b.device})"
            raise AdapterError(name, module, problem, "move them to one device")
        part = "lora_embedding_{}" if module in embeddings else "lora_{}.weight"
        tensors[f"{module}.{part.format('A')}"] = MemoryTensor(a)
        tensors[f"{module}.{part.format('B')}"] = MemoryTensor(b)

    def scaling_of(module: str, rank: int) -> float:
        value = scaling.get(module) if isinstance(scaling, Mapping) else scaling
        if not value or not math.isfinite(value):
            problem = f"has scaling {value}"
            raise AdapterError(name, module, problem, "give it a finite number that is not 0")
        return float(value)

    config = AdapterConfig(
        base_model_name_or_path=base_model,
        fan_in_fan_out=fan_in_fan_out,
    )
    return assemble(name, config, tensors, scaling_of)


def _are_factors(pair: object) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    return all(isinstance(x, torch.Tensor) for x in pair)
