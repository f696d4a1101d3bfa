"""MLX adapters, read and written; with mlx-lm itself, where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.make import PAIR, random_factors, write_adapter, write_mlx, write_pair
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import domerge_fast as dm
from domerge_fast.adapters.plan import Plan
from domerge_fast.errors import AdapterError, DomergeError, OptionError
from domerge_fast.methods import TABLE
from domerge_fast.storage.buffers import Buffers
from domerge_fast.storage.lazy import Turned

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 60
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZES,
            num_experts=12,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    ),
}
EXPERTS = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 12),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 4),
}
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
]
LAYERS = [f"model.layers.{k}.self_attn.q_proj" for k in (1, 2)]


def base_model(kind: str, folder: Path) -> Path:
    torch.manual_seed(3)
    build, config = MODELS[kind]
    build(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    if kind in EXPERTS:  # as older versions call it, and mlx-lm
        theta = written["rope_parameters"]["rope_theta"]
        older = {"num_experts": EXPERTS[kind][2], "rope_theta": theta}
        (folder / "config.json").write_text(json.dumps(written | older))
    return folder


def trained(kind: str, base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT adapter with values."""
    torch.manual_seed(seed)
    model = MODELS[kind][0].from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(**config, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def in_peft(kind: str, base: Path, adapter: Path) -> Tensor:
    """The logits of the model with an adapter."""
    model = MODELS[kind][0].from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter)(TOKENS).logits.detach()


def in_mlx(base: Path, adapter: Path) -> Tensor:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_adapters(load_model(base)[0], str(adapter))
    model.eval()
    return torch.tensor(model(mx.array(TOKENS.numpy())).tolist())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_written_computes_in_mlx_what_peft_does(kind, tmp_path):
    base = base_model(kind, tmp_path / "base")
    own = [dict(x) for x in ADAPTERS]
    if kind == "llama":  # of a tied embedding an update is two things
        own[1]["target_modules"] = ["q_proj", "embed_tokens", "lm_head"]
    pair = [trained(kind, base, tmp_path / f"{k}", k, **x) for k, x in enumerate(own)]
    for name in ("peft", "mlx"):
        dm.merge(pair, "linear", format=name, whole="drop", output=tmp_path / name)
    expected = in_peft(kind, base, tmp_path / "peft")
    assert (MODELS[kind][0].from_pretrained(base)(TOKENS).logits - expected).norm() > 0.1
    assert_close(in_mlx(base, tmp_path / "mlx"), expected, 1e-5)


def test_an_adapter_of_mlx_computes_in_peft_what_it_does_there(tmp_path):
    base, folder = base_model("llama", tmp_path / "base"), tmp_path / "mlx"
    mlx_adapter(base, folder, ["self_attn.q_proj", "mlp.down_proj", "lm_head"])
    merged = dm.merge([folder], "linear", format="peft", output=tmp_path / "peft")
    assert merged.report.recipe.format == "peft"
    assert_close(in_peft("llama", base, tmp_path / "peft"), in_mlx(base, folder), 1e-5)


def mlx_adapter(base: Path, folder: Path, keys: list[str]) -> dict[str, Any]:
    """An adapter as mlx-lm makes and saves it, with values; its config."""
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    parameters = {"rank": 5, "scale": 2.5, "dropout": 0.1, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    config |= {"model": "someone/base", "batch_size": 4}
    model = load_model(base)[0]
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    mx.random.seed(1)
    found = {
        name: 0.2 * mx.random.normal(x.shape)
        for name, x in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), found)
    save_config(dict(config), folder / "adapter_config.json")
    return config


