"""Base models in quantized formats that are damaged or not known: one line says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.make import PREFIX, random_factors, write_adapter
from torch import Tensor

import domerge_fast as dm
from domerge_fast import AdapterError, OptionError

NAME, OTHER = "layers.0.q_proj", "layers.0.k_proj"
SHAPES = {NAME: (8, 16)}


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


WEIGHT = f"{NAME}.weight"
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 16]}
PACKED = {
    f"{NAME}.qweight": torch.zeros(2, 8, dtype=torch.int32),
    f"{NAME}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
    f"{NAME}.scales": torch.ones(1, 8, dtype=torch.float16),
}
OF_AWQ = {
    f"{NAME}.qweight": torch.zeros(16, 1, dtype=torch.int32),
    f"{NAME}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
    f"{NAME}.scales": torch.ones(1, 8, dtype=torch.float16),
}
IN_FP8 = {WEIGHT: torch.zeros(8, 16).to(torch.float8_e4m3fn)}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
IN_8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
EIGHT = {WEIGHT: torch.zeros(8, 16, dtype=torch.int8), f"{NAME}.SCB": torch.ones(8)}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}}


def four(data: int = 64, blocks: int = 2, **state: Any) -> dict[str, Tensor]:
    """Of bitsandbytes, with so many bytes and scales."""
    text = json.dumps(STATE | state).encode()
    return {
        WEIGHT: bytes_of(data, 1),
        f"{WEIGHT}.absmax": torch.ones(blocks),
        f"{WEIGHT}.quant_map": torch.ones(16),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.tensor([*text], dtype=torch.uint8),
    }


def less(tensors: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: x for k, x in tensors.items() if k != key}


Case = tuple[Mapping[str, Tensor], dict[str, Any] | None, str]
BASES: dict[str, Case] = {
    "aqlm": (
        {f"{NAME}.codes": torch.zeros(8, 2, 1, dtype=torch.int8)},
        {"quant_method": "aqlm"},
        "not as 'layers.0.q_proj.weight': it is quantized (aqlm); give the model that it was made",
    ),
    "unstated": (PACKED, None, "it is quantized or changed; give the base in float32, float16"),
    "fewer bytes": (four(60), BITSANDBYTES, "q_proj.weight' as uint8 [60, 1], which its weight"),
    "fewer scales": (four(64, 1), BITSANDBYTES, "weight.absmax' as float32 [1], which its weight"),
    "no map": (
        less(four(), f"{WEIGHT}.quant_map"),
        BITSANDBYTES,
        "has no 'layers.0.q_proj.weight.q",
    ),
    "another kind": (four(quant_type="fp4"), BITSANDBYTES, "that does not describe a weight"),
    "a block of 0": (four(blocksize=0), BITSANDBYTES, "that does not describe a weight"),
    "an odd block": (four(blocksize=63), BITSANDBYTES, "that does not describe a weight"),
    "no sizes": (four(shape=None), BITSANDBYTES, "that does not describe a weight"),
    "no number": (four(nested_offset="x"), BITSANDBYTES, "that does not describe a weight"),
    "other numbers": (
        less(four(), f"{WEIGHT}.quant_state.bitsandbytes__nf4"),
        BITSANDBYTES,
        "stores 'layers.0.q_proj.weight' as uint8, which is not known of what is quantized so",
    ),
    "more of it": (
        EIGHT | {f"{NAME}.rotation": torch.ones(8, 8)},
        IN_8,
        "stores 'layers.0.q_proj.rotation' as float32, which is not known of what is quantized so",
    ),
    "tiles": (
        EIGHT | {f"{NAME}.weight_format": torch.tensor(1, dtype=torch.uint8)},
        IN_8,
        "in a layout of one kind of GPU",
    ),
    "short SCB": (EIGHT | {f"{NAME}.SCB": torch.ones(7)}, IN_8, "SCB' as float32 [7], which its"),
    "fp8": (IN_FP8, {"quant_method": "fp8"}, "as float8_e4m3fn, which is not known of what is"),
    "fp8 blocks": (
        IN_FP8 | {f"{NAME}.weight_scale_inv": torch.ones(2, 2)},
        {"quant_method": "fp8", "weight_block_size": [4, 4]},
        "as [2, 2] for a weight [8, 16] in blocks of [4, 4]",
    ),
    "fp8 unstated blocks": (
        IN_FP8 | {f"{NAME}.weight_scale_inv": torch.ones(2, 2)},
        {"quant_method": "fp8"},
        "as [2, 2] for a weight [8, 16]; give the model",
    ),
    "fp8 bytes": (
        IN_FP8 | {f"{NAME}.weight_scale": bytes_of(8, 1)},
        {"quant_method": "fp8"},
        "weight_scale' as uint8 [8, 1], which its weight cannot have",
    ),
    "fp8 block": (
        IN_FP8 | {f"{NAME}.weight_scale": torch.ones(1)},
        {"quant_method": "fp8", "weight_block_size": [0, 4]},
        "with weight_block_size=[0, 4]",
    ),
    "marlin": (
        PACKED,
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "is quantized (gptq, 4 bits) with checkpoint_format=marlin; give the model",
    ),
    "gptq of 3 bits": (
        PACKED
        | {f"{NAME}.qweight": torch.zeros(3, 32, dtype=torch.int32)}
        | {f"{NAME}.qzeros": torch.zeros(1, 3, dtype=torch.int32)}
        | {f"{NAME}.scales": torch.ones(1, 32)},
        {"quant_method": "gptq", "bits": 3},
        "in shapes that do not belong together (.qweight [3, 32], .qzeros [1, 3], .scales [1, 32])",
    ),
    "gptq zeros": (
        PACKED | {f"{NAME}.qzeros": torch.full((1, 1), -1, dtype=torch.int32)},
        {"quant_method": "gptq", "bits": 4},
        "stores zeros in 'layers.0.q_proj.qzeros' that programs read in two ways",
    ),
    "gptq groups": (
        PACKED | {f"{NAME}.g_idx": torch.ones(16, dtype=torch.int32)},
        {"quant_method": "gptq", "bits": 4},
        "in shapes that do not belong together",
    ),
    "gemv": (OF_AWQ, {"quant_method": "awq", "version": "gemv"}, "(awq) with version=gemv; give"),
    "awq": (
        OF_AWQ | {f"{NAME}.scales": torch.ones(3, 8)},
        {"quant_method": "awq"},
        "in shapes that do not belong together",
    ),
    "rotated": (
        IN_FP8 | {f"{NAME}.weight_scale": torch.ones(8, 1)},
        COMPRESSED | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        "with a transform_config",
    ),
    "sparse": (
        {f"{NAME}.compressed": torch.zeros(64), f"{NAME}.bitmask": bytes_of(8, 2)}
        | {f"{NAME}.weight_scale": torch.ones(8, 1)},
        COMPRESSED,
        "has a 'layers.0.q_proj.weight_scale' without a weight",
    ),
}


def base(folder: Path, tensors: Mapping[str, Tensor], how: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file({**tensors, f"{OTHER}.weight": torch.ones(8, 16)}, folder / "model.safetensors")
    config = {"tie_word_embeddings": False} | ({"quantization_config": how} if how else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", BASES)
def test_what_is_damaged_or_not_known_is_one_line(case, tmp_path):
    tensors, how, said = BASES[case]
    adapter = write_adapter(tmp_path / "a", random_factors(SHAPES, 2))
    given = {"form": "model", "base": base(tmp_path / "base", tensors, how)}
    with pytest.raises(OptionError) as caught:
        dm.merge([adapter], "linear", output=tmp_path / "out", **given)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_quantized_take_updates(tmp_path):
    """As those of gpt-oss beside its experts: what is quantized stays as it is."""
    tensors, how = IN_FP8, {"quant_method": "fp8"}
    place = base(tmp_path / "base", tensors, how)
    adapter = write_adapter(tmp_path / "a", random_factors({OTHER: (8, 16)}, 2))
    dm.merge([adapter], "linear", form="model", base=place, output=tmp_path / "out")
    before, after = (load_file(x / "model.safetensors") for x in (place, tmp_path / "out"))
    assert not torch.equal(before[f"{OTHER}.weight"], after[f"{OTHER}.weight"])
    key = f"{NAME}.weight"
    assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == how


def test_a_dora_of_a_quantized_weight_is_refused(tmp_path):
    """Its numbers are no weights without their scales."""
    adapter = write_adapter(tmp_path / "a", random_factors(SHAPES, 2), use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"{PREFIX}{NAME}.lora_magnitude_vector"] = torch.ones(8)
    save_file(tensors, adapter / "adapter_model.safetensors")
    stated = {"quant_method": "aqlm"}
    given = {"form": "deltas", "base": base(tmp_path / "base", IN_FP8, stated)}
    with pytest.raises(AdapterError, match="a DoRA of a weight that the base has as float8_e4m3fn"):
        dm.merge([adapter], "linear", output=tmp_path / "out", **given)
