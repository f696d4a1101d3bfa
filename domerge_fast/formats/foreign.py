"""Adapters of other tools than PEFT, told by what is in them, so that a refusal says what it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..storage.input_file import Refuse
from ..storage.safetensors_file import SafetensorsFile

__all__ = ["of_config", "of_file", "of_folder", "of_key"]

Told = tuple[str, str]  # problem, remedy

_CONVERT = "convert it to a PEFT folder, or pass its factors by from_tensors"
_PLAIN = "train or extract it as a plain LoRA"
_MLX: Told = (
    "is an MLX adapter, whose factors lie the other way",
    f"{_CONVERT}, both transposed, with its scale",
)
_GGUF: Told = ("is in GGUF", "give the PEFT folder that it was converted from")
_DIFFUSERS: Told = ("is a diffusers LoRA file", f"{_CONVERT}, with scaling alpha / rank")
_KOHYA: Told = (
    "is a LoRA file of kohya's kind (ComfyUI, OneTrainer)",
    f"{_CONVERT}, with scaling alpha / rank",
)
_TORCHTUNE: Told = (
    "is a torchtune adapter, whose rows are ordered otherwise",
    "let its Hugging Face checkpointer save it, which writes a PEFT folder",
)
_LITGPT: Told = ("is a LitGPT adapter", "merge it with litgpt merge_lora and export that")

_BY_KEY = [
    (re.compile(pattern), told)
    for pattern, told in (
        (
            r".+\.(?:hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?)",
            ("is a LyCORIS LoHa or LoKr", _PLAIN),
        ),
        (r".+\.(?:oft_blocks|oft_R\.weight|on_input)", ("is no LoRA (OFT or IA3)", _PLAIN)),
        (r".+\.(?:[ab][12]|bm)\.weight", ("is a LyCORIS GLoRA", _PLAIN)),
        (r".+\.(?:diff|diff_b|w_norm|b_norm)", ("is a file of full differences (ComfyUI)", _PLAIN)),
        (r".+\.dora_scale", ("is a DoRA of kohya's kind (dora_scale)", _PLAIN)),
        (r".+\.lora_(?:down|up|mid)\.weight|(?:lora|lycoris)_.+\.alpha", _KOHYA),
        (
            r".+\.processor\.(?:qkv|proj)_lora\d?\.(?:down|up)\.weight",
            ("is an XLabs LoRA file", _CONVERT),
        ),
        (r".+(?:\.lora|_lora|\.lora_linear_layer)\.(?:down|up)\.weight", _DIFFUSERS),
        (r".+\.lora_[AB]\.weight\.alpha|.+\.alpha", _KOHYA),
        (r".+\.lora_[ab]\.weight", _TORCHTUNE),
        (r"(?:blk\.\d+|output|token_embd)\..*\.lora_[ab]", _GGUF),
        (r".+\.lora_[ab]", _MLX),
        (r".+\.lora_[AB]", ("has factors of LitGPT's or Mochi's kind (no .weight)", _CONVERT)),
    )
]
_IN_FILE = [
    (re.compile(r"(?:unet|transformer|text_encoder(?:_\d)?)\..+\.lora_[AB]\.weight"), _DIFFUSERS),
    (re.compile(r"(?:diffusion_model|text_encoders)\..+\.lora_[AB]\.weight"), _KOHYA),
]
_BY_NAME: list[tuple[str, Told]] = [
    ("*adapters.safetensors", _MLX),
    ("pytorch_lora_weights.safetensors", _DIFFUSERS),
    ("*.pth.lora", _LITGPT),
    ("adapter_*.pt", _TORCHTUNE),
    ("*.gguf", _GGUF),
]


def of_key(key: str) -> Told | None:
    """What an adapter with this tensor is, if it is known and not PEFT's."""
    return next((told for pattern, told in _BY_KEY if pattern.fullmatch(key)), None)


def of_config(raw: Mapping[str, Any]) -> Told | None:
    """What an adapter with this `adapter_config.json` is, if it is known and not PEFT's."""
    mlx = raw.keys() & {"fine_tune_type", "lora_parameters"}
    return _MLX if mlx and "peft_type" not in raw else None


def of_folder(folder: Path) -> Told | None:
    """What a folder without PEFT's files holds, by the names of the files."""
    return next((told for name, told in _BY_NAME if any(folder.glob(name))), None)


def of_file(path: Path, refuse: Refuse) -> Told | None:
    """What a single file is, by its first bytes and its tensors' names."""
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == b"GGUF"
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})", "check the file") from error
    if is_gguf:
        return _GGUF
    if path.suffix == ".safetensors":
        return _of_tensors(SafetensorsFile(path, refuse).tensors())
    return next((told for name, told in _BY_NAME if path.match(name)), None)


def _of_tensors(keys: Collection[str]) -> Told | None:
    for key in keys:
        if told := of_key(key):
            return told
    found = (told for pattern, told in _IN_FILE if any(map(pattern.fullmatch, keys)))
    return next(found, None)