def test_an_adapter_that_mlx_saved_is_what_its_tensors_say(tmp_path):
    base, folder = base_model("llama", tmp_path / "base"), tmp_path / "mlx"
    keys = ["self_attn.v_proj", "mlp.gate_proj", "model.embed_tokens", "lm_head"]
    scale = mlx_adapter(base, folder, keys)["lora_parameters"]["scale"]
    adapter, tensors = dm.load(folder), load_file(folder / "adapters.safetensors")
    assert len(adapter.modules) == len(tensors) // 2 == 6
    assert adapter.modules["model.embed_tokens"].kind == "embedding"
    assert adapter.config.base_model_name_or_path == "someone/base"
    for name, module in adapter.modules.items():
        one, two = (tensors[f"{name}.lora_{x}"].double() for x in "ab")
        a, b = adapter.factors(name)
        assert_close(module.scaling * (b.double() @ a.double()), scale * (one @ two).T)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_of_mlx_compute_in_peft_what_they_do_there(kind, tmp_path):
    base, folder = base_model(kind, tmp_path / "base"), tmp_path / "mlx"
    owner, parts, count = EXPERTS[kind]
    switched = [f"{owner}.switch_mlp.{x}_proj" for x in ("gate", "up", "down")]
    mlx_adapter(base, folder, [*switched, "self_attn.q_proj"])
    adapter, tensors = dm.load(folder), load_file(folder / "adapters.safetensors")
    for layer in (1, 2):
        stem = f"model.layers.{layer}.{owner}"
        for part, own in zip(parts, switched):
            a, b = (tensors[f"model.layers.{layer}.{own}.lora_{x}"].double() for x in "ab")
            for e in range(count):
                assert_close(update(adapter, f"{stem}.experts.{e}.{part}"), 2.5 * b[e] @ a[e])
    assert len(adapter.modules) == 2 * (3 * count + 1)
    expected = in_mlx(base, folder)
    dm.merge([folder], "linear", output=tmp_path / "again")
    assert_close(in_mlx(base, tmp_path / "again"), expected, 1e-5)
    dm.convert(folder, tmp_path / "converted", format="mlx")
    kept = load_file(tmp_path / "converted" / "adapters.safetensors")
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(x, tensors[key]) for key, x in kept.items())
    dm.merge([folder], "linear", format="peft", output=tmp_path / "peft")
    assert_close(in_peft(kind, base, tmp_path / "peft"), expected, 1e-5)


def test_experts_of_peft_s_parameters_are_merged_with_mlx_s(tmp_path):
    base, folder = base_model("qwen3_moe", tmp_path / "base"), tmp_path / "one"
    mlx_adapter(base, folder, [f"mlp.switch_mlp.{x}_proj" for x in ("gate", "up", "down")])
    config = {"r": 3, "target_modules": ["q_proj"]}
    config["target_parameters"] = [
        f"layers.{k}.mlp.experts.{x}_proj" for k in (1, 2) for x in ("gate_up", "down")
    ]
    other = trained("qwen3_moe", base, tmp_path / "other", 1, **config)
    given = {"base_model": "one", "weights": [1.0, 0.5]}
    for name in ("peft", "mlx"):
        dm.merge([folder, other], "linear", format=name, output=tmp_path / name, **given)
    expected = in_peft("qwen3_moe", base, tmp_path / "peft")
    assert_close(in_mlx(base, tmp_path / "mlx"), expected, 1e-5)
    with pytest.raises(OptionError, match="'mlx' holds no parameters without a layer"):
        dm.merge([other], "linear", format="mlx", output=tmp_path / "out")


