"""With the real PEFT and transformers: what is merged, saved and loaded computes base + ΔW."""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.close import assert_close
from support.make import PREFIX, write_adapter
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import domerge_fast as dm

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOKENS = torch.arange(32).reshape(2, 16)
LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=32,
    pad_token_id=0,
)
GPT2 = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=32, n_positions=16)


class Net(nn.Module):
    """Tokens [batch, 16] to logits [batch, 7] through an embedding, convolutions and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(32, 6)
        self.conv = nn.Conv2d(6, 10, (3, 2), padding=1)
        self.point = nn.Conv2d(10, 4, 1)
        self.fc = nn.Linear(4 * 4 * 5, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.emb(tokens).movedim(-1, 1).unflatten(-1, (4, 4))
        return self.fc(self.point(torch.tanh(self.conv(image))).flatten(1))


# A model, and the LoRA settings of each adapter on it.
CASES = {
    "llama": (
        lambda: LlamaForCausalLM(LLAMA),
        [
            {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
            {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
            {"r": 3, "lora_alpha": 3, "target_modules": "all-linear"},
        ],
    ),
    "patterns": (
        lambda: LlamaForCausalLM(LLAMA),
        [
            {
                "r": 4,
                "lora_alpha": 6,
                "use_rslora": True,
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
                "alpha_pattern": {"v_proj": 1, "^model.layers.0.mlp.up_proj": 2.5},
            },
            {"r": 5, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        ],
    ),
    "missing modules": (
        lambda: LlamaForCausalLM(LLAMA),
        [
            {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
            {
                "r": 3,
                "lora_alpha": 6,
                "target_modules": ["q_proj", "o_proj"],
                "layers_to_transform": [1],
            },
        ],
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2),
        [
            {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"]},
            {"r": 2, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc", "c_proj"]},
        ],
    ),
    "convolutions and an embedding": (
        Net,
        [
            {"r": 3, "lora_alpha": 5, "target_modules": ["emb", "conv", "point", "fc"]},
            {"r": 2, "lora_alpha": 4, "target_modules": ["emb", "conv", "fc"]},
            {"r": 2, "lora_alpha": 1, "target_modules": ["conv", "point", "fc"]},
        ],
    ),
}
METHODS = {
    "do": {"method": "do", "scale": 0.8},
    "do renormalized": {"method": "do", "renormalize": True, "penalty": "frobenius"},
    "linear": {"method": "linear", "scale": 1.5},
    "svd": {"method": "svd", "rank": 2},
    "energy": {"method": "do", "energy": 0.6},
}


def base(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def adapter_model(model: nn.Module, settings: dict, seed: int) -> peft.PeftModel:
    """A fresh adapter on the model, with B random instead of zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        return peft.get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], list[Path]]:
    """A case's adapters as PEFT saves them."""
    return functools.cache(lambda case: save(case, tmp_path_factory.mktemp("adapters")))


def save(case: str, folder: Path) -> list[Path]:
    folders = []
    for i, settings in enumerate(CASES[case][1]):
        folders.append(folder / f"adapter{i}")
        adapter_model(base(case), settings, seed=i).save_pretrained(folders[-1])
    return folders


def loaded(model: nn.Module, folder: Path, **options: object) -> peft.PeftModel:
    """PEFT's own loading, where a missing or unknown key or field is an error, not a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return peft.PeftModel.from_pretrained(model, folder, **options).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, Tensor) else out.logits


def add_by_hand(model: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with ΔW [m, n] added to its weights."""
    model = copy.deepcopy(model)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        turned = isinstance(layer, (nn.Embedding, Conv1D))
        layer.weight.data += (delta.T if turned else delta).reshape(layer.weight.shape)
    return model


