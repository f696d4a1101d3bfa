"""DoRA: rows of W + s B A keep their directions, and have lengths m of their own:

    ΔW = m (W + s B A) / ||W + s B A|| - W

with the norm of each output's row (of an embedding, of each dimension's column; of a convolution,
of all that leads to an output), or, in files of LyCORIS and OneTrainer, of each input's column. ΔW
depends on the base's weights, and has full rank: it enters a merge beside the unit matrix. Source:
arXiv 2402.09353, and the ways of PEFT 0.21 and LyCORIS 4.1 of storing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..errors import AdapterError
from ..storage.lazy import LazyTensor, Turned, dtype_name
from ..storage.made import beside_unit
from ..storage.rescaled import Rescaled, RescaledColumns
from .adapter import Adapter, Module
from .style import MODEL

__all__ = ["Origin", "check_no_dora", "taken_whole"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Origin = Callable[[str], LazyTensor | None]


def check_no_dora(adapter: Adapter) -> None:
    """AdapterError for a DoRA whose updates have not been taken whole."""
    if adapter.magnitudes:
        problem = "is a DoRA, whose updates depend on the weights of the base model"
        remedy = "merge it with the base (base, --base) into form deltas or model, or to a rank"
        if adapter.style and adapter.style.names != MODEL:
            remedy = "give its base (base, --base): one file, or a folder of diffusers"
        raise AdapterError(adapter.name, None, problem, remedy)


def taken_whole(adapter: Adapter, origin: Origin) -> Adapter:
    """The adapter with ΔW of every module instead of its factors, read on demand. origin: the
    base's weights, by the parameters' names. AdapterError where they are not of these modules."""
    modules, stored = {**adapter.modules}, {**adapter.stored}
    for name, magnitude in adapter.magnitudes.items():
        module, (a, b) = adapter.modules[name], adapter.stored[name]
        weight = _as_matrix(adapter, module, origin(module.parameter))
        kind = RescaledColumns if len(magnitude.shape) > 1 else Rescaled
        pair = beside_unit(kind(weight, a, b, module.scaling, magnitude))
        ones = (1,) * (len(module.a_shape) - 2)
        modules[name], stored[name] = (
            dataclasses.replace(
                module,
                a_shape=pair[0].shape,
                b_shape=(*pair[1].shape, *ones),
                rank=pair[0].shape[0],
                scaling=1.0,
                dtype=pair[0].dtype,
                dense=True,
            ),
            pair,
        )
    note = f"{len(adapter.magnitudes)} modules are DoRA: their updates of the base's weights are "
    note += "taken whole, and have full rank"
    notes = (*adapter.notes, note)
    return dataclasses.replace(adapter, modules=modules, stored=stored, magnitudes={}, notes=notes)


def _as_matrix(adapter: Adapter, module: Module, weight: LazyTensor | None) -> LazyTensor:
    """The base's weight as [m, inputs...]; stored as [n, m] for embeddings and GPT-2's Conv1D."""
    if weight is None or module.slice:
        problem = "is a DoRA of what the base has no weight for"
        raise AdapterError(adapter.name, module.name, problem, "give the base it was trained on")
    if weight.dtype not in _FLOATS:
        problem = f"is a DoRA of a weight that the base has as {dtype_name(weight.dtype)}"
        remedy = "give the base in float32, float16 or bfloat16"
        raise AdapterError(adapter.name, module.name, problem, remedy)
    shape = module.m, *module.a_shape[1:]
    embeds = module.kind == "embedding"
    turned = embeds or (module.kind == "linear" and adapter.config.fan_in_fan_out)
    for way in (turned,) if embeds or module.kind != "linear" else (turned, not turned):
        if weight.shape == (shape[::-1] if way else shape):
            return Turned(weight) if way else weight
    problem = f"is a DoRA of a weight {list(shape)}, the base has {list(weight.shape)}"
    raise AdapterError(adapter.name, module.name, problem, "give the base it was trained on")
