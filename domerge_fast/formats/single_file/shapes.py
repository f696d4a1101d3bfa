"""The stored parts of a module as A and B of one number of dimensions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ...adapters.adapter import Adapter
from ...errors import AdapterError
from ...storage.lazy import LazyTensor
from ...storage.made import Folded, Vector
from ...storage.safetensors_file import FileTensor
from ..peft.assemble import check_dtype
from . import lycoris
from .grammar import DOWN, MID, UP

__all__ = ["factors", "magnitude"]

_OF_EITHER = ".dora_scale"
_AGAIN = "save it again with the tool that trained it"
Parts = Mapping[str, tuple[str, FileTensor]]


def factors(adapter: str, module: str, parts: Parts) -> tuple[LazyTensor, LazyTensor]:
    """A [r, in] and B [out, r], or of a convolution [r, in, k...] and [out, r, 1...].

    Tools store a convolution of 1x1 in two dimensions or four, and linear layers in four: B gets
    as many as A has. AdapterError for other shapes.
    """
    if lycoris.is_one(parts):
        return lycoris.factors(adapter, module, parts)
    (_, down), (_, up) = parts[DOWN], parts[UP]
    if MID in parts:
        a = _folded(adapter, module, parts)
        return a, _shaped(up, (*up.shape[:2], *[1] * (len(a.shape) - 2)))
    if not _fit(down, up):
        problem = f"has factors that do not fit (A {list(down.shape)}, B {list(up.shape)})"
        raise AdapterError(adapter, module, problem, _AGAIN)
    if len(up.shape) == 2 < len(down.shape) and math.prod(down.shape[2:]) > 1:
        problem = "has B in two dimensions beside a convolution, as a DyLoRA does, whose scale "
        problem += "depends on its training"
        raise AdapterError(adapter, module, problem, "extract it as a plain LoRA")
    return down, _shaped(up, (*up.shape[:2], *[1] * (len(down.shape) - 2)))


def magnitude(adapter: Adapter, module: str, key: str, tensor: FileTensor) -> LazyTensor:
    """Of a DoRA: one for each output, as a vector [m], or for each input, [1, inputs, 1...]. PEFT
    has them of outputs alone, of convolutions as [1, m, 1...]. AdapterError for other shapes."""
    check_dtype(adapter.name, module, repr(key), tensor.dtype)
    layer, shape = adapter.modules[module], tensor.shape
    of_outputs = shape[:1] == (layer.m,) and {*shape[1:]} <= {1}
    if of_outputs or (not key.endswith(_OF_EITHER) and math.prod(shape) == layer.m):
        return Vector(tensor)
    if key.endswith(_OF_EITHER) and shape[:2] == (1, layer.a_shape[1]) and {*shape[2:]} <= {1}:
        return tensor
    weight = [layer.m, *layer.a_shape[1:]]
    problem = f"has {key!r} as {list(shape)}, which fits no weight {weight}"
    raise AdapterError(adapter.name, module, problem, _AGAIN)


def _fit(down: FileTensor, up: FileTensor) -> bool:
    """Whether these are A and B of one rank."""
    a, b = down.shape, up.shape
    matrices = min(len(a), len(b)) >= 2 and 0 not in (*a, *b)
    return matrices and a[0] == b[1] and set(b[2:]) <= {1}


def _folded(adapter: str, module: str, parts: Parts) -> Folded:
    (_, mid), (_, down), (_, up) = parts[MID], parts[DOWN], parts[UP]
    for key, tensor in (parts[MID], parts[DOWN]):
        check_dtype(adapter, module, repr(key), tensor.dtype)
    matrices = min(len(down.shape), len(up.shape)) >= 2 and {*down.shape[2:], *up.shape[2:]} <= {1}
    some = len(mid.shape) > 2 and 0 not in (*mid.shape, *down.shape, *up.shape)
    if not (matrices and some) or mid.shape[:2] != (up.shape[1], down.shape[0]):
        shapes = f"down {list(down.shape)}, mid {list(mid.shape)}, up {list(up.shape)}"
        raise AdapterError(adapter, module, f"has parts that do not fit ({shapes})", _AGAIN)
    return Folded(mid, down)


def _shaped(x: FileTensor, shape: tuple[int, ...]) -> FileTensor:
    """The same bytes in another shape."""
    return x if shape == x.shape else dataclasses.replace(x, shape=shape)
