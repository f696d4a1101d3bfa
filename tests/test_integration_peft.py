"""Merging on a live PeftModel: what it computes with the new adapter, and what stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.close import assert_close
from test_peft import (
    CASES,
    LLAMA,
    RANKS,
    Maze,
    adapted,
    add_by_hand,
    base,
    check_deltas,
    loaded,
    logits,
    peft_deltas,
    weighted_sum,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import domerge_fast as dm
from domerge_fast.integrations import peft as live
from domerge_fast.integrations import peft_adding
from domerge_fast.methods import TABLE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PAIR = [{"r": 2, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": ["q_proj", "v_proj"]}]
WEIGHTS = [1.0, -0.5, 0.7]
# Without those that take two adapters, or equal ranks.
GENERAL = [method for method in TABLE if method not in ("slerp", "robust")]
SVD = ("svd_rank", "svd_clamp", "svd_full_matrices", "svd_driver")


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    live.uninstall()


def live_model(model: nn.Module, settings: Sequence[dict]) -> peft.PeftModel:
    """The model with adapters "a0", "a1", ... on it, of which the first is active."""
    torch.manual_seed(1)
    configs = [peft.LoraConfig(init_lora_weights=False, **s) for s in settings]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        model = peft.get_peft_model(model, configs[0], adapter_name="a0")
        for i, config in enumerate(configs[1:], 1):
            model.add_adapter(f"a{i}", config)
    return model.eval()


def pair() -> peft.PeftModel:
    return live_model(base("llama"), PAIR)


def of_case(case: str) -> tuple[peft.PeftModel, list[str]]:
    model = live_model(base(case), CASES[case][1])
    return model, list(model.peft_config)


def tensors_of(model: peft.PeftModel, adapter: str) -> dm.Adapter:
    """The adapter's factors as they are in its layers."""
    factors, scaling, embeddings = {}, {}, []
    for name, layer in adapted(model).items():
        if adapter in layer.lora_embedding_A:
            embeddings.append(name)
            factors[name] = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        elif adapter in layer.lora_A:
            factors[name] = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        else:
            continue
        scaling[name] = layer.scaling[adapter]
    return dm.from_tensors(factors, scaling, name=adapter, embeddings=embeddings)


def deltas_of(model: peft.PeftModel, names: Sequence[str], **options: object) -> dict[str, Tensor]:
    """ΔW [m, n] of a merge of the same factors beside the model."""
    merged = dm.merge([tensors_of(model, name) for name in names], **options)
    return {name: merged.delta(name) for name in merged.names}


