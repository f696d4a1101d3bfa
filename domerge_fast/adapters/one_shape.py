"""One stored shape for the modules of adapters whose tools store a layer in different ones.

A convolution of 1x1 is stored in two dimensions or in four, by trainer, and a larger one may be
flat; what the update is does not change. PEFT stores what the model's layer is: there another
number of dimensions is another layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from .adapter import Adapter, Module
from .style import MODEL

__all__ = ["one_shape"]


def one_shape(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with every module in the shape of the first that has it, or of the first that
    has it as a larger convolution; what cannot be the same layer is left as it is."""
    if all(adapter.style is None or adapter.style.names == MODEL for adapter in adapters):
        return list(adapters)
    shapes: dict[str, Module] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            first = shapes.setdefault(name, module)
            if _is_flat(first) and math.prod(module.a_shape[2:]) > 1:
                shapes[name] = module
    return [_alike(adapter, shapes) for adapter in adapters]


def _is_flat(module: Module) -> bool:
    return len(module.a_shape) == 2


def _alike(adapter: Adapter, shapes: dict[str, Module]) -> Adapter:
    modules = {name: _as(module, shapes[name]) for name, module in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


def _as(module: Module, other: Module) -> Module:
    """The module in the other's shape, if one of them is flat or both have trailing ones only."""
    if module.layer == other.layer or (module.m, module.n) != (other.m, other.n):
        return module
    pointwise = math.prod(module.a_shape[2:]) == math.prod(other.a_shape[2:]) == 1
    if not (pointwise or _is_flat(module) or _is_flat(other)) or module.kind == "embedding":
        return module
    a_shape = (module.rank, *other.a_shape[1:])
    b_shape = (module.m, module.rank, *other.b_shape[2:])
    return dataclasses.replace(module, kind=other.kind, a_shape=a_shape, b_shape=b_shape)
