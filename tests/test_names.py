"""Module names are those of the plain model, whatever was around it when the adapter was saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from support.make import PREFIX, lora_tensors, random_factors, write_adapter, write_folder
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import domerge_fast as dm
from domerge_fast.adapters.names import Spelling
from domerge_fast.errors import AdapterError
from domerge_fast.formats import from_model, load
from domerge_fast.integrations import peft as live

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: (6, 8), V: (4, 8)}
WRAPPED = {
    "as PEFT writes them": "base_model.model.{}",
    "without a prefix": "{}",
    "a compiled PeftModel": "_orig_mod.base_model.model.{}",
    "a compiled tuner": "base_model._orig_mod.model.{}",
    "a compiled model": "base_model.model._orig_mod.{}",
    "a compiled layer": "base_model.model.model.layers.0._orig_mod.{}",
    "DDP": "module.base_model.model.{}",
    "DDP around the tuner": "base_model.module.model.{}",
    "DDP around the model": "base_model.model.module.{}",
    "DDP of a compiled PeftModel": "module._orig_mod.base_model.model.{}",
    "a compiled DDP": "_orig_mod.module.base_model.model.{}",
    "FSDP": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.{}",
    "checkpointing": "base_model.model.model.layers.0._checkpoint_wrapped_module.{}",
    "both, in a layer": "base_model.model.model.layers.0._fsdp_wrapped_module."
    "_checkpoint_wrapped_module.{}",
    "a PeftModel in a PeftModel": "base_model.model.base_model.model.{}",
    "two, one compiled": "base_model.model._orig_mod.base_model.model.{}",
}


def keys_in(wrapping: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors (without a prefix) under the keys of a wrapped model."""
    inside = "model.layers.0." if "layers.0." in wrapping else ""
    return {wrapping.format(key.removeprefix(inside)): t for key, t in tensors.items()}


@pytest.mark.parametrize("named", ["", ".default", ".my_adapter", ".v1.2"])
@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_adapter_has_the_names_of_the_plain_model(case, named, tmp_path):
    factors = random_factors(SHAPES, 4)
    plain = lora_tensors(factors, prefix="")
    kept = {"model.layers.0.score.weight": torch.ones(2, 8)}
    wrapped = {k.replace(".weight", f"{named}.weight"): t for k, t in plain.items()}
    if named:
        kept = {k.replace(".weight", f".modules_to_save{named}.weight"): t for k, t in kept.items()}
    if named == ".v1.2":  # such a module cannot be made, but a parameter can
        kept = {}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 8,
        "modules_to_save": ["score"],
        "target_modules": ["q_proj", "v_proj"],
    }
    folder = write_folder(tmp_path / "a", keys_in(WRAPPED[case], wrapped | kept), config)
    adapter = load(folder)
    assert list(adapter.modules) == [Q, V]
    assert list(adapter.carried) == [f"{PREFIX}model.layers.0.score.weight"] * len(kept)
    for name, pair in factors.items():
        assert all(torch.equal(x, y) for x, y in zip(adapter.factors(name), pair))


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_adapter_merges_with_a_plain_one(case, tmp_path):
    factors = random_factors(SHAPES, 4, seed=1), random_factors(SHAPES, 4, seed=2)
    tensors = keys_in(WRAPPED[case], lora_tensors(factors[1], prefix=""))
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 4}
    merged = dm.merge(
        [write_adapter(tmp_path / "a", factors[0]), write_folder(tmp_path / "b", tensors, config)],
        "linear",
    )
    assert merged.names == (Q, V)
    for name in merged.names:
        expected = sum(f[name][1] @ f[name][0] for f in factors)
        torch.testing.assert_close(merged.delta(name), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_have_their_adapter_s_name_taken_off(tmp_path):
    tensors = {
        f"{PREFIX}wte.lora_embedding_A.default": torch.ones(2, 11),
        f"{PREFIX}wte.lora_embedding_B.default": torch.ones(6, 2),
        f"{PREFIX}fc.lora_A.default.weight": torch.ones(2, 6),
        f"{PREFIX}fc.lora_B.default.weight": torch.ones(5, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    adapter = load(write_folder(tmp_path, tensors, config))
    assert {name: m.kind for name, m in adapter.modules.items()} == {
        "fc": "linear",
        "wte": "embedding",
    }


@pytest.mark.parametrize(
    "names",
    [
        ["module.a", "module.b"],  # plain names, no model of PEFT's around them
        ["base_model.model.module.a", "base_model.model.other.b"],
        ["base_model.model.layers.0.module.a"],
        ["base_model.model.my_module.a"],
        ["base_model.model.a._orig_mod_.b"],
    ],
)
def test_a_model_s_own_names_stay(names):
    spell = Spelling(names)
    assert [spell(name) for name in names] == [name.removeprefix(PREFIX) for name in names]
    assert spell.removed(names) == []


def test_patterns_count_for_a_module_under_both_names_or_not_at_all(tmp_path):
    factors = random_factors(SHAPES, 4)
    tensors = keys_in(WRAPPED["a compiled model"], lora_tensors(factors, prefix=""))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    tail = write_folder(tmp_path / "tail", tensors, config | {"alpha_pattern": {"q_proj": 8}})
    assert load(tail).modules[Q].scaling == 2
    whole = {"alpha_pattern": {"^" + Q.replace(".", r"\."): 8}}
    with pytest.raises(AdapterError, match=r"scaling 2\.0 for it, but 1\.0 for '_orig_mod\.") as e:
        load(write_folder(tmp_path / "whole", tensors, config | whole))
    assert Q in str(e.value)


def test_targets_named_with_wrappers_are_not_written_on(tmp_path):
    tensors = keys_in(
        WRAPPED["a compiled model"], lora_tensors(random_factors(SHAPES, 4), prefix="")
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 4}
    config["target_modules"] = [f"_orig_mod.{Q}", f"_orig_mod.{V}"]
    folder = write_folder(tmp_path / "a", tensors, config)
    assert dm.merge([folder], "linear").target.config["target_modules"] == [Q, V]


TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**TINY, num_attention_heads=2, num_key_value_heads=1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
        self.module = nn.Linear(5, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "llama": (lambda: LlamaForCausalLM(LLAMA), {"target_modules": ["q_proj", "embed_tokens"]}),
    "classifier": (lambda: LlamaForSequenceClassification(LLAMA), {"task_type": "SEQ_CLS"}),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)),
        {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        {"target_modules": ["q", "wo"]},
    ),
    "convolutions": (Convolutions, {"target_modules": ["features.0", "features.2", "module"]}),
}


def adapted(model: str, seed: int = 0) -> peft.PeftModel:
    torch.manual_seed(seed)
    make, options = MODELS[model]
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options})
    return peft.get_peft_model(make(), config)


