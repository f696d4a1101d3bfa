"""Reads a LoRA in GGUF: what llama.cpp's converter makes of PEFT's, and what is written here.

`<tensor>.lora_a` is A [r, n] and `<tensor>.lora_b` is B [m, r]; of the token embedding A is stored
transposed. The scale is alpha over the rank, and 1 where alpha is 0 or missing (llama.cpp,
`llama_adapter_lora_weight::get_scale`). Rows of B go back to the model's own order, for which the
number of heads has to be known: from the file, where it was written here, or from the base model's
config.json beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...adapters import Adapter, AdapterConfig, LazyTensor, Style
from ...errors import AdapterError
from ...storage import json_file
from ...storage.garbage import uncollected
from ...storage.gguf_file import MAGIC, GgufFile
from ...storage.input_file import InputFile, Refuse
from ...storage.lazy import Turned
from ..model.checkpoint import CONFIG
from ..peft.assemble import assemble
from .architectures import (
    ARCHITECTURES,
    LAYERS,
    OUTER,
    Model,
    Unknown,
    is_count,
    module_of,
    of_config,
    tensors,
)

__all__ = ["ALPHA", "FORMAT", "HEADS", "KIND", "OF_ADAPTER", "SPELLING", "find", "load", "model_of"]

FORMAT = "gguf"
KIND, OF_ADAPTER, ALPHA = "general.type", "adapter.type", "adapter.lora.alpha"
ARCHITECTURE = "general.architecture"
SPELLING = "domerge_fast.name."
"""Before what transformers calls the layers, and the modules that are in none: what they were
called by the adapters of a merge, where that is something else."""
HEADS = "{}.attention.head_count", "{}.attention.head_count_kv"
_ALORA = "adapter.alora.invocation_tokens"
_SUFFIX = ".gguf"
_KEY = re.compile(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.weight\.lora_([ab])")
_FROM_PEFT = "merge the PEFT folder that it was converted from"


def find(path: Path) -> Path | None:
    """The file of an adapter: itself, by its name or its first bytes, or the only one in a
    folder."""
    if os.path.isdir(path):
        inside = [file for file in path.glob(f"*{_SUFFIX}") if os.path.isfile(file)]
        return inside[0] if len(inside) == 1 else None
    return path if os.path.isfile(path) and _is_gguf(path) else None


def _is_gguf(path: Path) -> bool:
    if path.suffix == _SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@uncollected()
def load(path: Path, name: str) -> Adapter:
    """The adapter in a file, or in a folder with one; factors stay on disk. AdapterError for
    whatever cannot be merged exactly."""
    refuse = functools.partial(AdapterError, name, None)
    file = GgufFile(find(path) or path, refuse)
    file.read_header()
    _check_kind(file.metadata, refuse)
    model, config = _model(file, refuse)
    called = _spelling(file.metadata, refuse)
    named: dict[str, LazyTensor] = {}
    for key, tensor in file.tensors().items():
        named |= _factor(name, model, called, key, tensor)
    alpha = file.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float):
        raise refuse(f"{ALPHA} is {str(alpha)[:40]!r}, no float", _FROM_PEFT)
    inputs = (file.input, *config)
    found = assemble(
        name,
        AdapterConfig(task_type="CAUSAL_LM"),
        named,
        lambda module, rank: alpha / rank if alpha else 1.0,
        inputs,
    )
    return dataclasses.replace(found, style=_style(model))


def _check_kind(metadata: Mapping[str, object], refuse: Refuse) -> None:
    if metadata.get(KIND) != "adapter":
        problem = f"is no adapter (general.type is {str(metadata.get(KIND))[:40]!r})"
        raise refuse(problem, "give a LoRA, as llama.cpp's --lora takes it")
    if metadata.get(OF_ADAPTER) != "lora":
        problem = f"is an adapter of the type {str(metadata.get(OF_ADAPTER))[:40]!r}"
        raise refuse(problem, "only LoRA can be merged")
    if _ALORA in metadata:
        raise refuse("is an aLoRA, active on some tokens only", "train it as a plain LoRA")


def _model(file: GgufFile, refuse: Refuse) -> tuple[Model, tuple[InputFile, ...]]:
    """What the adapter is of, and the base's config.json where that had to be read."""
    stated = file.metadata.get(ARCHITECTURE)
    known = next((x for x in ARCHITECTURES.values() if x.name == stated), None)
    if known is None:
        problem = f"is of the architecture {str(stated)[:40]!r}, whose weights may lie otherwise"
        raise refuse(problem, _FROM_PEFT)
    of_queries, of_keys = (file.metadata.get(key.format(known.name)) for key in HEADS)
    if not known.ordered:
        return Model(known), ()
    if is_count(of_queries) and is_count(of_keys):
        return Model(known, (of_queries, of_keys)), ()
    config = InputFile(file.path.parent / CONFIG, refuse)
    if not os.path.isfile(config.path):
        problem = "does not say the number of attention heads, by which its rows are ordered"
        raise refuse(problem, f"put the base model's {CONFIG} beside it")
    try:
        found = of_config(json_file.read_object(config, json_file.CONFIG_BYTES))
    except Unknown as error:
        raise refuse(f"{CONFIG} beside it {error}", "put the base model's own there") from error
    if found.architecture.name != known.name:
        problem = f"is of {known.name!r}, {CONFIG} beside it of {found.architecture.name!r}"
        raise refuse(problem, "put the base model's own there")
    return Model(known, found.heads), (config,)


