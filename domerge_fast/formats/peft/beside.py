"""What PEFT stores beside factors: a bias on B (`lora_bias`), and rows of embeddings
(`trainable_token_indices`).

A bias b on B adds scaling * b to the bias of its layer. Trained rows are stored as they became, in
the order of the config's indices, which are one list for the input embedding, or a list for each of
several parameters by the end of their module's name; of tied weights both may have the same rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...adapters.adapter import Module, TokenRows
from ...adapters.differences import Scaled
from ...adapters.names import EMBEDDINGS, HEADS, PREFIX
from ...errors import AdapterError
from ...storage.lazy import LazyTensor, MemoryTensor, dtype_name
from ...storage.made import Vector
from ..target import Target

__all__ = ["INDICES", "Beside", "check_indices", "fields", "written"]

INDICES = "trainable_token_indices"
_BIAS = re.compile(r"(.+)\.lora_B\.(?:(.+)\.)?bias")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.(.+))?")
_BEFORE = re.compile(r"(.+)\.token_adapter\.base_layer\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)(.+?))?(?:\.weight)?")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CORRECT = f"correct {INDICES} in adapter_config.json, or save the adapter again"


@dataclass(frozen=True)
class Beside:
    """What an adapter stores so. biases: by module. rows: by module. before: the parameter that
    rows were trained of, as it was, by module. magnitudes: of a DoRA, by module. owners: names of
    adapters in keys, and the key."""

    adapter: str
    biases: dict[str, LazyTensor] = field(default_factory=dict)
    rows: dict[str, LazyTensor] = field(default_factory=dict)
    before: dict[str, LazyTensor] = field(default_factory=dict)
    magnitudes: dict[str, LazyTensor] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def take(self, path: str, tensor: LazyTensor) -> bool:
        """Whether a tensor of this name (without prefix) is one of these, and is kept then."""
        pairs = (
            *((_BIAS, self.biases), (_ROWS, self.rows), (_BEFORE, self.before)),
            (_MAGNITUDE, self.magnitudes),
        )
        for pattern, found in pairs:
            if matched := pattern.fullmatch(path):
                if matched[1] in found:
                    problem = f"stores {path!r} twice"
                    raise AdapterError(self.adapter, matched[1], problem, "save it again")
                found[matched[1]] = tensor
                if pattern.groups > 1 and matched[2]:
                    self.owners.setdefault(matched[2], path)
                return True
        return False

    def differences(self, modules: Mapping[str, Module], states: bool) -> dict[str, LazyTensor]:
        """The changes of biases. states: whether the config says that there are such."""
        if states != bool(self.biases):
            problem = "has a bias on B, and lora_bias is not true in its config"
            if states:
                problem = "states lora_bias, but stores no bias on B"
            module = min(self.biases, default=None)
            raise AdapterError(self.adapter, module, problem, "save the adapter again with PEFT")
        return {f"{k}.bias": self._bias(k, modules.get(k)) for k in sorted(self.biases)}

    def _bias(self, name: str, module: Module | None) -> LazyTensor:
        bias = self.biases[name]
        if module is None or module.slice or module.kind == "embedding":
            problem = "has a bias on B, which is of no linear layer or convolution"
            raise AdapterError(self.adapter, name, problem, "save the adapter again with PEFT")
        if bias.dtype not in _FLOATS or bias.shape != (module.m,):
            problem = f"has a bias on B of {dtype_name(bias.dtype)} {list(bias.shape)}, its layer "
            problem += f"has {module.m} outputs"
            raise AdapterError(self.adapter, name, problem, "save the adapter again with PEFT")
        return Scaled(bias, module.scaling)

    def magnitudes_of(self, modules: Mapping[str, Module], states: bool) -> dict[str, LazyTensor]:
        """The magnitudes of a DoRA. states: whether the config says that it is one."""
        if states != bool(self.magnitudes):
            problem = "is a DoRA (lora_magnitude_vector), and its config does not say so (use_dora)"
            if states:
                problem = "is a DoRA (use_dora), but stores no lora_magnitude_vector"
            module = min(self.magnitudes, default=None)
            raise AdapterError(self.adapter, module, problem, "save the adapter again with PEFT")
        if odd := sorted(self.magnitudes.keys() ^ modules.keys()) if states else []:
            problem = "has magnitudes of a DoRA without factors, or factors without them"
            raise AdapterError(self.adapter, odd[0], problem, "save the adapter again with PEFT")
        for name, x in self.magnitudes.items():
            if x.dtype not in _FLOATS or math.prod(x.shape) != modules[name].m:
                problem = f"has magnitudes of {dtype_name(x.dtype)} {list(x.shape)}, its layer has "
                problem += f"{modules[name].m} outputs"
                remedy = "save the adapter again with PEFT"
                raise AdapterError(self.adapter, name, problem, remedy)
        return {name: Vector(x) for name, x in self.magnitudes.items()}

    def token_rows(self, indices: Any) -> dict[str, TokenRows]:
        """The trained rows, by the names of their parameters. indices: as the config has them."""
        if indices and not self.rows:
            problem = f"states {INDICES}, but stores no rows"
            raise AdapterError(self.adapter, None, problem, _CORRECT)
        tied = isinstance(indices, list) and len(self.rows) > 1
        names = [n for n in sorted(self.rows) if not (tied and n.rpartition(".")[2] in HEADS)]
        return {f"{name}.weight": self._rows(name, indices) for name in names}

    def _rows(self, name: str, indices: Any) -> TokenRows:
        found, rows = indices, self.rows[name]
        if isinstance(indices, dict):
            fits = [x for end, x in indices.items() if name.endswith(end)]
            found = fits[0] if len(fits) == 1 else None
        if not isinstance(found, list):
            problem = f"stores trained rows, and {INDICES} does not say of which tokens"
            raise AdapterError(self.adapter, name, problem, _CORRECT)
        if rows.dtype not in _FLOATS or len(rows.shape) != 2 or rows.shape[0] != len(found):
            problem = f"stores trained rows of {dtype_name(rows.dtype)} {list(rows.shape)}, "
            problem += f"{INDICES} has {len(found)}"
            raise AdapterError(self.adapter, name, problem, _CORRECT)
        return TokenRows(tuple(found), rows)

    def originals(self) -> dict[str, LazyTensor]:
        """Parameters as they were before rows of them were trained."""
        return {f"{name}.weight": x for name, x in self.before.items() if name in self.rows}


def check_indices(indices: Any, adapter: str) -> None:
    """AdapterError unless they are lists of different rows."""
    lists = [*indices.values()] if isinstance(indices, dict) else [indices]
    for found in lists if indices is not None else []:
        are = isinstance(found, list) and found and all(type(t) is int and t >= 0 for t in found)
        if not are or len(set(found)) < len(found):
            problem = f"has {INDICES}={str(indices)[:60]}, not lists of different whole numbers"
            raise AdapterError(adapter, None, problem, _CORRECT)


def written(target: Target) -> Iterator[tuple[str, LazyTensor]]:
    """What a merged adapter stores so, by key: a bias for every module that may have one, if there
    is any, because PEFT asks for all; and the trained rows."""
    differences = target.changes.differences
    for layout in target.layouts.values() if differences else ():
        if layout.kind != "embedding" and not layout.slice:
            change, key = (
                differences.get(f"{layout.name}.bias"),
                f"{PREFIX}{layout.name}.lora_B.bias",
            )
            zeros = MemoryTensor(torch.zeros(layout.m, dtype=target.dtype))
            yield key, change.times(1 / target.scale(layout.name)) if change else zeros
    for name, tokens in target.changes.tokens.items():
        key = f"{PREFIX}{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"
        yield key, MemoryTensor(tokens.trained())


def fields(target: Target) -> dict[str, object]:
    """What the config says of them."""
    found: dict[str, object] = {}
    if target.changes.differences:
        found["lora_bias"] = True
    if target.changes.tokens:
        at = {name.removesuffix(".weight"): [*x.at] for name, x in target.changes.tokens.items()}
        inputs = len(at) == 1 and next(iter(at)).rpartition(".")[2] in EMBEDDINGS
        found[INDICES] = next(iter(at.values())) if inputs else at
    return found
