"""Adapters as PEFT itself writes them: every accepted kind is read exactly."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from support.close import assert_close
from support.make import PREFIX, lora_tensors, random_factors, write_adapter, write_folder
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from domerge_fast.adapters import Adapter, check_compatible
from domerge_fast.errors import AdapterError
from domerge_fast.formats import from_model, from_tensors, load
from domerge_fast.formats.peft import config as peft_config
from domerge_fast.storage.garbage import uncollected

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
QV = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8), "layers.1.q_proj": (6, 8)}


class Toy(nn.Module):
    """One layer of every kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)
        self.conv_a = nn.Conv1d(4, 6, 3)
        self.conv_b = nn.Conv2d(4, 6, (3, 2))
        self.conv_c = nn.Conv3d(2, 4, (1, 2, 3))
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))


TOY = ["emb", "fc", "conv_a", "conv_b", "conv_c", "point"]
CASES = {
    "toy": (Toy, {"target_modules": TOY}),
    "toy-rslora": (Toy, {"target_modules": TOY, "use_rslora": True, "lora_alpha": 3}),
    "toy-patterns": (
        Toy,
        {
            "target_modules": TOY,
            "rank_pattern": {"conv_[ab]": 2, "^fc": 6, "emb|fc": 1},
            "alpha_pattern": {"point": 1, "conv_.": -3, "^emb": 2.5},
        },
    ),
    "toy-modules-to-save": (Toy, {"target_modules": TOY, "modules_to_save": ["head"]}),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2), {"target_modules": ["c_attn", "c_proj", "wte"]}),
    "llama": (lambda: LlamaForCausalLM(LLAMA), {"target_modules": "all-linear"}),
    "llama-layer": (
        lambda: LlamaForCausalLM(LLAMA),
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "task_type": "CAUSAL_LM"},
    ),
    "llama-embeddings": (
        lambda: LlamaForCausalLM(LLAMA),
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    ),
    "llama-classifier": (lambda: LlamaForSequenceClassification(LLAMA), {"task_type": "SEQ_CLS"}),
}


