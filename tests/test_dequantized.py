"""Quantized bases that libraries made, merged into models of 16 bits, against the libraries' own
numbers plus ΔW in float64, and against PEFT's adapter on the quantized model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.trained import trained
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import domerge_fast as dm

functional = pytest.importorskip("bitsandbytes.functional")

pytestmark = pytest.mark.filterwarnings("ignore")

HALF_STEP = 2.0**-8
"""What rounding to bfloat16 may move a number by, relative to it."""

MODULES = ["q_proj", "v_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The model before quantization, and two adapters of it."""
    place = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(place / "base")
    for k in range(2):
        trained(model.float(), k, place / f"adapter{k}", target_modules=MODULES)
    return place


def updates(folder: Path, weight: float) -> dict[str, Tensor]:
    """w ΔW in float64 by the weights' names."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            a, b = tensors[key].double(), tensors[f"{stem}.lora_B.weight"].double()
            scaling = weight * config["lora_alpha"] / config["r"]
            found[f"{stem.removeprefix('base_model.model.')}.weight"] = scaling * b @ a
    return found


def four_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By bitsandbytes, in float32."""
    found = {}
    for key in tensors:
        if ".quant_state." in key:
            stem = key.partition(".quant_state.")[0]
            own = {k: x for k, x in tensors.items() if k.startswith(f"{stem}.")}
            state = functional.QuantState.from_dict(own, torch.device("cpu"))
            found[stem] = flattened(tensors[stem], state)
    return found


def flattened(data: Tensor, state: Any) -> Tensor:
    """A 4-bit weight by bitsandbytes, in float32. As one row: its CPU kernels of 0.50 go wrong
    where a block runs on from one row into the next."""
    shape, state.shape, state.dtype = state.shape, torch.Size([state.shape.numel()]), torch.float32
    return functional.dequantize_4bit(data, state).reshape(shape)


def eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace(".SCB", ".weight"): functional.int8_vectorwise_dequant(
            tensors[key.replace(".SCB", ".weight")], tensors[key]
        )
        for key in tensors
        if key.endswith(".SCB")
    }


OF_FOUR = {"load_in_4bit": True}
STORED_IN_16 = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16}
BITSANDBYTES: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Tensor]]]] = {
    "nf4": (OF_FOUR | {"bnb_4bit_quant_type": "nf4"}, four_bits),
    "nf4 nested": (OF_FOUR | {"bnb_4bit_quant_type": "nf4"} | STORED_IN_16, four_bits),
    "fp4": (OF_FOUR | {"bnb_4bit_quant_type": "fp4"}, four_bits),
    "int8": ({"load_in_8bit": True}, eight_bits),
}


@pytest.fixture(scope="module", params=BITSANDBYTES)
def of_bitsandbytes(request, plain):
    settings, numbers = BITSANDBYTES[request.param]
    config = BitsAndBytesConfig(**settings)
    model = LlamaForCausalLM.from_pretrained(
        plain / "base", quantization_config=config, device_map="cpu"
    )
    place = plain / request.param
    model.save_pretrained(place, max_shard_size="40KB")
    return place, numbers, model


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}


def check_weights(base: Path, numbers: Mapping[str, Tensor], adapters: list[Path], out: Path):
    """Every tensor of the output is that of the base, or what it stands for plus ΔW, rounded
    once, and there is none besides."""
    before, after = stored(base), stored(out)
    added: dict[str, Tensor] = {}
    for folder in adapters:
        for key, delta in updates(folder, 1.0).items():
            added[key] = added.get(key, 0) + delta
    assert numbers
    assert added.keys() <= after.keys()
    for key, found in after.items():
        whole = numbers[key] if key in numbers else before[key]
        wanted = whole.double() + added.get(key, 0)
        assert found.dtype == torch.bfloat16
        assert found.shape == wanted.shape
        error = (found.double() - wanted).abs()
        assert bool((error <= (HALF_STEP + 1e-5) * wanted.abs() + 1e-7).all()), key
    assert after.keys() == stored(base.parent / "base").keys()


def test_weights_are_the_librarys_plus_the_update(of_bitsandbytes, plain, tmp_path):
    base, numbers, model = of_bitsandbytes
    adapters = [plain / "adapter0", plain / "adapter1"]
    given = {"form": "model", "base": base, "scale": 1.0}
    merged = dm.merge(adapters, "linear", output=tmp_path / "out", **given)
    before = stored(base)
    check_weights(base, numbers(before), adapters, tmp_path / "out")
    assert any("quantized (bitsandbytes" in note for note in merged.report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = stored(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in after.values())
    tokens = torch.arange(24).reshape(2, 12)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not hasattr(loaded, "hf_quantizer")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="a")
        adapted.load_adapter(adapters[1], adapter_name="b")
        adapted.base_model.set_adapter(["a", "b"])
        expected = adapted(tokens).logits.float()
        unloaded = adapted.unload()
        assert unloaded is model
        assert_close(loaded(tokens).logits.float(), expected, 2e-2)
        assert float((model(tokens).logits.float() - expected).norm() / expected.norm()) > 0.2


@pytest.mark.parametrize("form", ["deltas", "model"])
def test_a_dora_takes_the_norms_of_what_is_quantized(form, plain, of_bitsandbytes, tmp_path):
    """As with a base of the same numbers that is not quantized."""
    base, numbers, _ = of_bitsandbytes
    before = stored(base)
    floats = tmp_path / "floats"
    floats.mkdir()
    found = numbers(before)
    whole = {k: found.get(k, before[k]).float() for k in stored(plain / "base")}
    save_file(whole, floats / "model.safetensors")
    (floats / "config.json").write_text((plain / "base" / "config.json").read_text())
    settings = {"target_modules": MODULES, "use_dora": True}
    dora = trained(llama(torch.float32), 3, tmp_path / "dora", **settings)
    one, other = tmp_path / "one", tmp_path / "other"
    dm.merge([dora], "linear", output=one, form=form, base=base)
    dm.merge([dora], "linear", output=other, form=form, base=floats)
    ours, wanted = stored(one), stored(other)
    assert ours.keys() == wanted.keys()
    for key in ours:
        assert_close(ours[key].float(), wanted[key].float(), 2e-5 if form == "deltas" else 1e-2)