def with_adapter(model: peft.PeftModel, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    return logits(model)


def parts(model: nn.Module) -> dict[str, tuple]:
    """Everything PEFT might change: tensors, what is trained, what is active."""
    found = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        found[f"module {name}"] = (type(module), getattr(module, "active_adapters", None))
    return found


def same(one: dict[str, tuple], other: dict[str, tuple]) -> bool:
    return one.keys() == other.keys() and all(
        all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(*pair))
        for pair in ((one[name], other[name]) for name in one)
    )


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, method) for case in CASES for method in ("do", "svd")),
        *(("missing modules", method) for method in GENERAL if method not in ("do", "svd")),
    ],
)
def test_the_live_model_computes_base_plus_delta(case, method):
    model, names = of_case(case)
    weights = WEIGHTS[: len(names)]
    deltas = deltas_of(model, names, method=method, weights=weights, scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = live.add_weighted_adapter(model, names, weights, "new", method, scale=1.0)
    assert report.adapters == tuple(names)
    expected = logits(add_by_hand(base(case), deltas))
    assert (expected - logits(base(case))).abs().max() > 1e-3
    assert_close(with_adapter(model, "new"), expected, 1e-5)
    check_deltas(peft_deltas(model, "new").__getitem__, deltas, 1e-5)
    ranks = {name: layer.r["new"] for name, layer in adapted(model).items()}
    assert ranks == {name: report[name].rank for name in report.modules}
    assert {layer.scaling["new"] for layer in adapted(model).values()} == {1.0}


@pytest.mark.parametrize("case", CASES)
def test_linear_is_the_weighted_sum_of_the_deltas_peft_computes(case):
    model, names = of_case(case)
    weights = WEIGHTS[: len(names)]
    expected = weighted_sum([peft_deltas(model, name) for name in names], weights)
    live.add_weighted_adapter(model, names, weights, "new", "linear")
    check_deltas(peft_deltas(model, "new").__getitem__, expected, 1e-6)


# PEFT refuses a module that no adapter has.
@pytest.mark.parametrize("case", [case for case in CASES if case != "missing modules"])
def test_ties_is_what_peft_truncates(case):
    model, names = of_case(case)
    weights = WEIGHTS[: len(names)]
    options = {"svd_rank": 3, "density": 0.2, "majority_sign_method": "frequency"}
    live.add_weighted_adapter(model, names, weights, "ours", "ties", **options)
    model.add_weighted_adapter(names, weights, "theirs", "ties_svd", **options)
    # PEFT applies the scaling of its rsLoRA result to factors that are scaled already.
    scalings = {name: layer.scaling["theirs"] for name, layer in adapted(model).items()}
    expected = {name: x / scalings[name] for name, x in peft_deltas(model, "theirs").items()}
    check_deltas(peft_deltas(model, "ours").__getitem__, expected, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_nothing_else_changes(case):
    model, names = of_case(case)
    before, expected = parts(model), logits(model)
    for through, new in ((model, "x"), (model.base_model, "y")):
        live.add_weighted_adapter(through, names, [1.0] * len(names), new)
        assert torch.equal(logits(model), expected)
        assert model.active_adapters == ["a0"]
        fresh = [p for n, p in model.named_parameters() if f".{new}." in f"{n}."]
        assert len(fresh) >= 2 * len(peft_deltas(model, "a0"))
        assert not any(p.requires_grad for p in fresh)
    now = parts(model)
    assert same(before, {name: now[name] for name in before})
    assert torch.equal(with_adapter(model, "x"), with_adapter(model, "y"))
    model.set_adapter("a0")
    model.delete_adapter("x")
    model.delete_adapter("y")
    assert same(before, parts(model))


def test_what_is_frozen_switched_off_or_active_together_stays_so():
    model = pair()
    model.requires_grad_(False)
    model.base_model.set_adapter(["a0", "a1"])
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a1"].requires_grad_(False)
    model.disable_adapter_layers()
    before, expected = parts(model), logits(model)
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    assert torch.equal(logits(model), expected)
    now = parts(model)
    assert same(before, {name: now[name] for name in before})
    model.enable_adapter_layers()
    assert model.active_adapters == ["a0", "a1"]


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_saved_and_loaded(case, tmp_path):
    model, names = of_case(case)
    live.add_weighted_adapter(model, names, [1.0] * len(names), "new")
    expected = with_adapter(model, "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = loaded(base(case), tmp_path / "new")
    assert_close(logits(again), expected)


def test_the_config_is_that_of_a_plain_lora():
    settings = {"task_type": "CAUSAL_LM", "lora_dropout": 0.5, "use_rslora": True}
    model = live_model(base("llama"), [{**PAIR[1], **settings}, PAIR[1]])
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    config = model.peft_config["new"]
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (6, 6, {})
    assert (config.task_type, config.target_modules) == ("CAUSAL_LM", {"q_proj", "v_proj"})
    assert (config.use_rslora, config.lora_dropout, config.inference_mode) == (False, 0.0, True)


@pytest.mark.parametrize(
    ("of_base", "of_adapters"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_dtype_is_that_of_the_adapters(of_base, of_adapters):
    model = pair().to(getattr(torch, of_base))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, of_adapters))
    deltas = deltas_of(model, ["a0", "a1"])
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    assert str(layer.lora_A["new"].weight.dtype) == f"torch.{of_adapters}"
    assert str(layer.lora_B["new"].weight.dtype) == f"torch.{of_adapters}"
    check_deltas(deltas_of(model, ["new"], method="linear").__getitem__, deltas, 1e-6)
    assert with_adapter(model, "new").isfinite().all()


@pytest.mark.parametrize("method", ["do", "linear"])
@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_one_adapter_is_reweighted(method, weight):
    model = pair()
    live.add_weighted_adapter(model, ["a1"], [weight], "new", method)
    expected = {name: weight * delta for name, delta in peft_deltas(model, "a1").items()}
    check_deltas(peft_deltas(model, "new").__getitem__, expected, 1e-6)
    live.add_weighted_adapter(model, ["a1"], [weight], "scaled", method, scale=3)
    expected = {name: 3 * delta for name, delta in expected.items()}
    check_deltas(peft_deltas(model, "scaled").__getitem__, expected, 1e-6)


@pytest.mark.parametrize("method", ["do", "linear", "svd"])
def test_negative_weights_cancel(method):
    model = pair()
    live.add_weighted_adapter(model, ["a1", "a1"], [0.5, -0.5], "new", method)
    of_a1 = peft_deltas(model, "a1")
    for name, delta in peft_deltas(model, "new").items():
        assert delta.norm() <= 1e-6 * of_a1[name].norm()
    assert (logits(base("llama")) - with_adapter(model, "a1")).abs().max() > 1e-3
    assert_close(with_adapter(model, "new"), logits(base("llama")), 1e-5)


def test_svd_rank_cuts_the_result_of_any_method():
    model = pair()
    for method in ("do", "linear", "svd"):
        live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], method, method, 1)
        expected = deltas_of(model, ["a0", "a1"], method=method, rank=1)
        assert {layer.r[method] for layer in adapted(model).values()} == {1}
        check_deltas(peft_deltas(model, method).__getitem__, expected, 1e-5)


def test_ours_find_their_scale_and_peft_s_names_are_at_1():
    model = pair()
    given = model, ["a0", "a1"], [1.0, 1.0]
    report = live.add_weighted_adapter(*given, "new")
    assert (report.recipe.method, report.recipe.scale) == ("auto", "auto")
    expected = deltas_of(model, ["a0", "a1"], method="auto", scale="auto")
    check_deltas(peft_deltas(model, "new").__getitem__, expected, 1e-6)
    report = live.add_weighted_adapter(*given, "iso", "iso_c")
    assert report.recipe.scale == "auto"
    assert report.scale != 1
    for kind in ("linear", "svd", "ties", "magnitude_prune"):
        report = live.add_weighted_adapter(*given, kind, kind)
        assert (report.scale, report.recipe.scale) == (1.0, 1.0)
    report = live.add_weighted_adapter(*given, "ties auto", "ties", scale="auto")
    assert report.recipe.scale == "auto"


def test_options_are_those_of_the_method_and_of_merge():
    model = pair()
    options = {"gamma": 0.1, "steps": 3, "scale": -2.0, "energy": 0.9, "backend": "torch"}
    report = live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new", "do", **options)
    assert (report.scale, report.recipe.backend) == (-2.0, "torch")
    expected = deltas_of(model, ["a0", "a1"], method="do", **options)
    check_deltas(peft_deltas(model, "new").__getitem__, expected, 1e-5)


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LLAMA).eval()


