"""Changes that are no product of factors: biases on B and trained rows of embeddings, with PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.make import PREFIX, random_factors, write_adapter
from support.trained import trained
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import domerge_fast as dm
from domerge_fast import AdapterError, DomergeError, OptionError
from domerge_fast.cli.main import main
from domerge_fast.integrations import peft as live

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOKENS = torch.arange(24).reshape(2, 12)
BIAS = {"lora_bias": True, "target_modules": ["c_attn", "c_fc"]}
LISTED = {"trainable_token_indices": [7, 2, 11], "target_modules": ["q_proj"]}
OTHERS = {"trainable_token_indices": [2, 5], "target_modules": ["q_proj"]}
HEADS = {
    "trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [4]},
    "target_modules": ["q_proj"],
}


def gpt2() -> torch.nn.Module:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 24, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def llama(tied: bool = False) -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=24,
            tie_word_embeddings=tied,
        )
    ).eval()


def outputs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def merged_by_peft(model: torch.nn.Module, folders: list[Path], weights: list[float]) -> dict:
    """W0 + Σ w_i (W_i - W0) of every parameter, each W_i by PEFT's own merge_and_unload."""
    before = {key: x.double() for key, x in model.state_dict().items()}
    after = {key: x.clone() for key, x in before.items()}
    for folder, weight in zip(folders, weights, strict=True):
        one = loaded(model, folder).merge_and_unload().state_dict()
        for key, x in before.items():
            after[key] += weight * (one[key].double() - x)
    return after


CASES = {
    "biases": (gpt2, [BIAS, BIAS]),
    "a bias in one": (gpt2, [BIAS, {"target_modules": ["c_attn"]}]),
    "rows": (llama, [LISTED, LISTED]),
    "other rows": (llama, [LISTED, OTHERS]),
    "rows of a tied weight": (lambda: llama(True), [LISTED, OTHERS]),
    "rows of two": (llama, [HEADS, LISTED]),
}


@pytest.fixture
def case(request, tmp_path):
    make, settings = CASES[request.param]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    folders = [trained(model, k + 1, tmp_path / f"in{k}", **x) for k, x in enumerate(settings)]
    return model, folders, tmp_path


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_model_is_what_peft_merges(case):
    model, folders, tmp_path = case
    given = {"weights": [0.7, -0.4], "scale": 1.5, "base": tmp_path / "base", "form": "model"}
    dm.merge(folders, "linear", output=tmp_path / "out", **given)
    expected = merged_by_peft(model, folders, [1.5 * 0.7, 1.5 * -0.4])
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key, x in found.items():
        assert_close(x.double(), expected[key], 1e-6)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_an_adapter_computes_in_peft_what_the_merged_model_does(case):
    model, folders, tmp_path = case
    given = {"weights": [0.7, -0.4], "base": tmp_path / "base"}
    dm.merge(folders, "linear", output=tmp_path / "out", **given)
    expected = copy.deepcopy(model)
    merged = merged_by_peft(model, folders, given["weights"])
    expected.load_state_dict({key: x.float() for key, x in merged.items()})
    assert_close(outputs(loaded(model, tmp_path / "out")), outputs(expected), 1e-5)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_deltas_are_what_is_added(case):
    model, folders, tmp_path = case
    given = {"form": "deltas", "base": tmp_path / "base"}
    dm.merge(folders, "linear", output=tmp_path / "out", **given)
    found = load_file(tmp_path / "out" / "deltas.safetensors")
    before, after = model.state_dict(), merged_by_peft(model, folders, [1, 1])
    changed = {key for key in before if not torch.equal(before[key].double(), after[key])}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert found.keys() == changed - tied
    for key, x in found.items():
        assert_close(x.double(), after[key] - before[key], 1e-5)


ROWS = {"trainable_token_indices": [7, 2]}
SHAPES = {"layers.0.q_proj": (8, 6), "layers.1.q_proj": (8, 6)}
EMBEDDING = "embed_tokens.weight"


def small(folder: Path, seed: int = 1, bias: bool = True, **config: object) -> Path:
    """An adapter with biases, or rows of tokens, written without PEFT."""
    made = write_adapter(folder, random_factors(SHAPES, 2, seed=seed), **config)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(made / "adapter_model.safetensors")
    config |= {"lora_bias": bias}
    (made / "adapter_config.json").write_text(
        json.dumps(json.loads((made / "adapter_config.json").read_text()) | config)
    )
    for name, (m, _) in SHAPES.items() if bias else ():
        tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.randn(m, generator=generator)
    if indices := config.get("trainable_token_indices"):
        key = f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
        tensors[key] = torch.randn(len(indices), 6, generator=generator)
    save_file(tensors, made / "adapter_model.safetensors")
    return made