def test_experts_that_some_lack_have_zeros(tmp_path):
    names = [f"model.layers.{k}.mlp.experts.{e}.up_proj" for k, e in ((0, 2), (1, 0), (1, 10))]
    factors = random_factors(dict.fromkeys(names, (8, 6)), 3)
    dm.merge([dm.from_tensors(factors)], "linear", format="mlx", output=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    for k, there in ((0, [2]), (1, [0, 10])):
        a, b = (tensors[f"model.layers.{k}.mlp.switch_mlp.up_proj.lora_{x}"] for x in "ab")
        assert a.shape == (11, 3, 6)
        assert b.shape == (11, 8, 3)
        assert a.flatten(1).any(1).nonzero().flatten().tolist() == there
    wrong = random_factors({names[1]: (8, 6), names[2]: (9, 6)}, 3)
    with pytest.raises(DomergeError, match="have different shapes, and MLX has one module of both"):
        dm.merge([dm.from_tensors(wrong)], "linear", format="mlx", output=tmp_path / "no")


def update(source: Path | dm.Adapter, name: str) -> Tensor:
    adapter = source if isinstance(source, dm.Adapter) else dm.load(source)
    a, b = adapter.factors(name)
    return adapter.modules[name].scaling * (b.double() @ a.double())


def test_from_peft_and_back_an_update_stays_what_it_is(tmp_path):
    first = write_pair(tmp_path, lora_alpha=30)[0]
    there, back = tmp_path / "there", tmp_path / "back"
    dm.merge([first], "linear", format="mlx", output=there)
    merged = dm.merge([there], "linear", format="peft", output=back)
    assert merged.report.recipe.format == "peft"
    assert json.loads((back / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert list(dm.load(back).modules) == list(dm.load(first).modules)
    for name in dm.load(first).modules:
        assert_close(update(back, name), update(first, name))


def test_the_folder_is_what_mlx_demands(tmp_path):
    factors = random_factors(dict.fromkeys([*LAYERS, "lm_head"], (8, 6)), 3)
    pair = [
        write_adapter(tmp_path / "a", factors, base_model_name_or_path="someone/base"),
        dm.from_tensors(random_factors({LAYERS[0]: (8, 6)}, 2), name="b"),
    ]
    dm.merge(pair, "linear", format="mlx", output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "rank": 5,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": ["lm_head", "self_attn.q_proj"],
        },
        "model": "someone/base",
        "num_layers": -1,
    }
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert {key: list(x.shape) for key, x in tensors.items()} == {
        f"{name}.{side}": shape
        for name in (*LAYERS, "lm_head")
        for side, shape in (("lora_a", [6, 5]), ("lora_b", [5, 8]))
    }
    ranks = {name: module.rank for name, module in dm.load(tmp_path / "out").modules.items()}
    assert ranks == {LAYERS[0]: 5, LAYERS[1]: 3, "lm_head": 3}  # zeros are no factors


@pytest.fixture
def pairs(tmp_path):
    """The same adapters in PEFT's format and in MLX's."""
    factors = [random_factors(PAIR, 4, seed=k) for k in (1, 2)]
    in_peft = [write_adapter(tmp_path / f"p{k}", x, lora_alpha=6) for k, x in enumerate(factors)]
    in_mlx = [write_mlx(tmp_path / f"m{k}", x, 1.5, model="base") for k, x in enumerate(factors)]
    return in_peft, in_mlx


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("method", TABLE)
def test_any_method_takes_both(method, backend, pairs):
    in_peft, in_mlx = pairs
    expected = dm.merge(in_peft, method, backend=backend)
    for pair in (in_mlx, [in_peft[0], in_mlx[1]]):
        merged = dm.merge(pair, method, backend=backend)
        for name in expected.report.modules:
            (a, b), (one, two) = merged.factors(name), expected.factors(name)
            assert_close(b.double() @ a.double(), two.double() @ one.double(), 1e-4)


def test_mixed_with_peft_a_merge_is_written_as_that(pairs, tmp_path):
    in_peft, in_mlx = pairs
    mixed = dm.merge([in_mlx[0], in_peft[1]], "linear", output=tmp_path / "out")
    assert mixed.report.recipe.format == "peft"
    assert dm.merge(in_mlx, "linear").report.recipe.format == "mlx"


def test_factors_stay_on_disk_and_are_read_as_they_lie_there(pairs):
    adapters = [dm.load(path) for path in pairs[1]]
    plan = Plan.make(adapters, [1.0, 1.0])
    assert all(isinstance(x, Turned) for a in adapters for pair in a.stored.values() for x in pair)
    assert all(not a.devices for a in adapters)
    buffers = Buffers(plan.read_bytes())
    for stack in plan.stacks([range(len(plan.names))], buffers)[0]:
        assert stack.a.in_columns
        assert not stack.b.in_columns
        memory = {
            x.untyped_storage().data_ptr() for side in (stack.a, stack.b) for x in side.blocks
        }
        assert len(memory) == 1


def test_one_of_several_checkpoints_is_read_by_its_file(tmp_path):
    old = write_mlx(tmp_path / "a", random_factors(PAIR, 4, seed=1))
    (old / "adapters.safetensors").rename(old / "0000100_adapters.safetensors")
    with pytest.raises(AdapterError, match="has factors of MLX"):
        dm.load(old)
    write_mlx(tmp_path / "a", random_factors(PAIR, 4, seed=2))
    for file, seed in (("0000100_adapters.safetensors", 1), ("adapters.safetensors", 2)):
        a, b = random_factors(PAIR, 4, seed=seed)["layers.0.q_proj"]
        assert_close(update(old / file, "layers.0.q_proj"), b.double() @ a.double())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fine_tune_type": "dora"}, "is a DoRA (fine_tune_type 'dora'); train it with"),
        ({"fine_tune_type": "full"}, "is no LoRA, but whole weights"),
        ({"fine_tune_type": ["lora"]}, "is no LoRA (fine_tune_type"),
        ({"lora_parameters": None}, "has no scale in lora_parameters"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "has no scale in lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": True}}, "none that is a finite number"),
        ({"lora_parameters": {"rank": 4, "scale": 10**400}}, "none that is a finite number"),
        ({"lora_parameters": {"rank": 4, "scale": 0}}, "module 'x': has scaling 0"),
        ({"lora_parameters": {"rank": 8, "scale": 1}}, "module 'x': has rank 4, lora_par"),
        ({"lora_parameters": {"scale": 1}}, "has rank 4, lora_parameters says 'None'"),
    ],
)
def test_a_config_that_does_not_say_the_update_is_refused(config, said, tmp_path):
    folder = write_mlx(tmp_path / "a", random_factors({"x": (6, 5)}, 4), **config)
    with pytest.raises(AdapterError) as caught:
        dm.load(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x.m": (6,)}, "module 'x': is a DoRA (m)"),
        ({"x.weight": (6, 5)}, "unknown tensor 'x.weight'"),
        ({"lora_a": (6, 5)}, "unknown tensor 'lora_a'"),
        ({"m.experts.x.lora_a": (3, 4, 5)}, "'m.experts.x': adapts 3 experts at once"),
        ({"switch_mlp.x.lora_a": (3, 4, 5)}, "'switch_mlp.x': adapts 3 experts at once"),
        (
            {"m.switch_mlp.x.lora_a": (3, 4, 5), "m.experts.1.x.lora_a": (5, 4)},
            "stores 'm.experts.1.x.lora_A.weight' twice",
        ),
        ({"m.switch_mlp.x.lora_a": (2**40, 0, 5)}, "lora_a is no matrix (shape [1099511"),
        ({"m.switch_mlp.x.lora_a": (3, 4, 5)}, "'m.experts.0.x': has factor A but no B"),
        (
            {"m.switch_mlp.x.lora_a": (3, 4, 5), "m.switch_mlp.x.lora_b": (2, 6, 4)},
            "'m.experts.2.x': has factor A but no B",
        ),
        ({"x.lora_a": (5,), "x.lora_b": (4, 6)}, "lora_a is no matrix (shape [5])"),
        ({"x.lora_a": (5, 4)}, "has factor A but no B"),
        ({"x.lora_a": (5, 4), "x.lora_b": (3, 6)}, "different rank (A [4, 5], B [6, 3])"),
        ({"x.lora_a": (5, 0), "x.lora_b": (0, 6)}, "has an empty factor"),
        ({}, "has no LoRA factors"),
    ],
)
def test_tensors_that_are_no_plain_lora_are_refused(tensors, said, tmp_path):
    folder = write_mlx(tmp_path / "a", random_factors({"y": (6, 5)}, 4))
    file = folder / "adapters.safetensors"
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, file)
    with pytest.raises(AdapterError) as caught:
        dm.load(folder)
    assert said in str(caught.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    folder = write_mlx(tmp_path / "a", random_factors({"x": (6, 5)}, 4))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read \(No such file"):
        dm.load(folder)


def test_a_merge_that_mlx_cannot_hold_is_refused(tmp_path):
    x = random_factors({"x": (6, 5)}, 4)
    whole = write_adapter(
        tmp_path / "a", x, carried={"score.weight": torch.ones(2, 2)}, modules_to_save=["score"]
    )
    with pytest.raises(OptionError, match="'mlx' holds no tensors saved whole"):
        dm.merge([whole], "linear", format="mlx", output=tmp_path / "out")
    twice = write_adapter(tmp_path / "b", x, layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(DomergeError, match="replicate layers"):
        dm.merge([twice], "linear", format="mlx", output=tmp_path / "out")
    with pytest.raises(OptionError, match="'mlx' has one rank for all modules"):
        dm.merge(write_pair(tmp_path / "p"), "linear", format="mlx", ragged=True)
    assert not (tmp_path / "out").exists()


def test_what_tied_embeddings_get_is_told(tmp_path):
    adapter = dm.from_tensors(
        random_factors({"embed_tokens": (6, 9)}, 2), embeddings=["embed_tokens"]
    )
    merged = dm.merge([adapter], "linear", format="mlx", output=tmp_path / "out")
    assert any(x.startswith("embed_tokens: where a model ties it") for x in merged.report.notes)
