"""Which models llama.cpp stores as transformers does, but for names and the order of some rows.

Names are those of the package gguf (`get_tensor_name_map`). llama.cpp's converter orders the rows
of q and k of Llama and what is built like it for another way of rotary embedding: within a head of
d rows, row (j, i) of [2, d/2] becomes row (i, j). A's rows are ranks, and stay. Models of which it
changes other weights too are not in the table: they are refused by name. Source: llama.cpp,
convert_hf_to_gguf.py (`LlamaModel.permute`, and each model's `modify_tensors`), read in 2026.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...adapters.stems import core_of, split
from ...errors import DomergeError
from ..model.checkpoint import parts

__all__ = [
    "ARCHITECTURES",
    "LAYERS",
    "OUTER",
    "Architecture",
    "Model",
    "Unknown",
    "is_count",
    "module_of",
    "of_config",
    "tensors",
]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = tuple(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down"))
OUTER = ("model.embed_tokens", "lm_head")
"""The modules that are in no layer."""
LAYERS = "model.layers"
"""What transformers' classes call the list of layers."""

_ORDERED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1}
"""Of the modules that have their rows in another order, which of `Model.heads` counts."""


class Unknown(ValueError):
    """``str(error)`` says in a few words what a model is that is not understood, or lacks."""


@dataclass(frozen=True)
class Architecture:
    """name: what GGUF calls it. ordered: whether rows of q and k have llama.cpp's order. modules:
    the linear ones of a layer that it stores as they are."""

    name: str
    ordered: bool = False
    modules: tuple[str, ...] = _GATED


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", ordered=True),
    "MistralForCausalLM": Architecture("llama", ordered=True),
    "MixtralForCausalLM": Architecture("llama", ordered=True, modules=_ATTENTION),
    "GraniteForCausalLM": Architecture("granite", ordered=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", ordered=True),
    "ArceeForCausalLM": Architecture(
        "arcee", ordered=True, modules=(*_ATTENTION, "mlp.up_proj", "mlp.down_proj")
    ),
    "OlmoForCausalLM": Architecture("olmo", ordered=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2"),
    "SeedOssForCausalLM": Architecture("seed_oss"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe", modules=(*_ATTENTION, "mlp.gate", *_SHARED)),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", modules=(*_ATTENTION, "mlp.gate")),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "Gemma3ForConditionalGeneration": Architecture("gemma3"),
    "CohereForCausalLM": Architecture("command-r"),
    "Cohere2ForCausalLM": Architecture("cohere2"),
    "GptOssForCausalLM": Architecture("gpt-oss", modules=(*_ATTENTION, "mlp.router")),
    "PhiForCausalLM": Architecture(
        "phi2", modules=(*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        modules=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2", modules=(*_ATTENTION, "mlp.c_fc", "mlp.c_proj")
    ),
}
"""By the class of transformers, as a config's `architectures` names it."""


@dataclass(frozen=True)
class Model:
    """heads: of queries, and of keys and values; None where they do not matter. tied: whether its
    output head is its input embedding; None where nothing says it."""

    architecture: Architecture
    heads: tuple[int, int] | None = None
    tied: bool | None = None

    def order(self, module: str, m: int) -> Tensor | None:
        """Which of the m rows of B of a module in a layer comes where in GGUF; None where they
        stay. Unknown where they cannot be counted."""
        if not self.architecture.ordered or module not in _ORDERED:
            return None
        assert self.heads
        heads = self.heads[_ORDERED[module]]
        if m % (2 * heads):
            raise Unknown(f"its {m} outputs are not those of {heads} attention heads")
        return torch.arange(m).view(heads, 2, -1).transpose(1, 2).flatten()


def of_config(config: Mapping[str, Any]) -> Model:
    """The model that a `config.json` of transformers is of; Unknown for what it says or lacks
    instead."""
    stated = {k: v for part in parts(config) for k, v in part.items() if v is not None}
    classes = stated.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise Unknown("names no architecture (architectures)")
    if classes[0] not in ARCHITECTURES:
        raise Unknown(f"is of {classes[0]}, which llama.cpp may store otherwise")
    heads = stated.get("num_attention_heads")
    of_keys = stated.get("num_key_value_heads", heads)
    architecture, tied = ARCHITECTURES[classes[0]], bool(stated.get("tie_word_embeddings", True))
    if not architecture.ordered:
        return Model(architecture, None, tied)
    if is_count(heads) and is_count(of_keys):
        return Model(architecture, (heads, of_keys), tied)
    raise Unknown("does not say the number of attention heads (num_attention_heads)")


def is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


@functools.cache
def tensors(architecture: Architecture) -> Mapping[str, str]:
    """What GGUF calls the weights of modules, by the modules' names: those of a layer within it,
    and after "blk.N."; the embedding and the output head in whole."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture.name not in numbers:
        raise DomergeError(f"the package gguf does not know {architecture.name!r}; update it")
    known = gguf.get_tensor_name_map(numbers[architecture.name], 1)
    paths = {f"{LAYERS}.0.{x}": x for x in architecture.modules} | {x: x for x in OUTER}
    found = ((module, known.get_name(path)) for path, module in paths.items())
    return {module: name.removeprefix("blk.0.") for module, name in found if name}


def module_of(name: str) -> tuple[str, str] | None:
    """A module's layer, "" for none, and its name in it, however the class that it was saved from
    calls what is around the layers; None for one of another part of the model."""
    stem, rest = split(name)
    core = core_of(stem)
    if rest and core == ("layers",):
        number, _, module = rest.partition(".")
        return number, module
    outer = next((x for x in OUTER if not rest and core == core_of(x)), None)
    return ("", outer) if outer else None
