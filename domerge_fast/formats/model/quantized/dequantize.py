"""A quantized base as one of numbers: its weights in 16 bits, its config without quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ....storage.lazy import dtype_name
from ....storage.safetensors_file import FileTensor
from ..checkpoint import ORIGINAL, QUANTIZATION, Checkpoint, how_quantized, parts, refusal, told
from . import bitsandbytes, compressed, float4, float8, integers
from .dequantized import Dequantized, Parts, Scheme

__all__ = ["SCHEMES", "dequantized"]

SCHEMES: Mapping[str, Scheme] = {
    "bitsandbytes": bitsandbytes.SCHEME,
    "fp8": float8.SCHEME,
    "fbgemm_fp8": float8.SCHEME,
    "mxfp4": float4.SCHEME,
    "gptq": integers.GPTQ,
    "awq": integers.AWQ,
    "compressed-tensors": compressed.SCHEME,
}
"""By what config.json calls them."""

_OF_FEW_BITS = (torch.uint8, torch.int8, *float8.FLOATS_OF_8)
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Beside the weights, of nothing but the quantization."""


def dequantized(base: Checkpoint) -> Checkpoint | None:
    """The base with numbers in place of what is quantized, in the dtype of its config; None where
    it is not quantized, or in a way that is not known. OptionError where it is damaged or holds
    what is not known of its format."""
    how = how_quantized(base)
    scheme = SCHEMES.get(str(how.get("quant_method"))) if how else None
    if how is None or scheme is None:
        return None
    if strange := scheme.check(how):
        raise refusal(base.folder, f"is quantized ({told(how)}) with {strange}", ORIGINAL)
    found: dict[str, Dequantized] = {}
    used: set[str] = set()
    for of_one in _weights(base, how, scheme, used):
        suffix, weight = scheme.read(of_one)
        if (key := of_one.stem + suffix) in found:
            raise refusal(base.folder, f"stores {key!r} in two ways", ORIGINAL)
        found[key] = weight
    kept = {k: x for k, x in base.tensors.items() if k not in used and not _is_beside(k, scheme)}
    _check_left(base, kept, found, told(how))
    others = tuple(file for file in base.others if file.path.name not in _FILES)
    config, quantized = _without(base.config), told(how)
    tensors = {**kept, **found}
    return dataclasses.replace(
        base, config=config, tensors=tensors, others=others, quantized=quantized
    )


def _weights(
    base: Checkpoint, how: Mapping[str, Any], scheme: Scheme, used: set[str]
) -> Iterator[Parts]:
    """What is stored of each quantized weight; `used` gets the names."""
    tensors = {k: x for k, x in base.tensors.items() if isinstance(x, FileTensor)}
    for mark, suffixes in scheme.marks.items():
        for key in tensors:
            if key.endswith(mark) and key not in used and not _is_beside(key, scheme):
                stem = key.removesuffix(mark)
                own = {x: tensors[stem + x] for x in suffixes if stem + x in tensors}
                used.update(stem + x for x in own)
                yield Parts(base, stem, own, how, _written(base))


def _is_beside(key: str, scheme: Scheme) -> bool:
    return key.rpartition(".")[2] in scheme.beside


def _written(base: Checkpoint) -> torch.dtype:
    """The dtype that the config states of the model, bfloat16 where it does not."""
    stated = [part.get(x) for part in parts(base.config) for x in ("dtype", "torch_dtype")]
    named = (str(x).removeprefix("torch.") for x in stated if x is not None)
    return next((_DTYPES[name] for name in named if name in _DTYPES), torch.bfloat16)


def _check_left(
    base: Checkpoint,
    kept: Mapping[str, Any],
    found: Mapping[str, Dequantized],
    how: str,
) -> None:
    """OptionError for tensors that say more of a quantized weight than is known, and for others
    that may be quantized."""
    owners = {key.rpartition(".")[0] for key in found if key.endswith(".weight")}
    for key, tensor in sorted(kept.items()):
        owner, _, last = key.rpartition(".")
        beside = (owner in owners and last != "bias") or owner in found
        if beside or tensor.dtype in _OF_FEW_BITS:
            stored = f"{key!r} as {dtype_name(tensor.dtype)}"
            problem = f"stores {stored}, which is not known of what is quantized so ({how})"
            raise refusal(base.folder, problem, ORIGINAL)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what it says of the quantization."""
    found = {k: x for k, x in config.items() if k not in QUANTIZATION}
    if isinstance(text := config.get("text_config"), dict):
        found["text_config"] = {k: x for k, x in text.items() if k not in QUANTIZATION}
    return found
