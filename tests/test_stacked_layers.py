"""Layers of the base in another order, each with a merge of its own, as PEFT loads them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from support.close import distance
from support.trained import trained
from transformers import LlamaConfig, LlamaForCausalLM

import domerge_fast as dm


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    modules = ["q_proj", "down_proj"]
    paths = [trained(model, k, folder / f"{k}", target_modules=modules) for k in (1, 2)]
    return dm.prepare(paths, "do")


LAYERS = [(0, (1.0, 0.0)), (1, (0.5, 1.0)), (1, (0.0, 1.0)), (2, (1.0, 1.0)), (0, (1.0, 0.0))]


def test_peft_loads_layers_in_their_new_order(model, prepared, tmp_path):
    dm.stack_layers(prepared, LAYERS, tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["layer_replication"] == [[0, 2], [1, 3], [0, 1]]
    deep = copy.deepcopy(model)
    blocks = []
    for k, (number, row) in enumerate(LAYERS):
        block = copy.deepcopy(model.model.layers[number])
        block.self_attn.layer_idx = k
        merged = prepared.merge(row)
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            with torch.no_grad():
                block.get_submodule(part).weight += merged.delta(f"model.layers.{number}.{part}")
        blocks.append(block)
    deep.model.layers = torch.nn.ModuleList(blocks)
    deep.config.num_hidden_layers = len(blocks)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert distance(loaded(input_ids=ids).logits, deep(input_ids=ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "there are none"),
        ([(0, (1.0, 1.0), 0.5)], "cannot be scaled"),
        ([(0, (1.0,))], "has 1 coefficients"),
        ([(-1, (1.0, 1.0))], "too small"),
        ([0], "is no layer"),
        ([(7, (1.0, 1.0))], "no adapter changes"),
    ],
)
def test_what_is_no_order_of_layers_is_refused(prepared, tmp_path, layers, said):
    with pytest.raises(dm.OptionError, match=said):
        dm.stack_layers(prepared, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()
