"""How the tools that save a LoRA as one file spell its keys: the one table of endings.

A key is a module's path and an ending. Which tool's names a path has is told by how it begins; it
is never taken apart: where dots have become underscores only the model knows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "ALPHA",
    "BARE",
    "B_NORM",
    "COMFYUI",
    "DIFF",
    "DIFFUSERS",
    "DIFF_B",
    "DORA",
    "DOWN",
    "GRAMMARS",
    "KINDS",
    "KOHYA",
    "LOHA",
    "LOKR",
    "MID",
    "UP",
    "W_NORM",
    "XLABS",
    "Grammar",
    "Part",
    "names_of",
    "split",
]

DOWN, UP, MID, ALPHA, DIFF = "down", "up", "mid", "alpha", "diff"
"""The parts of a module: A, B, what LyCORIS puts between them for convolutions, its alpha, and all
of its update, which has no alpha."""
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
"""The parts of LyCORIS' other kinds of adapters (lycoris.py)."""
DORA = "dora_scale"
"""What the rows or columns of a weight are brought to, beside its factors (adapters/dora.py)."""
DIFF_B, W_NORM, B_NORM = "diff_b", "w_norm", "b_norm"
"""What else changes beside the factors of a module, or alone: biases, norms' weights and biases."""
KINDS = {
    part: kind
    for kind, parts in (("LoRA", (DOWN, UP, MID)), ("LoHa", LOHA), ("LoKr", LOKR), (DIFF, (DIFF,)))
    for part in parts
}
"""Of what kind of adapter a part is; all have the same alpha."""

KOHYA, DIFFUSERS, COMFYUI, XLABS, BARE = "kohya", "diffusers", "comfyui", "xlabs", "bare"
"""Whose names modules have: `lora_unet_…` with underscores; `unet.…` or `transformer.…`;
`diffusion_model.…`; `….processor.qkv_lora1`; the model's own without anything before them."""


@dataclass(frozen=True)
class Grammar:
    """A spelling that is written: the endings of A and B."""

    name: str
    down: str
    up: str


GRAMMARS = {
    grammar.name: grammar
    for grammar in (
        Grammar("lora_down", ".lora_down.weight", ".lora_up.weight"),
        Grammar("lora_A", ".lora_A.weight", ".lora_B.weight"),
        Grammar("lora.down", ".lora.down.weight", ".lora.up.weight"),
        Grammar("lora_A alone", ".lora_A", ".lora_B"),
        Grammar("down", ".down.weight", ".up.weight"),
    )
}
_READ = (
    # kohya's sd-scripts, musubi-tuner, LyCORIS, OneTrainer
    *(("lora_down", ".lora_down.weight", DOWN), ("lora_down", ".lora_up.weight", UP)),
    ("lora_down", ".lora_mid.weight", MID),
    # PEFT and what is made with it: diffusers, ai-toolkit, diffusion-pipe
    *(("lora_A", ".lora_A.weight", DOWN), ("lora_A", ".lora_B.weight", UP)),
    *(("lora_A", ".lora_A.default.weight", DOWN), ("lora_A", ".lora_B.default.weight", UP)),
    # Mochi
    *(("lora_A alone", ".lora_A", DOWN), ("lora_A alone", ".lora_B", UP)),
    # diffusers' convert_state_dict_to_diffusers, and before that for text encoders
    *(("lora.down", ".lora.down.weight", DOWN), ("lora.down", ".lora.up.weight", UP)),
    ("lora_A", ".lora_linear_layer.down.weight", DOWN),
    ("lora_A", ".lora_linear_layer.up.weight", UP),
    # LyCORIS
    *(("", f".{part}", part) for part in (*LOHA, *LOKR, DIFF, DIFF_B, W_NORM, B_NORM)),
    # all that have one
    *(("", ".alpha", ALPHA), ("", ".dora_scale", DORA)),
    *(("", f".lora_magnitude_vector{end}", DORA) for end in (".weight", "")),
)

_XLABS = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
_OF_PROCESSOR = re.compile(r"(.+)\.(\w+)_lora\.(down|up)\.weight")  # diffusers before 0.22
_IN_ATTENTION = {"to_out": "to_out.0"}
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET = re.compile(r"(?:down_blocks|mid_block|up_blocks)\.")

_FLAT = re.compile(r"(?:lora|lycoris)_[^.]*")
_COMPONENT = re.compile(r"(?:unet|prior|(?:transformer|text_encoder)(?:_\d)?)\..+")
_COMFYUI = re.compile(r"(?:(?:model\.)?diffusion_model|text_encoders)\..+")


@dataclass(frozen=True, slots=True)
class Part:
    """What a key is: a part of a module, in a grammar ("" where all have the key alike)."""

    module: str
    part: str
    grammar: str


def split(key: str) -> Part | None:
    """The module and the part that a key is of; None for an ending of no LoRA."""
    if found := _XLABS.fullmatch(key):
        return Part(found[1], found[2], "down")
    for grammar, ending, part in _READ:
        if key.endswith(ending) and key != ending:
            return Part(key[: -len(ending)], part, grammar)
    if found := _OF_PROCESSOR.fullmatch(key):
        return Part(_module(found[1], found[2]), found[3], "lora_A")
    return None


def _module(owner: str, layer: str) -> str:
    """What diffusers calls the layer now that an attention processor held."""
    if owner.endswith(".processor"):
        path = f"{owner.removesuffix('.processor')}.{_IN_ATTENTION.get(layer, layer)}"
        return f"unet.{path}" if _UNET.match(path) else path
    return f"{owner}.{_IN_TEXT.get(layer, layer)}"


def names_of(part: Part) -> str:
    """Whose names a module has."""
    if part.grammar == "down":
        return XLABS
    if _FLAT.fullmatch(part.module):
        return KOHYA
    if _COMPONENT.fullmatch(part.module):
        return DIFFUSERS
    return COMFYUI if _COMFYUI.fullmatch(part.module) else BARE