def head(model: peft.PeftModel, adapter: str) -> nn.Parameter:
    return model.base_model.model.score.modules_to_save[adapter].weight


@pytest.mark.parametrize("order", [["a0", "a1"], ["a1", "a0"]])
def test_a_module_that_one_adapter_saves_whole_is_kept(order, tmp_path):
    model = live_model(classifier(), [PAIR[0], {**PAIR[1], "modules_to_save": ["score"]}])
    head(model, "a1").data.normal_()
    deltas = deltas_of(model, order)
    live.add_weighted_adapter(model, order, [1.0, 1.0], "new")
    assert torch.equal(head(model, "new"), head(model, "a1"))
    assert head(model, "new").data_ptr() != head(model, "a1").data_ptr()
    by_hand = add_by_hand(classifier(), deltas)
    by_hand.score.weight.data = head(model, "a1").data
    expected = with_adapter(model, "new")
    assert_close(expected, logits(by_hand), 1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = loaded(classifier(), tmp_path / "new")
    assert_close(logits(again), expected)


def test_modules_saved_whole_that_differ_are_refused():
    settings = [{**s, "task_type": "SEQ_CLS"} for s in PAIR]
    model = live_model(classifier(), settings)
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "equal")
    assert torch.equal(head(model, "equal"), head(model, "a0"))
    head(model, "a1").data[0, 0] += 1
    before = parts(model)
    with pytest.raises(ValueError, match=r"^adapter 'a1': 'score.weight', saved.*'a0'"):
        live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    assert same(before, parts(model))


