"""Adapters of other tools are refused by what they are, with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.make import random_factors, write_adapter, write_folder

from domerge_fast.errors import AdapterError
from domerge_fast.formats import load

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
IN_PEFT = {
    "lora_unet_proj.diff_b": "differences",
    "lycoris_lin.hada_w1_a": "LyCORIS LoHa or LoKr",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w2_b": "LyCORIS LoHa or LoKr",
    "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": "kohya's kind",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "kohya's kind",
    "transformer.blocks.0.attn.to_q.alpha": "kohya's kind",
    f"unet.{UNET}.processor.to_q_lora.down.weight": "diffusers",
    f"unet.{UNET}.to_q.lora.up.weight": "diffusers",
    "text_encoder.text_model.layers.0.mlp.fc1.lora_linear_layer.down.weight": "diffusers",
    "double_blocks.0.processor.qkv_lora1.down.weight": "XLabs",
    "lora_unet_proj.dora_scale": "DoRA of kohya's kind",
    "transformer.h.0.attn.qkv.lora_A": "LitGPT's or Mochi's",
}
FILES = {
    "lycoris_lin.a1.weight": "GLoRA",
    "lora_unet_proj.oft_blocks": "OFT or BOFT",
    "lora_unet_proj.diff_b": "has no LoRA factors",
    "model.layers.2.self_attn.q_proj.lora_a": "MLX",
    "blk.0.attn_q.weight.lora_a": "GGUF",
    "layers.0.attn.q_proj.lora_a.weight": "torchtune",
}


def refusal(path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        load(path, name="mine")
    message = str(caught.value)
    assert message.startswith("adapter 'mine'")
    assert "; " in message
    return message


@pytest.mark.parametrize("key", FILES)
def test_a_single_file_is_known_by_its_tensors(key, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "some.safetensors")
    assert FILES[key] in refusal(tmp_path / "some.safetensors")


@pytest.mark.parametrize("key", FILES | IN_PEFT)
def test_so_are_its_tensors_in_a_folder_of_peft(key, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    message = refusal(write_folder(tmp_path, {key: torch.ones(2, 2)}, config))
    assert (FILES | IN_PEFT)[key] in message
    assert repr(key)[:40] in message


def test_gguf_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "adapter").write_bytes(b"GGUF\x03\0\0\0")
    assert "is truncated" in refusal(tmp_path / "adapter")
    (tmp_path / "some.gguf").write_bytes(b"x")
    assert "is truncated" in refusal(tmp_path / "some.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGML" + bytes(60))
    assert "is no GGUF file" in refusal(tmp_path / "other.gguf")
    assert "holds several GGUF files; give one of them" in refusal(tmp_path)


@pytest.mark.parametrize("weights", ["0000100_adapters.safetensors", None])
@pytest.mark.parametrize("config", [{"fine_tune_type": "lora"}, {"lora_parameters": {}}, None])
def test_mlx_is_known_by_its_config_or_its_weights(weights, config, tmp_path):
    if weights:
        save_file({"a.lora_a": torch.ones(4, 2)}, tmp_path / weights)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert ("MLX" in message) == bool(weights or config)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_lora_weights.safetensors", "is truncated or no safetensors file"),
        ("lit_model.pth.lora", "LitGPT"),
        ("adapter_0.pt", "torchtune"),
        ("some.gguf", "is truncated"),
        ("other.txt", "has no adapter_config.json"),
    ],
)
def test_folders_are_known_by_their_files(name, said, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    assert said in refusal(tmp_path)


def test_a_folder_of_several_files_says_so(tmp_path):
    for name in ("a", "b"):
        save_file({"lora_x.alpha": torch.ones(())}, tmp_path / f"{name}.safetensors")
    said = "holds several files, and no adapter_config.json (a.safetensors, b.safetensors)"
    assert f"{said}; give one of them" in refusal(tmp_path)


def test_torchtune_s_own_weights_beside_a_config_of_peft(tmp_path):
    folder = write_adapter(tmp_path / "a", random_factors({"q": (4, 4)}, 2))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.pt")
    assert "torchtune" in refusal(folder)


def test_peft_s_own_file_is_a_file_in_its_folder(tmp_path):
    folder = write_adapter(tmp_path / "a", random_factors({"q": (4, 4)}, 2))
    message = refusal(folder / "adapter_model.safetensors")
    assert message == "adapter 'mine': is a file; give the folder that holds adapter_config.json"
    (tmp_path / "empty.ckpt").write_bytes(b"")
    assert "is a pickle, which can run code; save" in refusal(tmp_path / "empty.ckpt")