def adapted(model: peft.PeftModel) -> dict[str, nn.Module]:
    """The layers that PEFT put a LoRA on, by their names in the base model."""
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def peft_deltas(model: peft.PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """ΔW [m, n] as PEFT computes it."""
    result = {}
    for name, layer in adapted(model).items():
        if adapter in layer.scaling:
            delta = layer.get_delta_weight(adapter).detach()
            turned = isinstance(layer.get_base_layer(), (nn.Embedding, Conv1D))
            result[name] = delta.T if turned else delta.flatten(1)
    return result


def weighted_sum(parts: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, delta in part.items():
            result[name] = result.get(name, 0) + weight * delta
    return result


def check_deltas(found: Callable[[str], Tensor], expected: dict[str, Tensor], share: float) -> None:
    for name, delta in expected.items():
        assert (found(name) - delta).norm() <= share * delta.norm(), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_reloaded_model_computes_base_plus_delta(case, method, saved, tmp_path):
    folders = saved(case)
    weights = [1.0, -0.5, 0.7][: len(folders)]
    merged = dm.merge(folders, weights=weights, output=tmp_path / "out", **METHODS[method])
    deltas = {name: merged.delta(name) for name in merged.names}
    expected = logits(add_by_hand(base(case), deltas))
    model = loaded(base(case), tmp_path / "out")
    assert set(adapted(model)) == set(merged.names)
    assert_close(logits(model), expected, 1e-5)
    assert (expected - logits(base(case))).abs().max() > 1e-3
    check_deltas(peft_deltas(model).__getitem__, deltas, 1e-5)
    if method == "energy":
        assert len({r.rank for r in merged.report.modules.values()}) > 1


@pytest.mark.parametrize("case", CASES)
def test_linear_is_the_weighted_sum_of_the_deltas_peft_computes(case, saved):
    parts = [
        peft_deltas(adapter_model(base(case), settings, seed=i))
        for i, settings in enumerate(CASES[case][1])
    ]
    weights = [0.5, -2.0, 1.0][: len(parts)]
    merged = dm.merge(saved(case), method="linear", weights=weights)
    expected = weighted_sum(parts, weights)
    assert set(merged.names) == set(expected)
    check_deltas(merged.delta, expected, 1e-6)


@pytest.mark.parametrize("method", ["do", "linear"])
@pytest.mark.parametrize("case", CASES)
def test_one_adapter_comes_out_as_it_went_in(case, method, saved, tmp_path):
    folder = saved(case)[0]
    dm.merge([folder], method=method, output=tmp_path / "out")
    expected = logits(peft.PeftModel.from_pretrained(base(case), folder).eval())
    found = logits(loaded(base(case), tmp_path / "out"))
    assert_close(found, expected, 1e-5)


def test_linear_is_what_peft_calls_cat(saved):
    folders, weights = saved("llama"), [0.5, 2.0, 1.25]
    names = [folder.name for folder in folders]
    model = peft.PeftModel.from_pretrained(base("llama"), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:]):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", combination_type="cat")
    merged = dm.merge(folders, method="linear", weights=weights)
    expected = peft_deltas(model, "merged")
    assert set(merged.names) == set(expected)
    check_deltas(merged.delta, expected, 1e-6)
    assert {report.rank for report in merged.report.modules.values()} == {4 + 2 + 3}


@pytest.mark.parametrize("case", CASES)
def test_live_models_merge_as_their_folders_do(case, saved, tmp_path):
    live = [
        dm.from_model(adapter_model(base(case), settings, seed=i), name=f"live{i}")
        for i, settings in enumerate(CASES[case][1])
    ]
    merged = dm.merge(live, output=tmp_path / "live")
    expected = dm.merge(saved(case), output=tmp_path / "folders")
    assert merged.names == expected.names
    assert merged.report.adapters == tuple(f"live{i}" for i in range(len(live)))
    for name in merged.names:
        assert all(map(torch.equal, merged.factors(name), expected.factors(name)))
    assert_close(
        logits(loaded(base(case), tmp_path / "live")),
        logits(loaded(base(case), tmp_path / "folders")),
    )


def test_two_adapters_of_one_live_model_are_merged():
    model = adapter_model(base("llama"), CASES["llama"][1][0], seed=0)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=3))
    for layer in adapted(model).values():
        if "other" in layer.lora_B:
            nn.init.normal_(layer.lora_B["other"].weight)
    merged = dm.merge([dm.from_model(model, "default"), dm.from_model(model, "other")], "linear")
    parts = [peft_deltas(model, "default"), peft_deltas(model, "other")]
    assert 0 < len(parts[1]) < len(parts[0])
    check_deltas(merged.delta, weighted_sum(parts, [1.0, 1.0]), 1e-6)


def test_bf16_adapters_stay_bf16(tmp_path):
    folders = []
    for i, settings in enumerate(CASES["llama"][1]):
        model = adapter_model(base("llama"), settings, seed=i).to(torch.bfloat16)
        folders.append(tmp_path / f"adapter{i}")
        model.save_pretrained(folders[-1])
    merged = dm.merge(folders, output=tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    expected = logits(add_by_hand(base("llama"), {n: merged.delta(n) for n in merged.names}))
    model = loaded(base("llama"), tmp_path / "out")
    assert_close(logits(model), expected, 1e-5)
    exact = dm.merge(folders, dtype="float32")
    assert set(exact.names) == set(merged.names)
    for name in merged.names:
        error = (merged.delta(name) - exact.delta(name)).norm()
        assert 0 < error <= 2**-7 * exact.delta(name).norm()


def test_modules_saved_whole_are_kept_and_loaded(tmp_path):
    def classifier() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LLAMA).eval()

    folders = []
    for i, settings in enumerate(CASES["llama"][1]):
        model = adapter_model(classifier(), {**settings, "task_type": "SEQ_CLS"}, seed=i)
        head = model.base_model.model.score.modules_to_save["default"].weight
        head.data = torch.linspace(-1, 1, head.numel()).reshape(head.shape)
        folders.append(tmp_path / f"adapter{i}")
        model.save_pretrained(folders[-1])
    merged = dm.merge(folders, output=tmp_path / "out")
    model = loaded(classifier(), tmp_path / "out")
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, head)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    by_hand = add_by_hand(classifier(), {name: merged.delta(name) for name in merged.names})
    by_hand.score.weight.data = head.data
    assert_close(logits(model), logits(by_hand), 1e-5)


