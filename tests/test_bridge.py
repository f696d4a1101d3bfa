"""Adapters saved from different classes of one model: bridged where that is clear, else refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.make import random_factors, write_adapter
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

import domerge_fast as dm
from domerge_fast.adapters import one_spelling
from domerge_fast.errors import AdapterError

Shapes = Mapping[str, tuple[int, int]]


def layers(stem: str, tails: Sequence[str] = ("self_attn.q_proj", "mlp.up"), n: int = 8) -> Shapes:
    return {f"{stem}.{i}.{tail}": (6 + len(tail), n) for i in range(2) for tail in tails}


def adapter(k: int, shapes: Shapes, base: str | None = "base") -> dm.Adapter:
    factors = random_factors(shapes, 2, seed=k)
    return dm.from_tensors(factors, name=f"a{k}", base_model=base)


def bridged(*adapters: Shapes, base: str | None = "base") -> list[list[str]]:
    made = [adapter(k, shapes, base) for k, shapes in enumerate(adapters)]
    return [list(one.modules) for one in one_spelling(made)[0]]


def renamed(shapes: Shapes, old: str, new: str) -> list[str]:
    return sorted(new + name.removeprefix(old) for name in shapes if name.startswith(old))


CASES: dict[str, tuple[str, str]] = {
    "backbone and causal": ("layers", "model.layers"),
    "GPT-2": ("h", "transformer.h"),
    "BERT": ("encoder.layer", "bert.encoder.layer"),
    "vision-language, 4.52": ("model.layers", "model.language_model.layers"),
    "LLaVA, 4.52": ("language_model.model.layers", "model.language_model.layers"),
    "text model alone": ("model.layers", "language_model.model.layers"),
    "CLIP's text": ("encoder.layers", "text_model.encoder.layers"),
    "U-Net": ("down_blocks", "unet.down_blocks"),
    "in a module": ("model.layers", "module.model.layers"),
}


@pytest.mark.parametrize("base", ["base", None])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_classes_of_one_model_are_bridged_to_the_first_spelling(case, turned, base):
    one, other = CASES[case][::-1] if turned else CASES[case]
    first, second = layers(one), layers(other)
    assert bridged(first, second, base=base) == [sorted(first)] * 2


@pytest.mark.parametrize("tails", [["self_attn.q_proj"], ["mlp.up"], ["self_attn.o_proj"]])
def test_adapters_of_other_projections_are_bridged(tails):
    second = layers("model.language_model.layers", tails)
    names = bridged(layers("model.layers", ["self_attn.v_proj"]), second)
    assert names[1] == renamed(second, "model.language_model", "model")


def test_siblings_are_enough_without_a_base_and_strangers_are_not():
    first = layers("model.layers", ["self_attn.q_proj"])
    second = layers("layers", ["self_attn.v_proj"])
    assert bridged(first, second, base=None)[1] == renamed(second, "", "model.")
    with pytest.raises(
        AdapterError, match=r"'layers' may be 'model\.layers'.*; load both with one"
    ):
        bridged(first, layers("layers", ["mixer.in_proj"]), base=None)


def test_the_majority_decides():
    old, new = layers("model.layers"), layers("model.language_model.layers")
    assert bridged(old, new, new) == [sorted(new)] * 3
    assert bridged(new, old, old) == [sorted(old)] * 3
    assert bridged(new, old) == [sorted(new)] * 2


def test_several_parts_follow_each_by_itself():
    old = {**layers("language_model.model.layers"), **layers("vision_tower.encoder.layers", n=5)}
    new = {
        **layers("model.language_model.layers"),
        **layers("model.vision_tower.encoder.layers", n=5),
    }
    old |= {"language_model.lm_head": (30, 8), "multi_modal_projector.linear_1": (8, 5)}
    new |= {"lm_head": (30, 8), "model.multi_modal_projector.linear_1": (8, 5)}
    for pair in itertools.permutations([old, new]):
        assert bridged(*pair) == [sorted(pair[0])] * 2


def test_what_is_inside_of_the_class_follows_it():
    backbone = {**layers("layers"), "embed_tokens": (8, 30)}
    causal = layers("model.layers")
    assert bridged(causal, backbone)[1] == renamed(backbone, "", "model.")
    # A backbone has no place for the head, so its names cannot be those of the result.
    with_head = {**causal, "lm_head": (30, 8)}
    assert bridged(backbone, with_head)[0] == renamed(backbone, "", "model.")
    old, new = layers("model.layers"), layers("model.language_model.layers")
    vision = layers("model.visual.blocks", n=5)
    assert bridged(old, {**new, **vision}) == [sorted(new), sorted({**new, **vision})]


def test_what_neither_class_tells_is_refused():
    old = {**layers("model.layers"), **layers("visual.merger", n=5)}
    new = {**layers("model.language_model.layers"), **layers("model.visual.blocks", n=5)}
    with pytest.raises(AdapterError, match=r"nothing to tell what '.*visual.*' is there"):
        bridged(old, new)


AMBIGUOUS: dict[str, list[Shapes]] = {
    "text or vision": [layers("model.layers"), layers("model.vision.layers")],
    "either of two": [
        {**layers("model.layers"), **layers("model.vision.layers")},
        layers("layers"),
    ],
    "two spellings in one": [
        {**layers("model.layers"), **layers("layers")},
        layers("transformer.layers"),
    ],
    "decoder or whole": [layers("layers"), layers("decoder.layers")],
    "another word": [layers("bert.layers"), layers("roberta.layers")],
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_may_be_two_parts_is_refused_with_both_spellings(case, turned):
    pair = AMBIGUOUS[case][::-1] if turned else AMBIGUOUS[case]
    with pytest.raises(AdapterError) as caught:
        bridged(*pair)
    message = str(caught.value)
    assert "another part of the model with the same layers; load both with one class" in message
    stems = {name.split(".0.")[0] for shapes in pair for name in shapes if ".0." in name}
    assert sum(f"{stem!r}" in message for stem in stems) >= 2


PARTS: dict[str, list[Shapes]] = {
    "T5": [layers("encoder.block", n=8), layers("decoder.block", n=8)],
    "one has both towers": [
        {**layers("model.layers"), **layers("model.vision.layers")},
        layers("model.layers"),
        layers("model.vision.layers"),
    ],
    "towers of other widths": [layers("model.layers"), layers("model.vision.layers", n=5)],
    "text and image encoders": [
        layers("text_model.encoder.layers"),
        layers("vision_model.encoder.layers"),
    ],
    "two text encoders": [layers("text_encoder.layers"), layers("text_encoder_2.layers")],
    "encoder and U-Net": [
        layers("text_model.encoder.layers"),
        layers("down_blocks", ["attentions.0.transformer_blocks.0.attn1.to_q"]),
    ],
    "kinds of blocks": [layers("transformer_blocks"), layers("single_transformer_blocks")],
    "experts": [
        layers("model.layers", [f"mlp.experts.{i}.up_proj" for i in range(3)]),
        layers("model.layers", ["self_attn.q_proj"]),
    ],
    "plain names": [{"a": (4, 3), "b.c": (5, 3)}, {"model.a": (4, 3), "x.b.c": (5, 3)}],
    "plain lists": [{"up.0": (4, 3), "up.1": (4, 3)}, {"down.0": (4, 3)}],
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_one_model_stay_side_by_side(case):
    shapes = PARTS[case]
    assert bridged(*shapes, base=None) == [sorted(names) for names in shapes]


def test_parts_side_by_side_are_said():
    shapes = PARTS["encoder and U-Net"]
    merged = dm.merge([adapter(k, x, None) for k, x in enumerate(shapes)], "linear")
    assert set(merged.names) == {name for names in shapes for name in names}
    assert merged.report.notes[:2] == (
        "adapter 1 (a0): has no module of another adapter, is kept beside them",
        "adapter 2 (a1): has no module of another adapter, is kept beside them",
    )


GPT = layers("transformer.h", ["attn.c_attn", "mlp.c_fc"])
OTHERS: dict[str, list[Shapes]] = {
    "Llama and GPT-2": [layers("model.layers"), GPT],
    "GPT-2 and its like": [GPT, layers("transformer.h", ["self_attention.query_key_value"])],
    "Llama and BERT": [
        layers("model.layers"),
        layers("bert.encoder.layer", ["attention.self.query"]),
    ],
    "Llama and NeoX": [layers("model.layers"), layers("gpt_neox.layers", ["attention.dense"])],
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_layers_of_different_models_are_refused_unless_a_base_is_named(case, turned):
    pair = OTHERS[case][::-1] if turned else OTHERS[case]
    with pytest.raises(AdapterError) as caught:
        bridged(*pair, base=None)
    stems = [next(iter(shapes)).split(".0.")[0] for shapes in pair]
    assert all(stem in str(caught.value) for stem in stems)
    if case != "Llama and NeoX":
        assert "say base_model=... if they are parts of one" in str(caught.value)
    made = [adapter(k, shapes, None) for k, shapes in enumerate(pair)]
    merged = dm.merge(made, "linear", base_model="mine")
    assert set(merged.names) == {name for shapes in pair for name in shapes}


def test_one_spelling_of_another_shape_is_another_model():
    with pytest.raises(AdapterError, match=r"'layers' has other shapes than 'model\.layers' of"):
        bridged(layers("model.layers"), layers("layers", n=9))
    made = [adapter(0, layers("model.layers")), adapter(1, layers("layers", n=9))]
    assert len(dm.merge(made, "linear", base_model="mine").names) == 8


def test_inspect_says_what_was_bridged_and_what_shares_nothing():
    one, other = (adapter(k, layers(stem)) for k, stem in enumerate(("layers", "model.layers")))
    alone = adapter(2, {"vision.q": (3, 8)})
    assert dm.inspect([one, one]).notes == ()
    notes = dm.inspect([one, other, alone]).notes
    assert any(
        "'layers' is 'model.layers'" in n or "'model.layers' is 'layers'" in n for n in notes
    )
    assert any(n.startswith("adapter 3 (a2): has no module of another") for n in notes)


def test_bridged_adapters_merge_to_the_sum_and_it_is_said(tmp_path):
    first, second = layers("model.layers"), layers("layers")
    saved = {"target_modules": ["q_proj", "up"], "modules_to_save": ["norm"]}
    norm = torch.ones(8)
    factors = random_factors(first, 2, seed=1), random_factors(second, 3, seed=2)
    write_adapter(tmp_path / "a", factors[0], carried={"model.norm.weight": norm}, **saved)
    write_adapter(tmp_path / "b", factors[1], carried={"norm.weight": norm}, **saved)
    out = tmp_path / "out"
    merged = dm.merge([tmp_path / "a", tmp_path / "b"], "linear", output=out)
    assert merged.names == tuple(sorted(first))
    for name in first:
        expected = sum(
            f[b][1] @ f[b][0] for f, b in zip(factors, (name, name.removeprefix("model.")))
        )
        torch.testing.assert_close(merged.delta(name), expected, rtol=1e-5, atol=1e-5)
    told = "adapter 2 (b): 'layers' is 'model.layers', 'norm.weight' is 'model.norm.weight', as in"
    assert merged.report.notes[0] == f"{told} adapter 1 (a)"
    assert told.partition(",")[0] in (out / "README.md").read_text()
    written = dm.load(out)
    assert list(written.carried) == ["base_model.model.model.norm.weight"]
    assert written.config.target_modules == ["q_proj", "up"]


def test_a_sequential_merge_takes_either_spelling(tmp_path):
    first, second = layers("model.layers"), layers("layers")
    state = dm.Sequential.start(tmp_path / "s")
    state.add(adapter(1, first))
    state.add(adapter(2, second))
    assert state.merged().names == tuple(sorted(first))


LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
REAL = {
    "llama": (
        (LlamaModel, LlamaForCausalLM),
        LlamaConfig(**LLAMA, num_attention_heads=2, num_key_value_heads=1),
        ["q_proj", "down_proj"],
    ),
    "gpt2": (
        (GPT2Model, GPT2LMHeadModel),
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32),
        ["c_attn"],
    ),
    "bert": (
        (BertModel, BertForSequenceClassification),
        BertConfig(**LLAMA, num_attention_heads=2),
        ["query", "dense"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", REAL)
def test_real_backbones_are_bridged_to_their_head_classes(case, turned):
    import peft

    classes, config, targets = REAL[case]
    made = []
    for k, make in enumerate(classes[::-1] if turned else classes):
        options = {"r": 2, "init_lora_weights": False, "fan_in_fan_out": case == "gpt2"}
        lora = peft.LoraConfig(target_modules=targets, **options)
        found = dm.from_model(peft.get_peft_model(make(config), lora), name=f"a{k}")
        stated = dataclasses.replace(found.config, base_model_name_or_path="base")
        made.append(dataclasses.replace(found, config=stated))
    one, other = one_spelling(made)[0]
    assert one.modules.keys() == made[0].modules.keys() == other.modules.keys()


def vision_language() -> torch.nn.Module:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62}
    config = Qwen2_5_VLConfig(
        text_config={**text, **heads, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**vision, "out_hidden_size": 32, "patch_size": 4},
        tie_word_embeddings=False,
        vision_end_token_id=63,
        **tokens,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.mark.filterwarnings("ignore")
def test_old_and_new_names_merge_into_the_files_of_a_vision_language_model(tmp_path):
    """The files have the Hub's names, the live model those of the newest class."""
    import peft

    vision_language().save_pretrained(tmp_path / "base")
    for k, targets in enumerate((["q_proj", "qkv", "lm_head"], ["q_proj", "o_proj", "qkv"])):
        torch.manual_seed(k + 1)
        lora = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(vision_language(), lora)
        adapted.peft_config["default"].base_model_name_or_path = "base"
        adapted.save_pretrained(tmp_path / f"new{k}", save_embedding_layers=False)
    (tmp_path / "old1").mkdir()
    config = (tmp_path / "new1/adapter_config.json").read_text()
    (tmp_path / "old1/adapter_config.json").write_text(config)
    stored = load_file(tmp_path / "new1/adapter_model.safetensors")
    older = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for key, tensor in stored.items()
    }
    save_file(older, tmp_path / "old1/adapter_model.safetensors")
    dm.merge(
        [tmp_path / "new0", tmp_path / "old1"],
        "linear",
        form="model",
        base=tmp_path / "base",
        output=tmp_path / "out",
    )
    model = peft.PeftModel.from_pretrained(vision_language(), tmp_path / "new0", "a")
    model.load_adapter(tmp_path / "new1", "b")
    model.base_model.set_adapter(["a", "b"])
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    expected = model.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