def base(folder: Path, **others: Tensor) -> Path:
    folder.mkdir()
    made = {f"{name}.weight": torch.ones(m, n) for name, (m, n) in SHAPES.items()}
    made |= {f"{name}.bias": torch.ones(m) for name, (m, _) in SHAPES.items()}
    made[EMBEDDING] = torch.arange(60.0).reshape(10, 6)
    save_file(made | others, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [small(tmp_path / "a", 1), small(tmp_path / "b", 2, lora_alpha=6)]


def bias_of(folder: Path, name: str = "layers.0.q_proj") -> Tensor:
    return load_file(folder / "adapter_model.safetensors")[f"{PREFIX}{name}.lora_B.bias"]


def test_a_cut_leaves_them_whole(two, tmp_path):
    dm.merge(two, "svd", rank=1, output=tmp_path / "out")
    expected = bias_of(two[0]) + 3 * bias_of(two[1])
    assert_close(bias_of(tmp_path / "out"), expected, 1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"]


def test_a_rule_s_weights_and_what_it_leaves_out_hold_for_them(two, tmp_path):
    rules = [
        {"modules": "layers.0.*", "weights": [2, 0]},
        {"modules": "layers.1.*", "leave_out": True},
    ]
    dm.merge(two, "linear", rules=rules, output=tmp_path / "out")
    assert_close(bias_of(tmp_path / "out"), 2 * bias_of(two[0]), 1e-6)
    assert not any(
        "layers.1" in key for key in load_file(tmp_path / "out/adapter_model.safetensors")
    )


def test_an_adapter_of_weight_zero_changes_nothing(two, tmp_path):
    three = small(tmp_path / "c", 3, bias=False)
    merged = dm.merge([two[0], three], "do", weights=[0, 1])
    assert not merged.target.changes.names


def test_what_is_merged_in_memory_is_saved_alike(two, tmp_path):
    dm.merge(two, "linear", output=tmp_path / "out")
    dm.merge(two, "linear").save(tmp_path / "saved")
    assert torch.equal(bias_of(tmp_path / "out"), bias_of(tmp_path / "saved"))
    again = dm.merge([tmp_path / "out"], "linear", output=tmp_path / "again")
    assert torch.equal(bias_of(tmp_path / "out"), bias_of(tmp_path / "again"))
    assert again.report.notes


def test_a_conversion_keeps_them(two, tmp_path):
    """Bit for bit, in front of whatever alpha."""
    dm.convert(two[1], tmp_path / "out", format="peft")
    assert torch.equal(bias_of(two[1]), bias_of(tmp_path / "out"))
    assert_close(
        *(
            dm.load(x).differences["layers.0.q_proj.bias"].read()
            for x in (two[1], tmp_path / "out")
        ),
        1e-12,
    )
    rows = small(tmp_path / "rows", 3, bias=False, **ROWS)
    dm.convert(rows, tmp_path / "again", format="peft")
    given, found = (dm.load(x).token_rows[EMBEDDING] for x in (rows, tmp_path / "again"))
    assert found.at == (2, 7)
    assert torch.equal(found.rows.read(), given.rows.read().flip(0))
    with pytest.raises(OptionError, match="'mlx' holds no such changes of parameters"):
        dm.convert(rows, tmp_path / "mlx", format="mlx")


def test_what_does_not_serve_them_is_said(two, tmp_path):
    notes = dm.merge(two, "linear", output=tmp_path / "out").report.notes
    assert any("vLLM 0.33 takes no biases on B" in note for note in notes)
    assert any("added up beside the updates" in note and "q_proj.bias" in note for note in notes)
    with pytest.raises(DomergeError, match="changed by no product of factors"):
        dm.merge(two, "linear", output=tmp_path / "served", runtime="vllm")
    assert main(["check", str(tmp_path / "out"), "--for", "vllm"]) == 2
    assert main(["check", str(tmp_path / "out"), "--for", "peft"]) == 0


def test_rows_without_a_base_where_none_is_needed(tmp_path):
    """The same rows in all, of weights that add up to 1; or one adapter as it is."""
    adapters = [small(tmp_path / str(k), k, bias=False, **ROWS) for k in range(3)]
    key = f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
    rows = [load_file(x / "adapter_model.safetensors")[key] for x in adapters]
    dm.merge(adapters, "linear", weights=[0.1, 0.2, 0.7], output=tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[key]
    assert_close(found, 0.1 * rows[0].flip(0) + 0.2 * rows[1].flip(0) + 0.7 * rows[2].flip(0), 1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [2, 7]
    with pytest.raises(AdapterError, match="values before training are needed; give the base"):
        dm.merge(adapters, "linear", output=tmp_path / "sum")


def test_a_change_and_a_low_rank_update_of_one_weight_add_up(tmp_path):
    """As where one adapter has a difference of a weight of which another has factors."""
    adapter = dm.load(small(tmp_path / "a"))
    name = "layers.0.q_proj"
    more = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    made = dm.load(small(tmp_path / "b", bias=False))
    difference = {f"{name}.weight": next(iter(dm.from_tensors({"x": (more, more.T)}).stored["x"]))}
    made.differences.update(difference)
    a, b = adapter.factors(name)
    given = {"base": base(tmp_path / "base"), "weights": [1, 0.5], "dtype": "float32"}
    before = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]
    one, two = made.factors(name)
    expected = b @ a + 0.5 * (two @ one + more)
    dm.merge([adapter, made], "linear", form="deltas", output=tmp_path / "deltas", **given)
    found = load_file(tmp_path / "deltas" / "deltas.safetensors")[f"{name}.weight"]
    assert_close(found, expected, 1e-6)
    dm.merge([adapter, made], "linear", form="model", output=tmp_path / "model", **given)
    found = load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"]
    assert_close(found - before, expected, 1e-5)
    with pytest.raises(OptionError, match="'peft' holds no such changes of parameters, as 'layers"):
        dm.merge([adapter, made], "linear", output=tmp_path / "out")


def test_other_classes_of_the_model_have_other_names_for_them(tmp_path):
    causal = tmp_path / "causal"
    small(causal, 1)
    tensors = load_file(causal / "adapter_model.safetensors")
    named = {key.replace("layers", "model.layers"): x for key, x in tensors.items()}
    save_file(named, causal / "adapter_model.safetensors")
    config = json.loads((causal / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (causal / "adapter_config.json").write_text(json.dumps(config))
    backbone = small(tmp_path / "backbone", 2, target_modules=["q_proj"])
    dm.merge([backbone, causal], "linear", output=tmp_path / "out")
    expected = bias_of(backbone) + bias_of(causal, "model.layers.0.q_proj")
    assert_close(bias_of(tmp_path / "out"), expected, 1e-6)


def test_one_of_a_live_model_is_read(tmp_path):
    torch.manual_seed(0)
    model = llama(True)
    for k, settings in enumerate([LISTED, OTHERS]):
        trained(model, k, tmp_path / str(k), **settings)
    one = peft.PeftModel.from_pretrained(model, tmp_path / "0", adapter_name="x")
    one.load_adapter(str(tmp_path / "1"), adapter_name="y")
    given = {"weights": [2, 3]}
    dm.merge(
        [dm.from_model(one, "x"), dm.from_model(one, "y")],
        "linear",
        output=tmp_path / "live",
        **given,
    )
    model = one.unload()
    model.save_pretrained(tmp_path / "base")
    given["base"] = tmp_path / "base"
    dm.merge([tmp_path / "0", tmp_path / "1"], "linear", output=tmp_path / "files", **given)
    ours, theirs = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("live", "files")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "do"}, "which only a sum takes along; use 'linear'"),
        ({"method": "auto"}, "which only a sum takes along; use 'linear'"),
        ({"method": "ties"}, "which only a sum takes along; use 'linear'"),
        ({"method": "linear", "power": 0.5}, "which only a sum takes along; use 'linear'"),
        ({"method": "linear", "scale": "auto"}, "leave out steps (pre, post), and give a number"),
        ({"method": "linear", "post": ["norm_match"]}, "leave out steps (pre, post)"),
        ({"method": "linear", "pre": ["canonicalize"]}, "leave out steps (pre, post)"),
        (
            {"method": "linear", "rules": [{"modules": "layers.1.*", "method": "do"}]},
            "changes 'layers.1.q_proj.bias' by no product of factors",
        ),
    ],
)
def test_what_is_no_sum_refuses_them(given, said, two, tmp_path):
    with pytest.raises(AdapterError) as caught:
        dm.merge(two, output=tmp_path / "out", **given)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_goes_on_and_a_live_model_refuse_them(two, tmp_path):
    state = dm.Sequential.start(tmp_path / "state")
    with pytest.raises(AdapterError, match="which a merge that goes on cannot take; "):
        state.add(two[0])
    torch.manual_seed(0)
    folder = trained(gpt2(), 1, tmp_path / "trained", **BIAS)
    model = loaded(gpt2(), folder)
    with pytest.raises(AdapterError, match="which a live model cannot take; "):
        live.add_weighted_adapter(model, ["default"], [1.0], "merged", "linear")


def test_inspect_says_that_it_does_not_compare_them(two):
    notes = dm.inspect(two).notes
    assert len(notes) == 2
    assert "which is not compared" in notes[0]


BAD = {
    "no rows": (
        {"trainable_token_indices": [1]},
        {},
        "states trainable_token_indices, but stores no",
    ),
    "no indices": (
        {},
        {"embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)},
        "does not say",
    ),
    "other indices": (ROWS, {"embed_tokens.token_adapter.trainable_tokens_delta": (3, 6)}, "has 2"),
    "of no module": (
        {"trainable_token_indices": {"wte": [1]}},
        {"embed_tokens.token_adapter.trainable_tokens_delta": (1, 6)},
        "does not say",
    ),
    "twice": ({"trainable_token_indices": [1, 1]}, {}, "not lists of different whole numbers"),
    "negative": ({"trainable_token_indices": [-1]}, {}, "not lists of different whole numbers"),
    "a number": ({"trainable_token_indices": 3}, {}, "not lists of different whole numbers"),
    "flag": ({"trainable_token_indices": [True]}, {}, "not lists of different whole numbers"),
    "long bias": (
        {"lora_bias": True},
        {"layers.0.q_proj.lora_B.bias": (9,)},
        "its layer has 8 outputs",
    ),
    "no bias": ({"lora_bias": True}, {}, "states lora_bias, but stores no bias on B"),
    "unstated bias": ({}, {"layers.0.q_proj.lora_B.bias": (8,)}, "lora_bias is not true"),
    "bias alone": (
        {"lora_bias": True},
        {"norm.lora_B.bias": (9,)},
        "which is of no linear layer or convolution",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_together_is_refused(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, shapes, said = BAD[case]
    write_adapter(tmp_path / "a", random_factors(SHAPES, 2), **config)
    tensors = load_file("a/adapter_model.safetensors")
    tensors |= {PREFIX + key: torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, "a/adapter_model.safetensors")
    assert main(["merge", "a", "-o", "out", "--method", "linear"]) == 2
    assert said in capsys.readouterr().err


def test_a_base_that_they_do_not_fit_is_refused(two, tmp_path):
    given = {"form": "model", "output": tmp_path / "out"}
    place = base(tmp_path / "base", **{"layers.1.q_proj.bias": torch.ones(7)})
    with pytest.raises(OptionError, match=r"stores 'layers.1.q_proj.bias' as \[7\], its ch"):
        dm.merge(two, "linear", base=place, **given)
    tensors = load_file(place / "model.safetensors")
    del tensors["layers.1.q_proj.bias"]
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(OptionError, match=r"has no 'layers.1.q_proj.bias' for the change of"):
        dm.merge(two, "linear", base=place, **given)
    rows = small(tmp_path / "rows", 3, bias=False, trainable_token_indices=[10])
    with pytest.raises(
        AdapterError, match=r"trains rows up to 10 of \[6\] of 'embed_tokens.weight'"
    ):
        dm.merge([rows], "linear", base=place, **given)
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_is_refused(two, tmp_path):
    tensors = load_file(two[0] / "adapter_model.safetensors")
    tensors[f"{PREFIX}layers.0.q_proj.lora_B.bias"][3] = torch.nan
    save_file(tensors, two[0] / "adapter_model.safetensors")
    with pytest.raises(DomergeError, match="the merged change is not finite"):
        dm.merge(two, "linear", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_one_saves_whole_and_another_changes_is_refused(tmp_path):
    rows = small(tmp_path / "rows", 1, bias=False, **ROWS)
    factors = random_factors(SHAPES, 2)
    whole = write_adapter(
        tmp_path / "whole",
        factors,
        carried={EMBEDDING: torch.ones(10, 6)},
        modules_to_save=["embed_tokens"],
    )
    given = {"base": base(tmp_path / "base"), "output": tmp_path / "out"}
    with pytest.raises(DomergeError, match="is saved whole by an adapter, and changed by another"):
        dm.merge([rows, whole], "linear", **given)
    assert dm.merge([rows, whole], "linear", whole="drop", **given).names


def test_sums_are_in_float64_and_rounded_once(tmp_path):
    """Of a bfloat16 base: not first to the adapters' dtype."""
    adapters = [small(tmp_path / str(k), k) for k in range(2)]
    place = base(tmp_path / "base")
    tensors = {k: x.bfloat16() for k, x in load_file(place / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors")
    given = {"form": "model", "base": place, "dtype": "bfloat16"}
    dm.merge(adapters, "linear", output=tmp_path / "out", **given)
    found = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q_proj.bias"]
    exact = 1 + sum(bias_of(x).double() for x in adapters)
    assert torch.equal(found, exact.bfloat16())