def _spelling(metadata: Mapping[str, object], refuse: Refuse) -> dict[str, str]:
    """What the adapters of a merge that was written here called the layers and what is in none."""
    found = {}
    for place in (LAYERS, *OUTER):
        name = found[place] = metadata.get(f"{SPELLING}{place}", place)
        whole = f"{name}.0.x" if place == LAYERS else name
        expected = ("0", "x") if place == LAYERS else ("", place)
        if not isinstance(whole, str) or module_of(whole) != expected:
            raise refuse(f"calls {place!r} {str(name)[:40]!r}", "write it again")
    return {place: str(name) for place, name in found.items()}


def _factor(
    adapter: str, model: Model, called: Mapping[str, str], key: str, x: LazyTensor
) -> dict[str, LazyTensor]:
    """A tensor as PEFT calls it, and with the model's own order of rows."""
    matched = _KEY.fullmatch(key)
    number, stored, side = matched.groups() if matched else (None, "", "")
    of_stored = {name: module for module, name in tensors(model.architecture).items()}
    module = of_stored.get(stored)
    if module is None or (number is None) != (module in OUTER):
        problem = f"has tensor {key!r}, which is no factor of a layer that is stored as it is"
        raise AdapterError(adapter, None, problem, _FROM_PEFT)
    if len(x.shape) != 2:
        raise AdapterError(adapter, None, f"{key!r} is no matrix ({list(x.shape)})", _FROM_PEFT)
    if stored == "token_embd":
        turned = Turned(x) if side == "a" else x
        return {f"{called[module]}.lora_embedding_{side.upper()}": turned}
    if side == "b":
        x = _in_order(adapter, model, module, key, x)
    name = called[module] if number is None else f"{called[LAYERS]}.{number}.{module}"
    return {f"{name}.lora_{side.upper()}.weight": x}


def _in_order(adapter: str, model: Model, module: str, key: str, b: LazyTensor) -> LazyTensor:
    """B with its rows as the model has them."""
    try:
        order = model.order(module, b.shape[0])
    except Unknown as error:
        remedy = f"correct the number of heads in {CONFIG}"
        raise AdapterError(adapter, None, f"{key!r}: {error}", remedy) from error
    return b if order is None else Reordered(b, torch.argsort(order))


def _style(model: Model) -> Style:
    """What a writer needs to give back the same."""
    said = {"architecture": model.architecture.name}
    if model.heads:
        said |= dict(zip(("heads", "heads_kv"), map(str, model.heads)))
    return Style(FORMAT, metadata=said)


def model_of(style: Style) -> Model:
    """The model that an adapter of this style is of."""
    said = style.metadata
    known = next(x for x in ARCHITECTURES.values() if x.name == said["architecture"])
    heads = (int(said["heads"]), int(said["heads_kv"])) if "heads" in said else None
    return Model(known, heads)


@dataclass(frozen=True, slots=True, eq=False)
class Reordered:
    """The rows of a stored matrix in another order: row k is that at places[k]. All of it is read
    for a part."""

    whole: LazyTensor
    places: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def read(self) -> Tensor:
        return self.whole.read()[self.places]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.whole.read()[self.places[start:stop]]
