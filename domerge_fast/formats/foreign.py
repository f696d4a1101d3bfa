"""Adapters of other tools than PEFT, told by what is in them, so that a refusal says what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import some
from ..storage.input_file import Refuse

__all__ = ["of_config", "of_file", "of_folder", "of_key"]

Told = tuple[str, str]  # problem, remedy

_PLAIN = "train or extract it as a plain LoRA"
_EXTRACT = "merge it into its model with the tool that made it, and extract a plain LoRA of that"
_LEAVE_OUT = "save it again without these tensors, if the rest is to be merged"
_MLX: Told = (
    "has factors of MLX, whose files are adapters.safetensors and adapter_config.json",
    "give a folder that has both, or a file called so beside its config",
)
_GGUF: Told = (
    "has names of GGUF, but is no GGUF file",
    "give that, or the PEFT folder that it was converted from",
)
_ALONE = "give the file, or its folder without adapter_config.json"
_DIFFUSERS: Told = ("is a diffusers LoRA file", _ALONE)
_KOHYA: Told = ("is a LoRA file of kohya's kind (ComfyUI, OneTrainer)", _ALONE)
_TORCHTUNE: Told = (
    "is a torchtune adapter, whose rows are ordered otherwise",
    "let its Hugging Face checkpointer save it, which writes a PEFT folder",
)
_PICKLE: Told = ("is a pickle, which can run code", "save it as safetensors")
_LITGPT: Told = ("is a LitGPT adapter", "merge it with litgpt merge_lora and export that")

_BY_KEY = [
    (re.compile(pattern), told)
    for pattern, told in (
        (
            r".+\.(?:hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))",
            ("is a file of LyCORIS LoHa or LoKr", _ALONE),
        ),
        (r".+\.(?:oft_blocks|oft_R\.weight|rescale)", ("is an OFT or BOFT", _EXTRACT)),
        (r".+\.on_input", ("is an IA3", _EXTRACT)),
        (r".+\.(?:[ab][12]|bm)\.weight", ("is a LyCORIS GLoRA", _EXTRACT)),
        (r".+\.(?:[qp]_layer\.weight|lambda_layer)", ("is a LyCORIS T-LoRA", _EXTRACT)),
        (
            r".+\.(?:set_weight|reshape_weight)|.+\.lora_B\.bias",
            ("sets weights or sizes of layers (ComfyUI, control LoRAs)", _LEAVE_OUT),
        ),
        (r"bundle_emb\..+", ("has trained embeddings in it (OneTrainer)", _LEAVE_OUT)),
        (r".+\.(?:diff|diff_b|w_norm|b_norm)", ("has full differences (ComfyUI, LyCORIS)", _PLAIN)),
        (r".+\.dora_scale", ("is a DoRA of kohya's kind (dora_scale)", _ALONE)),
        (r".+\.lora_(?:down|up|mid)\.weight|(?:lora|lycoris)_.+\.alpha", _KOHYA),
        (
            r".+\.processor\.(?:qkv|proj)_lora\d?\.(?:down|up)\.weight",
            ("is an XLabs LoRA file", _ALONE),
        ),
        (r".+(?:\.lora|_lora|\.lora_linear_layer)\.(?:down|up)\.weight", _DIFFUSERS),
        (r".+\.lora_[AB]\.weight\.alpha|.+\.alpha", _KOHYA),
        (r".+\.lora_[ab]\.weight", _TORCHTUNE),
        (r"(?:blk\.\d+|output|token_embd)\..*\.lora_[ab]", _GGUF),
        (r".+\.lora_[ab]", _MLX),
        (r".+\.lora_[AB]", ("has factors of LitGPT's or Mochi's kind (no .weight)", _ALONE)),
    )
]
_BY_NAME: list[tuple[str, Told]] = [
    ("*adapters.safetensors", _MLX),
    ("*.pth.lora", _LITGPT),
    ("adapter_*.pt", _TORCHTUNE),
    ("*.gguf", ("holds several GGUF files", "give one of them")),
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
    told = next((told for name, told in _BY_NAME if any(folder.glob(name))), None)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if told or len(files) < 2:
        return told
    return f"holds several files, and no adapter_config.json ({some(files)})", "give one of them"


def of_file(path: Path, refuse: Refuse) -> Told | None:
    """What a file is that no format recognises, by its name; refused if it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})", "check the file") from error
    told = next((told for name, told in _BY_NAME if path.match(name)), None)
    return told or (_PICKLE if path.suffix in (".bin", ".ckpt", ".pt", ".pth") else None)