class Maze(nn.Module):
    """Names that end in, begin with, or match as a regular expression another one's name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.fc1 = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        self.block_fc = nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "a-b+c": nn.Linear(8, 8)}) for _ in range(12)
        )
        self.nested = nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(8, 8)})})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                x = torch.tanh(x + layer(x))
        return x


RANKS = {
    "fc": 1,
    "fc1": 3,
    "block.fc": 4,
    "block_fc": 3,
    "layers.1.fc": 5,
    "layers.11.fc": 2,
    "layers.11.a-b+c": 4,
    "layers.0.a-b+c": 3,
}


@pytest.mark.parametrize("ragged", [False, True], ids=["one rank", "ragged"])
@pytest.mark.parametrize("names", [tuple(RANKS), tuple(RANKS)[4:]], ids=["all", "inner"])
def test_every_module_gets_its_rank_and_no_other_module_is_adapted(names, ragged, tmp_path):
    adapters = []
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        factors = {
            name: (
                torch.randn(RANKS[name], 8, generator=generator),
                torch.randn(8, RANKS[name], generator=generator),
            )
            for name in names[i:]
        }
        pattern = {f"^{re.escape(name)}": RANKS[name] for name in factors}
        folder = tmp_path / f"adapter{i}"
        config = {"r": 7, "rank_pattern": pattern, "alpha_pattern": pattern}
        adapters.append(write_adapter(folder, factors, **config))
    merged = dm.merge(adapters, output=tmp_path / "out", ragged=ragged)
    own = {name: min(8, RANKS[name] * (1 if name == names[0] else 2)) for name in names}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(own.values()) == 8
    assert bool(config["rank_pattern"]) == bool(config["alpha_pattern"]) == ragged
    torch.manual_seed(0)
    model = loaded(Maze(), tmp_path / "out")
    layers = adapted(model)
    assert set(layers) == set(names)
    written = own if ragged else dict.fromkeys(names, 8)
    assert {name: layers[name].r["default"] for name in names} == written
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    check_deltas(peft_deltas(model).__getitem__, {n: merged.delta(n) for n in names}, 1e-6)
    again = dm.load(tmp_path / "out")
    assert {name: module.rank for name, module in again.modules.items()} == own


def test_the_files_are_what_peft_and_safetensors_read(saved, tmp_path):
    folders = saved("llama")
    merged = dm.merge(folders, output=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (9, 9, False, False)
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert config.inference_mode
    assert config.target_modules == set(merged.names)
    file = tmp_path / "out/adapter_model.safetensors"
    stored = load_file(file)
    assert len(stored) == 2 * len(merged.names)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "domerge_fast": dm.__version__}
        assert set(opened.keys()) == set(stored)
    for name in merged.names:
        a, b = merged.factors(name)
        assert torch.equal(stored[f"{PREFIX}{name}.lora_A.weight"], a)
        assert torch.equal(stored[f"{PREFIX}{name}.lora_B.weight"], b)


def test_adapters_that_name_the_same_modules_keep_their_way_of_naming_them(tmp_path):
    folders = save("gpt2", tmp_path)
    path = folders[1] / "adapter_config.json"
    config = json.loads(path.read_text())
    reordered = {"target_modules": sorted(config["target_modules"], reverse=True)}
    path.write_text(json.dumps(config | reordered))
    dm.merge(folders, output=tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert written["fan_in_fan_out"]
    assert set(adapted(loaded(base("gpt2"), tmp_path / "out"))) == set(dm.load(folders[0]).modules)


def test_two_adapters_of_one_gpt2_of_which_peft_sets_fan_in_fan_out_in_the_first_only(tmp_path):
    settings = CASES["gpt2"][1]
    model = adapter_model(base("gpt2"), settings[0], seed=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        model.add_adapter("second", peft.LoraConfig(init_lora_weights=False, **settings[1]))
    stated = [model.peft_config[name].fan_in_fan_out for name in ("default", "second")]
    adapters = [dm.from_model(model, name) for name in ("default", "second")]
    for order in (adapters, adapters[::-1]):
        merged = dm.merge(order, method="linear", output=tmp_path / "out", overwrite=True)
        written = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert written["fan_in_fan_out"] == any(stated)
        assert merged.names


def test_a_merged_adapter_is_an_adapter_to_peft_and_to_us(saved, tmp_path):
    folders = saved("llama")
    dm.merge(folders[:2], method="linear", output=tmp_path / "first")
    second = dm.merge([tmp_path / "first", folders[2]], method="linear")
    at_once = dm.merge(folders, method="linear")
    check_deltas(second.delta, {n: at_once.delta(n) for n in at_once.names}, 1e-6)
    model = loaded(base("llama"), tmp_path / "first", is_trainable=True)
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in adapted(model).values())


def test_merged_factors_can_be_trained_on(saved):
    merged = dm.merge(saved("llama"))
    a, b = (nn.Parameter(factor) for factor in merged.factors(merged.names[0]))
    (b @ a).square().sum().backward()
    assert a.grad.any()
    assert b.grad.any()