def peft_model(case: str, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    torch.manual_seed(0)
    make, options = CASES[case]
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    model = peft.get_peft_model(make().to(dtype), peft.LoraConfig(**options))
    return model.to(dtype)


def peft_deltas(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def delta(adapter: Adapter, name: str, like: torch.Tensor) -> torch.Tensor:
    """scaling * B @ A, [m, n], brought to the layout PEFT adds to the weight."""
    module = adapter.modules[name]
    a, b = (factor.double() for factor in adapter.factors(name))
    assert (a.shape, b.shape) == ((module.rank, module.n), (module.m, module.rank))
    assert a.is_contiguous()
    assert b.is_contiguous()
    product = module.scaling * b @ a
    if module.kind == "embedding" or adapter.config.fan_in_fan_out:
        product = product.T
    return product.reshape(like.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_has_the_deltas_peft_computes(case, dtype, tmp_path):
    model = peft_model(case, dtype)
    model.save_pretrained(tmp_path)
    adapter = load(tmp_path)
    expected = peft_deltas(model)
    assert list(adapter.modules) == sorted(expected)
    for name, value in expected.items():
        assert adapter.modules[name].dtype == dtype
        result = delta(adapter, name, value).to(dtype)
        assert_close(result, value, 2 * torch.finfo(dtype).eps, name=name)


@pytest.mark.parametrize("case", CASES)
def test_a_live_adapter_equals_the_saved_one(case, tmp_path):
    model = peft_model(case)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved, live = load(tmp_path), from_model(model)
    assert live.modules == saved.modules
    assert live.carried.keys() == saved.carried.keys()
    for name in saved.modules:
        assert all(map(torch.equal, live.factors(name), saved.factors(name)))
    check_compatible([saved, live])


def test_a_live_adapter_has_the_scaling_its_layers_have_now_merged_or_not():
    model = peft_model("llama")
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    layer.scale_layer(3.0)
    model.merge_adapter()
    adapter = from_model(model)
    for name, value in peft_deltas(model).items():
        assert_close(delta(adapter, name, value), value, name=name)
    a, _ = adapter.factors("model.layers.0.self_attn.q_proj")
    assert a.data_ptr() == layer.lora_A["default"].weight.data_ptr()


def test_an_adapter_in_a_model_of_transformers_is_read_live():
    """What its add_adapter does, which asks for one version of PEFT or another."""
    model = LlamaForCausalLM(LLAMA)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.inject_adapter_in_model(config, model, "mine")
    assert list(from_model(model, "mine").modules) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_of_several_live_adapters_only_the_named_one_is_read():
    model = peft_model("toy-modules-to-save")
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["fc"]))
    other = from_model(model, "other")
    assert {name: module.rank for name, module in other.modules.items()} == {"fc": 3}
    assert not other.carried
    assert set(from_model(model).modules) == set(TOY)


def test_what_peft_saves_whole_is_carried(tmp_path):
    peft_model("llama-embeddings").save_pretrained(tmp_path / "embeddings")
    assert set(load(tmp_path / "embeddings").carried) == {
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.base_layer.weight",
    }
    model = peft_model("llama-classifier")
    model.save_pretrained(tmp_path / "classifier")
    adapter = load(tmp_path / "classifier")
    assert adapter.config.modules_to_save == ["classifier", "score"]
    assert set(adapter.carried) == {"base_model.model.score.weight"}
    stored = adapter.carried["base_model.model.score.weight"]
    live = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(stored.read(), live)
    peft_model("toy-modules-to-save").save_pretrained(tmp_path / "buffers")
    counter = load(tmp_path / "buffers").carried["base_model.model.head.1.num_batches_tracked"]
    assert counter.shape == ()
    assert counter.read() == 0


def test_embeddings_saved_for_a_resized_vocabulary_are_carried(tmp_path):
    model = peft_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2", save_embedding_layers=True)
    assert set(load(tmp_path / "gpt2").carried) == {
        "base_model.model.transformer.wte.base_layer.weight",
        "base_model.model.lm_head.weight",
    }


def test_the_config_keeps_what_a_writer_needs(tmp_path):
    peft_model("llama-layer").save_pretrained(tmp_path)
    adapter = load(tmp_path, name="mine")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter.name == "mine"
    assert adapter.config.raw == raw
    assert adapter.config.task_type == "CAUSAL_LM"
    assert adapter.config.target_modules == ["q_proj"]
    assert adapter.config.layers_to_transform == [1]
    assert adapter.config.peft_version == peft.__version__
    assert not adapter.config.fan_in_fan_out
    peft_model("gpt2").save_pretrained(tmp_path)
    assert load(tmp_path).config.fan_in_fan_out
    assert load(tmp_path).config.auto_mapping["base_model_class"] == "GPT2LMHeadModel"


def test_a_folder_may_hold_its_adapter_in_one_subfolder(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["fc"])
    peft.get_peft_model(Toy(), config, adapter_name="mine").save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert load(tmp_path).name == load(str(tmp_path)).name == str(tmp_path)


PATTERNS = [
    {"q_proj": 1, "layers.0.q_proj": 2},
    {"layers.0.q_proj": 1, "q_proj": 2},
    {"^layers.0.q_proj": 1, "^q_proj": 2},
    {"layers.[01].q_proj": 1, "k|v": 2},
    {"roj": 1, "0.q_proj": 2},
    {"layers.0": 1, "layers.0.q_proj$": 2},
    {"^(?:a|layers\\.0\\.q_proj)": 1},
    {"a+b": 1, "q_proj": 2},
]
NAMES = ["layers.0.q_proj", "layers.1.q_proj", "my_q_proj", "x.k", "v", "a+b", "model.layers.0"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_match_as_in_peft(pattern):
    raw = {"r": 4, "lora_alpha": 8, "alpha_pattern": pattern}
    scaling = peft_config.scalings(raw, "a")
    for name in NAMES:
        expected = pattern.get(get_pattern_key(pattern.keys(), name), 8)
        assert scaling(name, 4) == expected / 4


def test_every_field_of_peft_is_decided_on():
    decided = {
        *peft_config._CHECKED,
        *peft_config._HARMLESS,
        *peft_config._KEPT,
        *peft_config._REFUSED,
    }
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == decided


def test_inits_that_leave_the_base_alone_are_accepted(tmp_path):
    for init in (True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"):
        folder = write_adapter(tmp_path, random_factors(QV, 4), init_lora_weights=init)
        assert set(load(folder).modules) == set(QV)


def test_keys_may_lack_the_prefix(tmp_path):
    factors = random_factors(QV, 4)
    tensors = lora_tensors(factors, prefix="") | {"score.weight": torch.ones(2, 8)}
    config = {"peft_type": "LORA", "r": 4, "modules_to_save": ["score"]}
    adapter = load(write_folder(tmp_path, tensors, config))
    assert list(adapter.modules) == sorted(factors)
    assert list(adapter.carried) == ["base_model.model.score.weight"]


def test_factors_may_differ_in_dtype(tmp_path):
    a, b = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(6, 2, dtype=torch.float16)
    adapter = load(write_adapter(tmp_path, {"q": (a, b)}))
    assert adapter.modules["q"].dtype == torch.float32
    assert [factor.dtype for factor in adapter.factors("q")] == [torch.bfloat16, torch.float16]
    assert adapter.nbytes == 2 * (2 * 8 + 6 * 2)


def test_plain_tensors_make_an_adapter():
    factors = random_factors(QV, 3)
    factors["conv"] = torch.randn(3, 4, 2, 5), torch.randn(7, 3, 1, 1)
    factors["emb"] = torch.randn(3, 11, requires_grad=True), torch.randn(9, 6)[:, ::2]
    by_module = {name: float(i) for i, name in enumerate(factors, 1)}
    adapter = from_tensors(factors, by_module, name="mine", base_model="b", embeddings=["emb"])
    assert {name: module.scaling for name, module in adapter.modules.items()} == by_module
    assert adapter.modules["conv"].kind == "conv2d"
    assert adapter.modules["emb"].kind == "embedding"
    assert adapter.config.base_model_name_or_path == "b"
    assert [tuple(factor.shape) for factor in adapter.factors("conv")] == [(3, 40), (7, 3)]
    a, b = adapter.factors("emb")
    assert b.is_contiguous()
    assert torch.equal(b, factors["emb"][1])
    assert not a.requires_grad
    assert a.data_ptr() == factors["emb"][0].data_ptr()
    assert {m.scaling for m in from_tensors(factors, 0.5).modules.values()} == {0.5}


def test_factors_are_in_memory_of_their_own_and_hold_no_descriptor(tmp_path):
    folder = write_adapter(tmp_path, random_factors(QV, 4))
    before = len(os.listdir("/proc/self/fd"))
    adapters = [load(folder) for _ in range(50)]
    factors = [adapter.factors("layers.0.q_proj") for adapter in adapters]
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    again = adapters[0].factors("layers.0.q_proj")
    assert again[0].data_ptr() != factors[0][0].data_ptr()
    assert torch.equal(again[0], factors[0][0])
    os.truncate(folder / "adapter_model.safetensors", 8)
    assert torch.equal(again[0], factors[1][0])


def test_a_dropped_adapter_is_freed_without_the_garbage_collector(tmp_path):
    with uncollected():
        adapter = load(write_adapter(tmp_path, random_factors(QV, 4)))
        file = weakref.ref(adapter.stored["layers.0.q_proj"][0].file)
        assert file() is not None
        del adapter
        assert file() is None


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_the_garbage_collector_as_it_was(enabled, tmp_path):
    folder = write_adapter(tmp_path / "whole", random_factors(QV, 4))
    (gc.enable if enabled else gc.disable)()
    try:
        load(folder)
        assert gc.isenabled() == enabled
        with pytest.raises(AdapterError):
            load(tmp_path / "missing")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_header_without_padding_is_read(tmp_path):
    factors = random_factors(QV, 4)
    folder = write_adapter(tmp_path, factors)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * ((8 + len(header)) % 2 == 0)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    for name, (a, b) in factors.items():
        assert all(map(torch.equal, load(folder).factors(name), (a, b)))


def test_adapters_with_missing_modules_and_other_ranks_are_compatible(tmp_path):
    full = load(write_adapter(tmp_path / "full", random_factors(QV, 4), revision="main"))
    part = load(
        write_adapter(tmp_path / "part", random_factors({"layers.0.q_proj": (6, 8)}, 2), r=2)
    )
    check_compatible([full, part, full])
    other = load(
        write_adapter(
            tmp_path / "other", random_factors(QV, 4), base_model_name_or_path="/models/base"
        )
    )
    check_compatible([full, other], base_model="base")


def test_neither_peft_nor_transformers_is_imported():
    code = (
        "import sys, domerge_fast.adapters;"
        "sys.exit(any(name in sys.modules for name in ('peft', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