class Towers(torch.nn.Module):
    """A text and an image tower whose layers look the same."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = self._tower()
        self.model.vision = torch.nn.Module()
        self.model.vision.layers = self._tower()

    @staticmethod
    def _tower() -> torch.nn.ModuleList:
        return torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})])


@pytest.mark.filterwarnings("ignore")
def test_the_names_of_one_live_model_are_what_they_are():
    import peft

    from domerge_fast.integrations import peft as live

    torch.manual_seed(0)
    targets = {"a": "model.layers.0.q_proj", "b": "model.vision.layers.0.q_proj"}
    configs = {
        name: peft.LoraConfig(r=2, target_modules=re.escape(path), init_lora_weights=False)
        for name, path in targets.items()
    }
    model = peft.get_peft_model(Towers(), configs["a"], "a")
    model.add_adapter("b", configs["b"])
    made = [dm.from_model(model, name) for name in targets]
    merged = dm.merge(made, "linear")
    assert set(merged.names) == set(targets.values())
    live.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "both", "linear")
    assert set(dm.from_model(model, "both").modules) == set(targets.values())
    with pytest.raises(AdapterError, match="another part of the model"):
        one_spelling([made[0], dataclasses.replace(made[1], model=None)])


@pytest.mark.parametrize(("weights", "expected"), [([0, 1], "model.layers"), ([1, 0], "layers")])
@pytest.mark.parametrize("turned", [False, True])
def test_no_name_comes_from_an_adapter_of_weight_zero(weights, expected, turned):
    backbone, causal = adapter(0, layers("layers")), adapter(1, layers("model.layers"))
    order = slice(None, None, -1 if turned else 1)
    found = dm.merge([backbone, causal][order], "linear", weights=weights[order])
    assert list(found.names) == sorted(layers(expected))
    counted = causal if weights[1] else backbone
    for name in found.names:
        a, b = counted.factors(name)
        torch.testing.assert_close(found.delta(name), b @ a)


def test_an_adapter_of_weight_zero_lends_no_names_either():
    one, left_out = layers("model.layers"), {**layers("layers"), "conv": (3, 4)}
    found = dm.merge(
        [adapter(0, left_out), adapter(1, one), adapter(2, layers("layers"))],
        "linear",
        weights=[0.0, 1.0, -1.0],
    )
    assert list(found.names) == sorted(one)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(
    ("alone", "expected"),
    [
        ("model.embed_tokens", "model.layers"),
        ("lm_head", "model.layers"),
        ("embed_tokens", "layers"),
    ],
)
def test_a_name_without_a_match_tells_which_class_all_are_named_as(alone, expected, order):
    given = [layers("layers"), layers("model.layers"), {alone: (4, 8)}]
    names = {name for one in bridged(*(given[k] for k in order)) for name in one}
    assert names == {*layers(expected), alone}


def test_a_head_inside_a_larger_model_tells_its_class():
    inner = layers("language_model.model.layers")
    given = layers("layers"), inner, {"language_model.lm_head": (4, 8)}
    assert bridged(*given)[0] == sorted(inner)


def siglip(part: str) -> torch.nn.Module:
    """The model or a part of it, with towers of one size."""
    size = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = SiglipConfig(
        text_config={**size, "vocab_size": 20, "projection_size": 8},
        vision_config={**size, "image_size": 8, "patch_size": 4},
    )
    if part == "text":
        return SiglipTextModel(config.text_config)
    return SiglipVisionModel(config.vision_config) if part == "vision" else SiglipModel(config)


def trained_part(folder: Path, part: str, *targets: str) -> dm.Adapter:
    """An adapter of it as PEFT saves it, with the class in its config."""
    config = LoraConfig(r=2, target_modules=list(targets or ["fc1"]), init_lora_weights=False)
    get_peft_model(siglip(part), config).save_pretrained(folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = "siglip"
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return dm.load(folder)


@pytest.mark.parametrize("turned", [False, True])
def test_parts_of_a_model_with_the_same_names_are_not_one(turned, tmp_path):
    text = trained_part(tmp_path / "text", "text")
    vision = trained_part(tmp_path / "vision", "vision")
    other = trained_part(tmp_path / "other", "vision", "q_proj")
    names = [name for name, _ in siglip("all").named_modules()]
    in_text = [n for n in names if n.startswith("text_model") and n.endswith("fc1")]
    whole = trained_part(tmp_path / "all", "all", *in_text)
    for one in (text, whole):
        for pair in ((one, vision), (one, other)):
            with pytest.raises(AdapterError, match=r"of the model's \w+ part, that of adapter '"):
                dm.merge(pair[:: -1 if turned else 1], "linear")
    merged = dm.merge([whole, text][:: -1 if turned else 1], "linear")
    assert len(merged.names) == 1
    both = dm.merge([vision, other], "linear")
    assert set(both.names) == {*vision.modules, *other.modules}
