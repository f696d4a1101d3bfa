"""The factor in front of B A of every module.

It is alpha over the rank of A as stored (`lora_down.shape[0]`), whatever the rest of the file says;
without an alpha it is 1, as diffusers and ComfyUI take it. A LoKr of two matrices stored whole has
no rank: its alpha means nothing. diffusers may store PEFT's configs, one
for each part of a pipeline, in place of alphas.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...adapters.style import Style
from ...errors import AdapterError
from ...storage import json_file
from ...storage.safetensors_file import FileTensor, SafetensorsFile
from ..peft.beside import INDICES
from ..peft.config import read_config, scalings
from . import lycoris
from .grammar import ALPHA, DIFFUSERS, DOWN
from .metadata import CONFIGS

__all__ = ["scales"]

Modules = Mapping[str, Mapping[str, tuple[str, FileTensor]]]
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
_SLOT = 8
_BESIDE = ("use_dora", "lora_bias", INDICES)
"""Of PEFT's config: what needs tensors that a file of this kind has not."""


def scales(
    adapter: str, file: SafetensorsFile, modules: Modules, style: Style
) -> tuple[dict[str, float], tuple[str, ...]]:
    """By module, and what is to be said of those that have no alpha. AdapterError for an alpha of
    0, and where a file has alphas and configs."""
    alphas = _alphas(adapter, file, modules)
    with _of_metadata():
        configs = _configs(adapter, style)
    if alphas and configs:
        problem = f"has alphas and, in its metadata, {CONFIGS}, and either may be meant"
        raise AdapterError(adapter, None, problem, "remove one of them, as diffusers asks too")
    found: dict[str, float] = {}
    alone = []
    for module, parts in modules.items():
        rank = _rank(parts)
        if rank is None:
            found[module] = 1.0
            continue
        component, _, rest = module.partition(".") if style.names == DIFFUSERS else ("", "", module)
        if module in alphas:
            found[module] = alphas[module] / max(rank, 1)
        elif component in configs:
            with _of_metadata():
                found[module] = configs[component](rest, rank)
        else:
            found[module] = 1.0
            alone.append(module)
    return found, _notes(len(alone), len(modules))


@contextlib.contextmanager
def _of_metadata() -> Iterator[None]:
    """What is wrong with a config, told of the metadata that it is in."""
    try:
        yield
    except AdapterError as error:
        *where, problem, remedy = error.args
        words = (text.replace("adapter_config.json", CONFIGS) for text in (problem, remedy))
        raise AdapterError(*where, *words) from error


def _notes(alone: int, count: int) -> tuple[str, ...]:
    if not alone:
        return ()
    some = "" if alone == count else f" for {alone} of {count} modules"
    return (f"no alpha{some}: scale 1 assumed, as diffusers and ComfyUI do",)


def _rank(parts: Mapping[str, tuple[str, FileTensor]]) -> int | None:
    """What a module's alpha is over."""
    if lycoris.is_one(parts):
        return lycoris.rank(parts)
    shape = parts[DOWN][1].shape
    return shape[0] if shape else 0


def _alphas(adapter: str, file: SafetensorsFile, modules: Modules) -> dict[str, float]:
    """Those there are, read together."""
    stored = {m: x[ALPHA] for m, x in modules.items() if ALPHA in x and _rank(x) is not None}
    for module, (key, tensor) in stored.items():
        if math.prod(tensor.shape) != 1 or tensor.dtype not in _NUMBERS:
            problem = f"its {key!r} is no number (shape {list(tensor.shape)}, {tensor.dtype})"
            raise AdapterError(adapter, module, problem, "store alpha as one number")
    memory = bytearray(_SLOT * len(stored))
    places = [(tensor, _SLOT * k) for k, (_, tensor) in enumerate(stored.values())]
    file.read_parts(places, memoryview(memory))
    found = {}
    for module, (tensor, at) in zip(stored, places):
        value = torch.frombuffer(memory, dtype=tensor.dtype, count=1, offset=at)
        found[module] = _checked(adapter, module, float(value))
    return found


def _checked(adapter: str, module: str, alpha: float) -> float:
    if alpha == 0:
        problem = "its alpha is 0, which kohya's tools take for the rank and ComfyUI for scale 0"
        remedy = "store the alpha that it was trained with, or leave the adapter out"
        raise AdapterError(adapter, module, problem, remedy)
    if not math.isfinite(alpha):
        problem = f"its alpha is {alpha}"
        raise AdapterError(adapter, module, problem, "store the alpha that it was trained with")
    return alpha


def _configs(adapter: str, style: Style) -> dict[str, Any]:
    """What scales the modules of every part of a pipeline ("" for names of one model), by PEFT's
    configs in the metadata."""
    if CONFIGS not in style.metadata:
        return {}
    try:
        stored = json_file.parse(style.metadata[CONFIGS].encode())
    except json_file.BadJson as error:
        raise _damaged(adapter, f"is no JSON ({error})") from error
    if not isinstance(stored, dict):
        raise _damaged(adapter, "is no JSON object")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in stored.items():
        part, _, field = key.rpartition(".") if style.names == DIFFUSERS else ("", "", key)
        parts.setdefault(part, {})[field] = value
    for config in parts.values():
        read_config(config, adapter)
        if beside := [field for field in _BESIDE if config.get(field)]:
            problem = f"is a DoRA, or has more than factors, by {beside[0]} in {CONFIGS}"
            raise AdapterError(adapter, None, problem, "train it as a plain LoRA")
    return {part: scalings(config, adapter) for part, config in parts.items()}


def _damaged(adapter: str, problem: str) -> AdapterError:
    return AdapterError(adapter, None, f"{CONFIGS} in its metadata {problem}", "save it again")
