"""Adapters of bare parameters (PEFT's target_parameters), as the experts of MoE models are."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.make import PREFIX, lora_tensors, random_factors, write_adapter, write_folder
from support.timing import least
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import domerge_fast as dm
from domerge_fast.errors import AdapterError, OptionError
from domerge_fast.integrations.peft import add_weighted_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(32).reshape(2, 16)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
QWEN = Qwen3MoeConfig(**SIZES, intermediate_size=48, moe_intermediate_size=24, num_experts=4)
GPT = GptOssConfig(
    **SIZES, intermediate_size=24, num_local_experts=4, layer_types=["full_attention"] * 2
)
LLAMA4 = Llama4TextConfig(
    **SIZES, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=4
)
MIXTRAL = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)
MODELS = {
    "qwen3": (Qwen3MoeForCausalLM, QWEN),
    "gpt-oss": (GptOssForCausalLM, GPT),
    "mixtral": (MixtralForCausalLM, MIXTRAL),
    "llama4": (Llama4ForCausalLM, LLAMA4),
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"experts.*": 3}},
    {"r": 2, "lora_alpha": 8, "use_rslora": True},
    {"r": 3, "lora_alpha": 3},
]
WEIGHTS = [1.0, 0.5, -0.75]


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    build, config = MODELS[kind]
    return build(config).eval()


def adapted(kind: str, adapters: list[dict[str, Any]] = ADAPTERS, **more: Any) -> peft.PeftModel:
    """The model with adapters "a0", "a1", ..., all with values."""
    configs = [
        peft.LoraConfig(
            **{"target_modules": ["q_proj", "v_proj"], "target_parameters": TARGETS, **own, **more}
        )
        for own in adapters
    ]
    model = peft.get_peft_model(model_of(kind), configs[0], adapter_name="a0")
    for k, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{k}", config)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.named_parameters():
        if ".lora_" in name:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def saved(model: peft.PeftModel, folder: Path) -> list[Path]:
    model.save_pretrained(folder)
    return [folder / name for name in model.peft_config]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def all_active(model: peft.PeftModel, weights: list[float]) -> Tensor:
    """The logits with all adapters at once, each with its weight."""
    names = [*model.peft_config]
    for module in model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            own = {n: w * scaling[n] for n, w in zip(names, weights) if n in scaling}
            scaling.update(own)
    model.base_model.set_adapter(names)
    return logits(model)


def updates(model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    """ΔW [m, n] of every module as PEFT forms it, of every expert by its number."""
    found: dict[str, Tensor] = {}
    for path, module in model.base_model.model.named_modules():
        if name not in getattr(module, "lora_A", {}):
            continue
        delta = module.get_delta_weight(name)
        parameter = getattr(module, "parameter_name", None)
        if parameter is None:
            found[path] = delta
            continue
        turned = getattr(module.get_base_layer(), "is_transposed", False)
        owner = re.sub(r"(\.base_layer)+$", "", path)
        for e, part in enumerate(delta):
            found[f"{owner}.{parameter}.{e}"] = part.T if turned else part
    return {path: delta.detach() for path, delta in found.items()}


def dense(adapter: dm.Adapter, name: str) -> Tensor:
    a, b = adapter.factors(name)
    return adapter.modules[name].scaling * b.double() @ a.double()


@pytest.mark.parametrize("kind", MODELS)
def test_every_expert_is_read_as_peft_computes_it(kind, tmp_path):
    model = adapted(kind)
    folders = saved(model, tmp_path)
    for k, folder in enumerate(folders):
        wanted = updates(model, f"a{k}")
        for adapter in (dm.load(folder), dm.from_model(model, f"a{k}")):
            assert set(adapter.modules) == set(wanted)
            for name, delta in wanted.items():
                assert_close(dense(adapter, name), delta, name=name)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_folder_computes_what_all_adapters_do(kind, ragged, tmp_path):
    model = adapted(kind)
    folders = saved(model, tmp_path / "in")
    out = tmp_path / "out"
    dm.merge(folders, "linear", weights=WEIGHTS, scale=1.0, output=out, ragged=ragged)
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) == set(TARGETS)
    found = logits(peft.PeftModel.from_pretrained(model_of(kind), out).eval())
    wanted = all_active(model, WEIGHTS)
    assert (wanted - logits(model_of(kind))).abs().max() > 0.1
    assert_close(found, wanted, 1e-5)


def test_one_adapter_comes_out_as_it_was(tmp_path):
    folders = saved(adapted("qwen3"), tmp_path / "in")
    for k, folder in enumerate(folders):
        dm.merge([folder], "linear", scale=1.0, output=tmp_path / str(k))
        old, new = dm.load(folder), dm.load(tmp_path / str(k))
        assert list(old.modules) == list(new.modules)
        for name, module in old.modules.items():
            assert new.modules[name].rank == module.rank
            assert_close(dense(new, name), dense(old, name), name=name)


def factors(
    rank: int, count: int, m: int, n: int, seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A [r E, n] and B [m, r E] of E experts, and the ΔW of each."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator))
        for _ in range(count)
    ]
    a = torch.cat([a for a, _ in pairs])
    b = torch.stack([b for _, b in pairs], -1).flatten(1)
    return a, b, [b.double() @ a.double() for a, b in pairs]


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_computes_what_all_adapters_do(kind, tmp_path):
    """Of gpt-oss the files have one tensor for all experts, of Mixtral and Qwen3 one for each."""
    model = adapted(kind)
    folders = saved(model, tmp_path / "in")
    build, _ = MODELS[kind]
    given = {"weights": WEIGHTS, "scale": 1.0, "base": saved_base(kind, tmp_path / "base")}
    dm.merge(folders, "linear", **given, form="model", output=tmp_path / "out")
    found = logits(build.from_pretrained(tmp_path / "out").eval())
    assert_close(found, all_active(model, WEIGHTS), 1e-5)


def saved_base(kind: str, folder: Path) -> Path:
    model_of(kind).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_dense_updates_are_what_a_merged_model_has_more(kind, tmp_path):
    folders = saved(adapted(kind), tmp_path / "in")
    given = {"weights": WEIGHTS, "scale": 1.0, "base": saved_base(kind, tmp_path / "base")}
    rule = {"modules": "*.experts.down_proj.2", "leave_out": True}
    given["rules"] = [rule]
    dm.merge(folders, "linear", **given, form="model", output=tmp_path / "model")
    dm.merge(folders, "linear", **given, form="deltas", output=tmp_path / "deltas")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "model"))
    changes = load_file(tmp_path / "deltas" / "deltas.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(changes)
    for name, change in changes.items():
        assert_close(before[name] + change, after[name], name=name)
    with pytest.raises(dm.DomergeError, match=r"experts.*lies.*give it \(base, --base\)"):
        dm.merge(folders, form="deltas", output=tmp_path / "none")


@pytest.mark.parametrize("kind", MODELS)
def test_a_live_model_takes_the_merge_of_its_adapters(kind, tmp_path):
    model = adapted(kind)
    add_weighted_adapter(model, [*model.peft_config], WEIGHTS, "merged", "linear")
    model.set_adapter("merged")
    found = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "merged").eval()
    model.delete_adapter("merged")
    wanted = all_active(model, WEIGHTS)
    assert_close(found, wanted, 1e-5)
    assert_close(logits(again), wanted, 1e-5)


def test_a_live_model_has_ranks_by_parameter():
    """Also of one that has a layer that is compiled, which puts a name of its own there."""
    model = adapted("qwen3")
    layers = model.base_model.model.model.layers
    layers[1] = torch.compile(layers[1])
    report = add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "low", "svd", svd_rank=3)
    name = "model.layers.1.mlp.experts.gate_up_proj.2"
    assert report.modules[name].rank == 3
    wrapper = layers[1].mlp.experts
    assert wrapper.base_layer.lora_A["low"].weight.shape == (12, 32)
    merged = dm.merge([dm.from_model(model, x) for x in ("a0", "a1")], "svd", rank=3, scale=1.0)
    assert_close(dense(dm.from_model(model, "low"), name), merged.delta(name))


OLD = {
    "qwen3": ("mlp", {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}),
    "mixtral": ("block_sparse_moe", {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]}),
}


@pytest.mark.parametrize("kind", OLD)
def test_experts_as_modules_go_with_experts_as_parameters(kind, tmp_path):
    """The names of older versions, which PEFT turns into parameters when it loads them."""
    inside, parts = OLD[kind]
    config = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}
    model = adapted(kind, ADAPTERS[2:], **config)
    new = saved(model, tmp_path / "in")[0]
    shapes = {}
    for layer, e, (parameter, names) in itertools.product(range(2), range(4), parts.items()):
        for name in names:
            module = f"model.layers.{layer}.{inside}.experts.{e}.{name}"
            shapes[module] = (32, 24) if parameter == "down_proj" else (24, 32)
    names = [name for found in parts.values() for name in found]
    old = write_adapter(tmp_path / "old", random_factors(shapes, 2), target_modules=names)
    merged = dm.merge([new, old], "linear", scale=0.1, output=tmp_path / "out")
    assert any("gate_up_proj" in note and "split" in note for note in merged.report.notes)
    assert set(shapes) < set(dm.load(tmp_path / "out").modules)
    model.load_adapter(old, "old")
    found = logits(peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "out").eval())
    assert_close(found, all_active(model, [0.1, 0.1]), 1e-5)


OWNER = "model.layers.0.mlp.experts"


def write_experts(
    folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, **config: Any
) -> Path:
    """A folder of wrappers by their path below the experts ("" for the outermost)."""
    tensors = {}
    for inner, (a, b) in pairs.items():
        tensors[f"{PREFIX}{OWNER}{inner}.lora_A.weight"] = a
        tensors[f"{PREFIX}{OWNER}{inner}.lora_B.weight"] = b
    fields = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": rank}
    fields |= {"lora_alpha": rank, "target_modules": [], "target_parameters": TARGETS}
    return write_folder(folder, tensors, fields | config)


def both(rank: int, count: int = 3, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        ".base_layer": factors(rank, count, 20, 16, seed)[:2],
        "": factors(rank, count, 16, 10, seed + 1)[:2],
    }


def write_base(folder: Path, tensors: Mapping[str, Tensor], model_type: str = "x") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def square(folder: Path) -> tuple[Path, Tensor]:
    """An adapter of square matrices, and the update of its first."""
    a, b, deltas = factors(2, 3, 8, 8)
    return write_experts(folder, {"": (a, b)}, 2, target_parameters=TARGETS[1:]), deltas[0]


@pytest.mark.parametrize("turned", [False, True])
def test_a_square_parameter_lies_as_the_others_or_as_its_model_s_do(turned, tmp_path):
    down = f"{OWNER}.down_proj"
    base = {down: torch.zeros(3, 8, 8)}
    folder, delta = square(tmp_path / "square")
    given = {"scale": 1.0, "form": "model", "output": tmp_path / "out"}
    if turned:
        given["base"] = write_base(tmp_path / "base", base, "gpt_oss")
    else:
        up = factors(2, 3, 16, 8)[:2]
        folder = write_experts(
            tmp_path / "two", {"": factors(2, 3, 8, 8)[:2], ".base_layer": up}, 2
        )
        base[f"{OWNER}.gate_up_proj"] = torch.zeros(3, 16, 8)
        given["base"] = write_base(tmp_path / "base", base)
    dm.merge([folder], "linear", **given)
    found = load_file(tmp_path / "out" / "model.safetensors")[down][0]
    assert_close(found, delta.T if turned else delta)


H = torch.zeros(3, 16, 8)


def test_many_names_take_no_longer(tmp_path):
    """Every module is looked up in them, not compared with each."""
    names = [f"layers.{k}.experts.w{k}" for k in range(20_000)]
    modules = {f"model.layers.{k}.gate": (torch.ones(1, 1), torch.ones(1, 1)) for k in range(2000)}
    folder = write_adapter(tmp_path, modules, target_parameters=[*names, "gate.weight"])

    def seconds() -> float:
        begin = time.process_time()
        adapter = dm.load(folder)
        assert all(module.slice for module in adapter.modules.values())
        return time.process_time() - begin

    assert least(seconds, 5) <= 5


BASES: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "square": ({f"{OWNER}.down_proj": H[:, :8]}, ["square", "which way", "write an adapter"]),
    "other shape": ({f"{OWNER}.down_proj": H}, ["as [3, 16, 8]", "needs [3, 8, 8]"]),
    "other count": ({f"{OWNER}.down_proj": H[:2, :8]}, ["as [2, 8, 8]", "needs [3, 8, 8]"]),
    "quantized": ({f"{OWNER}.down_proj_blocks": H[:, :8]}, ["down_proj_blocks", "quantized"]),
    "in int8": ({f"{OWNER}.down_proj": H[:, :8].to(torch.int8)}, ["int8", "quantized"]),
    "none": ({f"{OWNER}.gate": H[0]}, ["has no", "down_proj"]),
    "an expert less": (
        {f"{OWNER}.{e}.down_proj.weight": H[0, :8].clone() for e in range(2)},
        ["has no", "down_proj"],
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_does_not_fit_is_refused_in_one_line(case, tmp_path):
    tensors, fragments = BASES[case]
    base = write_base(tmp_path / "base", {name: x.contiguous() for name, x in tensors.items()})
    for form in ("model", "deltas"):
        with pytest.raises(OptionError, match=".*".join(map(re.escape, fragments))):
            dm.merge([square(tmp_path / form)[0]], form=form, base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


METHODS = {
    "do": {"scale": 1.0},
    "tsvm": {"scale": 1.0},
    "ties": {"scale": 1.0, "density": 0.5},
    "svd": {"scale": 1.0, "rank": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_of_experts_what_it_makes_of_modules(method, tmp_path):
    """Also with ranks that differ, and an expert that is zero in one adapter."""
    of_experts, of_modules = [], []
    for k, rank in enumerate((4, 2, 3)):
        pairs = both(rank, seed=10 * k)
        a, b = pairs[""]
        b.view(16, rank, 3)[:, :, 1] = 0 if k == 0 else b.view(16, rank, 3)[:, :, 1]
        of_experts.append(write_experts(tmp_path / f"experts-{k}", pairs, rank))
        split = {}
        for parameter, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            a, b = pairs[inner]
            for e in range(3):
                own = a[e * rank : (e + 1) * rank], b[:, e::3]
                split[f"{OWNER}.{parameter}.{e}"] = own
        of_modules.append(write_adapter(tmp_path / f"modules-{k}", split))
    options = METHODS[method]
    found = dm.merge(of_experts, method, **options)
    wanted = dm.merge(of_modules, method, **options)
    dm.merge(of_experts, method, **options, output=tmp_path / "out")
    written = dm.load(tmp_path / "out")
    assert set(found.names) == set(wanted.names) == set(written.modules)
    for name in found.names:
        assert torch.equal(found.delta(name), wanted.delta(name)), name
        assert_close(dense(written, name), wanted.delta(name), 1e-5, name=name)


def test_an_expert_of_own_rank_is_padded_within_its_parameter(tmp_path):
    """energy gives every expert its own rank; a folder has one a parameter."""
    pairs = both(4)
    for k, (_, b) in enumerate(pairs.values(), 1):
        b.view(len(b), 4, 3)[:, k:, 1] *= 1e-4
    folder = write_experts(tmp_path / "in", pairs, 4)
    merged = dm.merge([folder], "linear", scale=1.0, energy=0.999, output=tmp_path / "out")
    ranks = {name: report.rank for name, report in merged.report.modules.items()}
    assert len({rank for name, rank in ranks.items() if "gate_up" in name}) > 1
    written = dm.load(tmp_path / "out")
    assert {name: module.rank for name, module in written.modules.items()} == ranks
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4


def test_adapters_of_different_parameters(tmp_path):
    """One has no wrapper where the other has the outermost: they are nested anew."""
    pairs = both(4)
    one = {"": pairs[".base_layer"]}
    first = write_experts(tmp_path / "a", one, 4, target_parameters=TARGETS[:1])
    second = write_experts(tmp_path / "b", {"": pairs[""]}, 4, target_parameters=TARGETS[1:])
    dm.merge([first, second], "linear", scale=1.0, output=tmp_path / "out")
    out = dm.load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"{OWNER}.down_proj", f"{OWNER}.gate_up_proj"]
    assert config["target_modules"] == []
    for folder in (first, second):
        adapter = dm.load(folder)
        for name in adapter.modules:
            assert_close(dense(out, name), dense(adapter, name), name=name)


def test_an_expert_left_out_is_zero(tmp_path):
    folder = write_experts(tmp_path / "in", both(4), 4)
    rule = {"modules": f"{OWNER}.down_proj.1", "leave_out": True}
    dm.merge([folder], "linear", scale=1.0, rules=[rule], output=tmp_path / "out")
    out = dm.load(tmp_path / "out")
    assert not dense(out, f"{OWNER}.down_proj.1").any()
    name = f"{OWNER}.down_proj.2"
    assert_close(dense(out, name), dense(dm.load(folder), name))


def test_a_router_is_a_module(tmp_path):
    """PEFT adapts the matrix `gate.weight` as a parameter; older versions have a linear layer."""
    pair = torch.randn(2, 8), torch.randn(4, 2)
    router = "model.layers.0.mlp.gate"
    fields = {"target_modules": [], "target_parameters": ["gate.weight"]}
    new = write_adapter(tmp_path / "new", {router: pair}, **fields)
    old = write_adapter(tmp_path / "old", {router: pair})
    dm.merge([new, old], "linear", scale=1.0, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [f"{router}.weight"]
    assert_close(dense(dm.load(tmp_path / "out"), router), 2 * (pair[1] @ pair[0]).double())


def refused(*fragments: str) -> Any:
    return pytest.raises(AdapterError, match=".*".join(map(re.escape, fragments)))


def only(inner: str, rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    return {inner: both(rank)[inner]}


# Wrappers, the rank, config fields, and what the message must say, in order.
REFUSED: dict[str, tuple[Any, int, dict[str, Any], list[str]]] = {
    "no multiple": (both(4), 5, {}, [f"{OWNER}.down_proj'", "12 rank rows", "rank 5"]),
    "other counts": (
        both(4),
        4,
        {"rank_pattern": {"down_proj": 2}},
        [f"{OWNER}'", "down_proj 6, gate_up_proj 3", "rank_pattern"],
    ),
    "not named": (
        both(4),
        4,
        {"target_parameters": None},
        ["rank 12, the config says 4", "3 experts of rank 4 in target_parameters"],
    ),
    "one name for two": (
        both(4),
        4,
        {"target_parameters": TARGETS[:1]},
        [f"{OWNER}'", "2 wrappers, target_parameters names 1"],
    ),
    "names of others": (
        both(4),
        4,
        {"target_parameters": ["a.b", "c.d"]},
        [f"{OWNER}'", "names 0 (none)", "in full"],
    ),
    "no order": (
        both(4),
        4,
        {"target_parameters": ["experts.first", "experts.second"]},
        [f"{OWNER}'", "first, second", "order", "from_model"],
    ),
    "no outermost": (only(".base_layer"), 4, {}, [f"{OWNER}'", "wrapper", f"{OWNER}'", "save"]),
    "a gap": (
        both(4) | {".base_layer.base_layer.base_layer": both(4)[""]},
        4,
        {},
        [f"{OWNER}'", "wrapper", f"{OWNER}.base_layer.base_layer'", "save"],
    ),
    "no list": (both(4), 4, {"target_parameters": "experts.down_proj"}, ["a list of names"]),
    "a number": (
        {"": (torch.tensor(1.0), torch.ones(8, 12))},
        4,
        {"target_parameters": TARGETS[:1]},
        [f"{OWNER}'", "no matrix"],
    ),
    "different rank": (
        {"": (torch.ones(12, 8), torch.ones(8, 9))},
        4,
        {"target_parameters": TARGETS[:1]},
        ["gate_up_proj'", "different rank"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_adapter_is_refused_in_one_line(case, tmp_path):
    pairs, rank, config, fragments = REFUSED[case]
    with refused(*fragments):
        dm.load(write_experts(tmp_path, pairs, rank, **config))


def test_adapters_of_other_experts_are_refused(tmp_path):
    three = write_experts(tmp_path / "three", both(4), 4)
    four = write_experts(tmp_path / "four", both(4, count=4), 4)
    name = f"{OWNER}.down_proj.0"
    with refused(name, "one of 4, adapter", "one of 3"):
        dm.merge([three, four])
    pair = torch.ones(2, 16), torch.ones(10, 2)
    single = write_adapter(tmp_path / "single", {f"{OWNER}.1.fc1": pair})
    with refused(f"{OWNER}.1.fc1'", "one expert", "down_proj", "save it again"):
        dm.merge([three, single])
    odd = write_adapter(tmp_path / "odd", {f"{OWNER}.1.gate_proj": (pair[0], torch.ones(9, 2))})
    with refused("gate_up_proj.1'", "20 outputs", "gate_proj 9, up_proj 9"):
        dm.merge([three, odd])
    with refused("down_proj'", "target_parameters", "at once"):
        dm.Sequential.start(tmp_path / "sum").add(three)


def test_a_parameter_s_name_may_be_short(tmp_path):
    """As PEFT writes those that it makes of the names of older models."""
    short = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}
    folder = write_experts(tmp_path / "a", both(4), 4, **short)
    tensors = load_file(folder / "adapter_model.safetensors")
    q_proj = "model.layers.0.self_attn.q_proj"
    tensors |= lora_tensors({q_proj: (torch.ones(4, 6), torch.ones(8, 4))})
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = dm.load(write_folder(tmp_path / "b", tensors, config))
    names = [f"{OWNER}.{name}.{e}" for name in ("down_proj", "gate_up_proj") for e in range(3)]
    assert list(adapter.modules) == [*names, q_proj]
