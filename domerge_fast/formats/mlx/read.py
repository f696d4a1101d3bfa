"""Reads MLX adapters, as mlx-lm saves them: adapters.safetensors beside adapter_config.json.

`lora_a` [n, r] and `lora_b` [r, m] of a linear layer (of an embedding n is the vocabulary, m the
dimension) are the transposes of A and B; those of experts are not (experts.py). ΔW = scale · B A,
with the one number `lora_parameters.scale`, which is not divided by the rank.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ...adapters import Adapter, AdapterConfig, LazyTensor, Style
from ...adapters.names import EMBEDDINGS
from ...errors import AdapterError
from ...storage import json_file
from ...storage.garbage import uncollected
from ...storage.input_file import InputFile
from ...storage.lazy import Turned
from ...storage.safetensors_file import FileTensor, SafetensorsFile
from ..peft.assemble import assemble
from .experts import modules_of

__all__ = ["CONFIG", "SIDES", "WEIGHTS", "load", "recognises"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
SIDES = {"lora_a": "A", "lora_b": "B"}
STYLE = Style("mlx")
_EMBEDDINGS = (*EMBEDDINGS, "embedding", "embeddings", "tok_embeddings", "token_embeddings", "wpe")
"""What mlx-lm's models call embeddings: their factors have the shapes of a linear layer's."""
_KINDS = {"dora": "is a DoRA", "full": "is no LoRA, but whole weights"}
_TRAIN = "train it with fine_tune_type lora"
_SAVE_AGAIN = "save the adapter again with mlx-lm"


def recognises(path: Path) -> bool:
    """A folder, or a file in one: mlx-lm saves several of a training beside one config."""
    if path.name.endswith(WEIGHTS) and os.path.isfile(path):
        return os.path.isfile(path.parent / CONFIG)
    return os.path.isfile(path / WEIGHTS)


@uncollected()
def load(path: Path, name: str) -> Adapter:
    """The adapter in a folder, or in one of its files; factors stay on disk. AdapterError for
    whatever cannot be merged exactly."""
    weights = path / WEIGHTS if os.path.isdir(path) else path
    refuse = functools.partial(AdapterError, name, None)
    config = InputFile(weights.parent / CONFIG, refuse)
    raw = json_file.read_object(config, json_file.CONFIG_BYTES)
    scaling = _scaling(raw, name)
    file = SafetensorsFile(weights, refuse)
    tensors: dict[str, LazyTensor] = {}
    for key, tensor in _factors(name, file):
        if key in tensors:
            raise refuse(f"stores {key!r} twice, by itself and among experts", _SAVE_AGAIN)
        tensors[key] = tensor
    base = raw.get("model")
    base = base if isinstance(base, str) and base else None
    kept = AdapterConfig(base, task_type="CAUSAL_LM", raw=raw)
    adapter = assemble(name, kept, tensors, scaling, (config, file.input))
    return dataclasses.replace(adapter, style=STYLE)


def _scaling(raw: Mapping[str, Any], adapter: str) -> Callable[[str, int], float]:
    """(module, rank of its factors) -> scale. AdapterError where the config does not say it, or
    says another rank."""
    kind = raw.get("fine_tune_type", "lora")
    if kind != "lora":
        problem = f"{_KINDS.get(str(kind), 'is no LoRA')} (fine_tune_type {str(kind)[:40]!r})"
        raise AdapterError(adapter, None, problem, _TRAIN)
    parameters = raw.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale, expected = parameters.get("scale"), parameters.get("rank")
    if not _is_finite(scale):
        problem = f"has no scale in lora_parameters of {CONFIG}, or none that is a finite number"
        raise AdapterError(adapter, None, problem, "say there what it was trained with")

    def scaling(module: str, rank: int) -> float:
        if rank != expected:
            problem = f"has rank {rank}, lora_parameters says {str(expected)[:40]!r}"
            raise AdapterError(adapter, module, problem, f"give the {CONFIG} of these weights")
        return float(scale)

    return scaling


def _is_finite(value: Any) -> TypeGuard[float]:
    # Not math.isfinite: it takes no whole number beyond the largest float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _factors(adapter: str, file: SafetensorsFile) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors as PEFT calls them and has them."""
    for key, x in file.tensors().items():
        module, _, leaf = key.rpartition(".")
        if leaf == "m":
            raise AdapterError(adapter, module, "is a DoRA (m)", _TRAIN)
        if not module or leaf not in SIDES:
            raise AdapterError(adapter, None, f"unknown tensor {key!r}", _SAVE_AGAIN)
        if len(x.shape) == 3 and 0 not in x.shape:
            yield from _experts(adapter, module, leaf, x)
        elif len(x.shape) == 2:
            yield _key(module, leaf), Turned(x)
        else:
            problem = f"{leaf} is no matrix (shape {list(x.shape)})"
            raise AdapterError(adapter, module, problem, _SAVE_AGAIN)


def _experts(
    adapter: str, module: str, leaf: str, x: FileTensor
) -> Iterator[tuple[str, LazyTensor]]:
    """The matrices of a SwitchLinear, each as one of a module."""
    count, *shape = x.shape
    names = modules_of(module, count)
    if names is None:
        problem = f"adapts {count} experts at once, in a model that may store them otherwise"
        raise AdapterError(adapter, module, problem, "train it without these modules in keys")
    nbytes = x.nbytes // count
    for e, name in enumerate(names):
        begin = x.begin + e * nbytes
        yield _key(name, leaf), FileTensor(x.file, x.dtype, tuple(shape), begin, nbytes)


def _key(module: str, leaf: str) -> str:
    """What PEFT calls a factor."""
    if module.rpartition(".")[2] in _EMBEDDINGS:
        return f"{module}.lora_embedding_{SIDES[leaf]}"
    return f"{module}.lora_{SIDES[leaf]}.weight"