class Wrapper(nn.Module):
    """What DistributedDataParallel, FSDP and checkpointing are to names: a module around one."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        setattr(self, name, inner)


def compiled_inside(model: peft.PeftModel) -> nn.Module:
    model.base_model.model = torch.compile(model.base_model.model)
    return model


def sharded_inside(model: peft.PeftModel) -> nn.Module:
    """Every block with layers of its own in a wrapper, and the whole in another."""
    for _, block in list(model.named_modules()):
        if isinstance(block, nn.ModuleList | nn.Sequential):
            for key, layer in list(block.named_children()):
                setattr(block, key, Wrapper(layer, "_fsdp_wrapped_module"))
    return Wrapper(model, "_fsdp_wrapped_module")


LIVE: dict[str, Callable[[peft.PeftModel], nn.Module]] = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "compiled inside": compiled_inside,
    "DDP": lambda model: Wrapper(model, "module"),
    "DDP, compiled": lambda model: torch.compile(Wrapper(model, "module")),
    "FSDP": sharded_inside,
}


@pytest.mark.parametrize("wrap", LIVE)
@pytest.mark.parametrize("model", MODELS)
def test_a_live_adapter_has_the_names_of_its_saved_folder(model, wrap, tmp_path):
    adapted(model).save_pretrained(tmp_path)
    saved = load(tmp_path)
    live_one = from_model(LIVE[wrap](adapted(model)))
    assert list(live_one.modules) == list(saved.modules)
    assert {n: m.scaling for n, m in live_one.modules.items()} == {
        n: m.scaling for n, m in saved.modules.items()
    }
    # PEFT also saves what the embeddings were.
    trained = {key for key in saved.carried if ".base_layer." not in key}
    assert set(live_one.carried) == trained - {f"{PREFIX}lm_head.weight"}
    for name in saved.modules:
        pairs = zip(live_one.factors(name), saved.factors(name))
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("wrap", LIVE)
def test_a_wrapped_live_model_takes_the_same_new_adapter(wrap):
    def merged(wrapped: Callable[[peft.PeftModel], nn.Module]) -> dm.Adapter:
        model = adapted("llama", seed=1)
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = MODELS["llama"][1] | {"target_modules": ["q_proj", "v_proj"]}
            model.add_adapter("b", peft.LoraConfig(r=2, init_lora_weights=False, **options))
        model = wrapped(model)
        report = live.add_weighted_adapter(model, ["default", "b"], [1.0, 2.0], "new", "linear")
        made = from_model(model, "new")
        assert set(report.modules) == set(made.modules)
        return made

    plain, found = merged(LIVE["plain"]), merged(LIVE[wrap])
    assert list(found.modules) == list(plain.modules)
    for name in plain.modules:
        assert all(torch.equal(x, y) for x, y in zip(found.factors(name), plain.factors(name)))