WRONG = {
    "unknown type": ({"combination_type": "liner"}, "'liner' is not known; did you mean 'linear'?"),
    "PEFT's type": ({"combination_type": "dare_svd"}, "option 'combination_type': 'dare_svd' is"),
    "existing name": ({"adapter_name": "a1"}, "option 'adapter_name': the model has 'a1' already"),
    "dotted name": ({"adapter_name": "a.b"}, "'a.b' cannot be the name of a module"),
    "unknown adapter": ({"adapters": ["a0", "b"]}, "adapter 'b': is not an adapter of this model"),
    "one name": ({"adapters": "a0"}, "option 'adapters': is one name, not a list; say ['a0']"),
    "no adapters": ({"adapters": [], "weights": []}, "no adapters given"),
    "too few weights": ({"weights": [1.0]}, "option 'weights': 1 weights for 2 adapters"),
    "zero": ({"adapters": ["a0"], "weights": [0.0]}, "option 'weights': all are zero"),
    "no number": ({"adapters": ["a0"], "weights": ["x"]}, "'x' is not a finite number"),
    "density": (
        {"combination_type": "do", "density": 0.5},
        "option 'density': method 'do' has no such option",
    ),
    "majority": (
        {"combination_type": "do", "majority_sign_method": "frequency"},
        "'majority_sign_method': method 'do'",
    ),
    "svd_rank": ({"svd_rank": 0}, "option 'svd_rank': 0 is too small"),
    "svd_clamp": ({"svd_clamp": 0.9}, "option 'svd_clamp': is for PEFT's dense SVD"),
    "full_matrices": ({"svd_full_matrices": False}, "option 'svd_full_matrices': is for PEFT's"),
    "svd_driver": ({"svd_driver": "gesvd"}, "option 'svd_driver': is for PEFT's dense SVD"),
    "rank": ({"rank": 2}, "option 'rank': is not an option on a live model; say svd_rank"),
    "output": ({"output": "out"}, "option 'output': is not an option on a live model; save"),
    "form": ({"form": "deltas"}, "option 'form': is not an option on a live model; leave"),
    "mistyped": (
        {"combination_type": "do", "gama": 2.0},
        "option 'gama': method 'do' has no such option; did you mean",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line_and_changes_nothing(case):
    wrong, message = WRONG[case]
    model = pair()
    before = parts(model)
    given = {"adapters": ["a0", "a1"], "weights": [1.0, 1.0], "adapter_name": "new"} | wrong
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        live.add_weighted_adapter(model, **given)
    assert isinstance(error.value, dm.DomergeError)
    assert message in str(error.value)
    assert same(before, parts(model))
    assert list(model.peft_config) == ["a0", "a1"]


def test_what_cannot_be_merged_exactly_is_refused():
    model = live_model(base("llama"), [PAIR[0], {**PAIR[1], "use_dora": True}])
    with pytest.raises(dm.AdapterError, match="'a1': is a DoRA"):
        live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    other = peft.get_peft_model(
        base("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    for model in (other, base("llama")):
        with pytest.raises(dm.OptionError, match=r"'model': a (IA3Model|LlamaForC\w+) has no"):
            live.add_weighted_adapter(model, ["default"], [1.0], "new")


@pytest.mark.parametrize("stop", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_halfway_leaves_no_adapter(stop, monkeypatch):
    model = live_model(classifier(), [PAIR[0], {**PAIR[1], "modules_to_save": ["score"]}])
    before, expected = parts(model), logits(model)
    fill = peft_adding._fill

    def fail(*args: object) -> None:
        fill(*args)
        raise stop

    monkeypatch.setattr(peft_adding, "_fill", fail)
    with pytest.raises(type(stop)):
        live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    assert list(model.peft_config) == ["a0", "a1"]
    assert same(before, parts(model))
    assert torch.equal(logits(model), expected)
    monkeypatch.undo()
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")


def test_configs_that_do_not_fit_the_layers_are_refused():
    model = live_model(base("llama"), [PAIR[1], PAIR[1]])
    for config in model.peft_config.values():
        config.target_modules = {"q_proj"}
    before = parts(model)
    with pytest.raises(dm.DomergeError, match=r"module '.*v_proj': the adapters' layers are not"):
        live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    assert same(before, parts(model))


@pytest.mark.parametrize(
    "names", [list(RANKS), list(RANKS)[4:], ["block.fc", "layers.1.fc"]], ids=["all", "in", "ends"]
)
def test_no_other_module_is_adapted(names):
    torch.manual_seed(0)
    selections = ["|".join(map(re.escape, part)) for part in (names, names[1:])]
    model = live_model(Maze(), [{"target_modules": s, "r": 2} for s in selections])
    before = parts(model)
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new")
    found = {name: layer.r["new"] for name, layer in adapted(model).items() if "new" in layer.r}
    assert found == {name: 4 if name in names[1:] else 2 for name in names}
    model.delete_adapter("new")
    assert same(before, parts(model))


def test_replicated_layers_are_not_replicated_again(tmp_path):
    def fresh() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(copy.deepcopy(LLAMA)).eval()

    model = live_model(fresh(), [{**PAIR[0], "layer_replication": [[0, 2], [1, 2]]}, PAIR[1]])
    before = parts(model)
    live.add_weighted_adapter(model, ["a1", "a0"], [1.0, 1.0], "new")
    now = parts(model)
    assert same(before, {name: now[name] for name in before})
    assert len(model.base_model.model.model.layers) == 3
    expected = with_adapter(model, "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = loaded(fresh(), tmp_path / "new")
    assert_close(logits(again), expected)


def test_the_signature_is_pefts():
    theirs = inspect.signature(peft.LoraModel.add_weighted_adapter).parameters
    ours = inspect.signature(live.add_weighted_adapter).parameters
    assert list(ours)[:-1] == ["model", *list(theirs)[1:]]
    for name in theirs.keys() - {"self", "combination_type"}:
        assert ours[name].default == theirs[name].default, name
    for method in TABLE.values():
        for field in dataclasses.fields(method.options):
            if field.name == "majority_sign_method":
                assert field.default == theirs[field.name].default


def test_pefts_own_types_are_known():
    hints = typing.get_type_hints(peft.LoraModel.add_weighted_adapter)
    declared = set(typing.get_args(hints["combination_type"]))
    assert declared >= live.PEFT_TYPES or not declared


def test_types_of_a_newer_peft_go_to_peft(monkeypatch):
    def newer(self: object, *args: object, combination_type: Literal["new", "do"] = "new") -> tuple:
        return combination_type, args

    monkeypatch.setattr(peft.LoraModel, "add_weighted_adapter", newer)
    live.install()
    model = pair()
    for kind in ("new", "do"):
        assert model.add_weighted_adapter("x", combination_type=kind) == (kind, ("x",))
    live.add_weighted_adapter(model, ["a0"], [1.0], "ours", "do")
    live.uninstall()
    assert peft.LoraModel.add_weighted_adapter is newer


def test_install_adds_our_types_and_passes_pefts_through():
    original = peft.LoraModel.add_weighted_adapter
    given = ["a0", "a1"], [1.0, -0.5]
    expected = live_model(base("llama"), [PAIR[0], PAIR[0]])
    for name, kind in (("linear", ["linear"]), ("svd", []), ("ties", ["ties_svd", 2])):
        density = {"density": 0.5} if name == "ties" else {}
        expected.add_weighted_adapter(*given, name, *kind, **density)
    live.add_weighted_adapter(expected, *given, "do", combination_type="do", gamma=0.5)
    live.install()
    live.install()
    model = live_model(base("llama"), [PAIR[0], PAIR[0]])
    model.add_weighted_adapter(*given, "linear", combination_type="linear")
    model.add_weighted_adapter(*given, "svd")
    model.add_weighted_adapter(*given, "ties", "ties_svd", 2, density=0.5)
    model.add_weighted_adapter(*given, "do", combination_type="do", gamma=0.5)
    for name in ("linear", "svd", "ties", "do"):
        one, other = peft_deltas(model, name), peft_deltas(expected, name)
        assert one.keys() == other.keys()
        for module in one:
            assert_close(one[module], other[module], name=module)
    exact = weighted_sum([peft_deltas(model, name) for name in given[0]], given[1])
    assert any((one - exact[n]).norm() > 0.1 for n, one in peft_deltas(model, "linear").items())
    model.base_model.add_weighted_adapter(*given, "positional", "do", 1)
    assert {layer.r["positional"] for layer in adapted(model).values()} == {1}
    with pytest.raises(ValueError, match="'dare_svd' is not known"):
        model.add_weighted_adapter(*given, "new", combination_type="dare_svd")
    assert model.add_weighted_adapter(*given, "a0", combination_type="svd") is None
    with pytest.raises(ValueError, match="the model has 'a0' already"):
        model.add_weighted_adapter(*given, "a0", combination_type="do")
    live.uninstall()
    assert peft.LoraModel.add_weighted_adapter is original
    live.uninstall()
    with pytest.raises(ValueError, match="Invalid combination_type"):
        model.add_weighted_adapter(*given, "new", combination_type="do")


def test_only_this_module_imports_peft():
    code = (
        "import sys, domerge_fast as dm, domerge_fast.integrations; dm.merge, dm.from_model;"
        "print({'peft', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(dm.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_missing_peft_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, live.__name__)
    with pytest.raises(dm.DomergeError, match=r"^domerge_fast.integrations.peft needs PEFT .*$"):
        importlib.import_module(live.__name__)


def saving(*modules: list[str] | None) -> peft.PeftModel:
    """Adapters of the Llama that save modules whole, each with its own values."""
    settings = [{**PAIR[1], "modules_to_save": some} for some in modules]
    model = live_model(base("llama"), settings)
    for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "modules_to_save" in name:
            generator = torch.Generator().manual_seed(seed)
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0]])
def test_modules_saved_whole_are_merged_as_their_files_are(weights, tmp_path):
    saved = ["embed_tokens", "lm_head"]
    model = saving(saved, saved[:1])
    model.save_pretrained(tmp_path)
    base("llama").save_pretrained(tmp_path / "base")
    live.add_weighted_adapter(model, ["a0", "a1"], weights, "new", "linear")
    files = [tmp_path / "a0", tmp_path / "a1"]
    options = {"weights": weights, "base": tmp_path / "base", "output": tmp_path / "out"}
    dm.merge(files, "linear", **options)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["new"])
    ours = load_file(tmp_path / "out/adapter_model.safetensors")
    theirs = load_file(tmp_path / "saved/new/adapter_model.safetensors")
    whole = [key for key in ours if ".lora_" not in key]
    assert {key.split(".")[-2] for key in whole} == set(saved)
    assert whole == [key for key in theirs if ".lora_" not in key]
    assert all(torch.equal(ours[key], theirs[key]) for key in whole)
    again = loaded(base("llama"), tmp_path / "out")
    torch.testing.assert_close(logits(again), with_adapter(model, "new"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("whole", "owner"), [("from:a1", "a1"), ("from:1", "a0"), ("drop", None)])
def test_the_policy_for_modules_saved_whole_can_be_chosen(whole, owner, tmp_path):
    model = saving(["lm_head"], ["lm_head"])
    live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "new", whole=whole)
    saved = model.base_model.model.lm_head.modules_to_save
    assert ("new" in saved) == (owner is not None)
    assert owner is None or torch.equal(saved["new"].weight, saved[owner].weight)
    expected = with_adapter(model, "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = loaded(base("llama"), tmp_path / "new")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(dm.OptionError, match="no adapter is called 'a2'"):
        live.add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "next", whole="from:a2")
