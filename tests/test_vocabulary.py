"""Merges onto bases whose embeddings are tied or get other rows, beside what PEFT computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.make import random_factors, write_adapter
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import domerge_fast as dm
from domerge_fast import OptionError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(12)[None]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_hidden_layers": 1}
WEIGHTS = "model.safetensors"


def base(folder: Path, tied: bool = True, kind: str = "llama", **options: Any) -> Path:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    if kind == "llama":
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, tie_word_embeddings=tied))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40))
    model.save_pretrained(folder, **options)
    return folder


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def trained(
    folder: Path, model: nn.Module, seed: int, saving: dict[str, Any] | None = None, **config: Any
) -> Path:
    """An adapter of the model with random factors and, for modules saved whole, changed weights."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings | config))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
        if "modules_to_save" in name:
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, **saving or {})
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def together(model: nn.Module, adapters: Sequence[Path]) -> Tensor:
    """What PEFT computes with all adapters active."""
    for number, path in enumerate(adapters):
        if number == 0:
            model = peft.PeftModel.from_pretrained(model, path, adapter_name="0")
        else:
            model.load_adapter(path, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return logits(model.eval())


def merge(tmp_path: Path, adapters: Sequence[Path], **options: Any) -> dm.Merged:
    given = {"form": "model", "base": tmp_path / "base", "output": tmp_path / "out"}
    return dm.merge(adapters, "linear", **given | options)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


SHARDED = {"max_shard_size": "9KB"}
TIED: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "LoRA on the embedding": ([{"target_modules": ["q_proj", "embed_tokens"]}] * 2, True),
    "LoRA on the head": ([{"target_modules": ["q_proj", "lm_head"]}] * 2, True),
    "LoRA on both": ([{"target_modules": ["embed_tokens", "lm_head"]}, {}], True),
    "an embedding saved whole": ([{"modules_to_save": ["embed_tokens"]}, {}], True),
    "a head saved whole": ([{"modules_to_save": ["lm_head"]}, {}], True),
    "nothing of them": ([{}, {}], False),
}


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize("case", TIED)
def test_tied_weights_part_where_one_side_changes(case, options, tmp_path):
    settings, parted = TIED[case]
    base(tmp_path / "base", **options)
    adapters = [
        trained(tmp_path / str(k), load(tmp_path / "base"), k, **some)
        for k, some in enumerate(settings)
    ]
    merged = merge(tmp_path, adapters)
    after = load(tmp_path / "out")
    expected = together(load(tmp_path / "base"), adapters)
    torch.testing.assert_close(logits(after), expected, rtol=1e-4, atol=1e-4)
    assert config(tmp_path / "out")["tie_word_embeddings"] is not parted
    own = "'model.embed_tokens.weight' and 'lm_head.weight' are two weights now"
    assert any(note.startswith(own) for note in merged.report.notes) == parted
    assert (own in (tmp_path / "out/README.md").read_text()) == parted
    for path in (tmp_path / "out").glob("*.safetensors"):
        load_file(path)
    index = tmp_path / "out/model.safetensors.index.json"
    if options:
        stored = {k: p.name for p in (tmp_path / "out").glob("model-*") for k in load_file(p)}
        assert json.loads(index.read_text())["weight_map"] == stored
        assert ("lm_head.weight" in stored) == parted


def test_two_weights_of_gpt2(tmp_path):
    """Its config does not say that they are tied."""
    base(tmp_path / "base", kind="gpt2")
    some = {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    adapter = trained(tmp_path / "a", load(tmp_path / "base"), 1, **some)
    merge(tmp_path, [adapter])
    expected = together(load(tmp_path / "base"), [adapter])
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_a_pair_that_is_saved_whole_alike_stays_one(tmp_path):
    base(tmp_path / "base")
    new = torch.randn(40, 32)
    adapter = write_adapter(
        tmp_path / "a",
        random_factors({"model.layers.0.self_attn.q_proj": (32, 32)}, 2),
        carried={"model.embed_tokens.weight": new, "lm_head.weight": new.clone()},
        modules_to_save=["embed_tokens", "lm_head"],
    )
    merge(tmp_path, [adapter])
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], new)
    assert config(tmp_path / "out")["tie_word_embeddings"] is True


def test_a_classifier_has_no_head_to_part_from(tmp_path):
    torch.manual_seed(0)
    own = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    own.tie_word_embeddings = True
    LlamaForSequenceClassification(own).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    some = {"target_modules": ["q_proj", "embed_tokens"], "task_type": "SEQ_CLS"}
    adapter = trained(tmp_path / "a", model, 1, **some)
    merge(tmp_path, [adapter])
    load_ = AutoModelForSequenceClassification.from_pretrained
    expected = together(load_(tmp_path / "base"), [adapter])
    found = logits(load_(tmp_path / "out").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)


Q = "layers.0.self_attn.q_proj"


def nested(tmp_path: Path, embedding: str, modules: str, **text: Any) -> None:
    """A base of a language model inside another, by its files alone, and an adapter of its
    embedding."""
    (tmp_path / "base").mkdir()
    fields = {"architectures": ["XForConditionalGeneration"], "text_config": text}
    (tmp_path / "base/config.json").write_text(json.dumps(fields))
    stem = embedding.removesuffix("embed_tokens.weight")
    tensors = {embedding: torch.randn(40, 4), f"{stem}{Q}.weight": torch.randn(4, 4)}
    save_file(tensors, tmp_path / "base" / WEIGHTS)
    name = f"{modules}embed_tokens"
    factors = random_factors({name: (4, 40), f"{modules}{Q}": (4, 4)}, 2)
    write_adapter(tmp_path / "a", factors, embeddings=[name])


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("text", [{"vocab_size": 40}, {"tie_word_embeddings": True}])
def test_a_nested_config_says_so_inside_and_outside(embedding, head, text, tmp_path):
    nested(tmp_path, embedding, embedding.removesuffix("embed_tokens.weight"), **text)
    merge(tmp_path, [tmp_path / "a"])
    found = config(tmp_path / "out")
    assert found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"] is False
    old, new = load_file(tmp_path / "base" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert new.keys() == old.keys() | {head}
    assert torch.equal(new[head], old[embedding])
    assert not torch.equal(new[embedding], old[embedding])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: {f"inner.{key}": tensor for key, tensor in tensors.items()},
        lambda tensors: tensors | {"lm_head.weight": torch.ones(40, 4)},
    ],
    ids=["unknown place of the head", "two that differ"],
)
def test_a_pair_that_cannot_be_told_is_refused(spoil: Callable[[dict], dict], tmp_path):
    nested(tmp_path, "model.embed_tokens.weight", "model.", tie_word_embeddings=True)
    save_file(spoil(load_file(tmp_path / "base" / WEIGHTS)), tmp_path / "base" / WEIGHTS)
    line = r"may tie 'model.embed_tokens.weight', which the adapters change, .*; save the base with"
    with pytest.raises(OptionError, match=line):
        merge(tmp_path, [tmp_path / "a"])
    assert not (tmp_path / "out").exists()


def resized(folder: Path, rows: int) -> nn.Module:
    torch.manual_seed(9)
    model = load(folder)
    model.resize_token_embeddings(rows)
    return model


ROWS: dict[str, list[dict[str, Any]]] = {
    "saved along": [{}, {}],
    "saved by one": [{}, None],  # type: ignore[list-item]
    "LoRA on the embedding": [{"target_modules": ["q_proj", "embed_tokens"]}] * 2,
    "saved whole": [{"modules_to_save": ["embed_tokens", "lm_head"]}, None],  # type: ignore[list-item]
}


@pytest.mark.parametrize("rows", [44, 36])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", ROWS)
def test_the_output_has_the_rows_the_adapters_were_trained_with(case, tied, rows, tmp_path):
    base(tmp_path / "base", tied, **SHARDED)
    adapters = []
    for k, some in enumerate(ROWS[case]):
        model = resized(tmp_path / "base", rows) if some is not None else load(tmp_path / "base")
        saving = {} if some is None else {"save_embedding_layers": True}
        if "LoRA" in case and not tied:
            some = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
        adapters.append(trained(tmp_path / str(k), model, k, saving, **some or {}))
        if some is not None:
            (tmp_path / str(k) / "tokenizer.json").write_text(f'{{"rows": {rows}}}')
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/vocab.json").write_text("{}")
    merged = merge(tmp_path, adapters)
    after = load(tmp_path / "out")
    assert after.config.vocab_size == rows
    assert after.get_input_embeddings().weight.shape == (rows, 32)
    expected = together(resized(tmp_path / "base", rows), adapters)
    torch.testing.assert_close(logits(after), expected, rtol=1e-4, atol=1e-4)
    assert f"the vocabulary has {rows} rows now, and had 40 in the base" in merged.report.notes
    assert (tmp_path / "out/tokenizer.json").read_text() == f'{{"rows": {rows}}}'
    assert not (tmp_path / "out/vocab.json").exists()
    merge(tmp_path, adapters, overwrite=True)


def test_both_sides_have_to_be_resized(tmp_path):
    base(tmp_path / "base", tied=False)
    adapter = write_adapter(
        tmp_path / "a",
        random_factors({"model.layers.0.self_attn.q_proj": (32, 32)}, 2),
        carried={"model.embed_tokens.weight": torch.ones(44, 32)},
        modules_to_save=["embed_tokens"],
    )
    line = r"would have 44 rows in 'model.embed_tokens.weight', but 40 in 'lm_head.weight'; save"
    with pytest.raises(OptionError, match=line):
        merge(tmp_path, [adapter])


def test_new_rows_have_to_be_at_hand(tmp_path):
    base(tmp_path / "base", tied=False)
    adapter = write_adapter(
        tmp_path / "a",
        random_factors({"model.embed_tokens": (32, 44)}, 2),
        embeddings=["model.embed_tokens"],
    )
    line = r"as \[40, 32\], module 'model.embed_tokens' needs \[44, 32\]; save the adapters"
    with pytest.raises(OptionError, match=line):
        merge(tmp_path, [adapter])


def test_a_language_model_inside_another(tmp_path):
    """Both changes at once, in the nested config of a model of transformers."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    own = Qwen2VLConfig(
        text_config={**SIZES, **sizes, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        tie_word_embeddings=True,
    )
    Qwen2VLForConditionalGeneration(own).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / WEIGHTS)
    renamed = {key.replace("model.", "model.language_model.", 1): x for key, x in stored.items()}
    save_file(renamed, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    load_ = Qwen2VLForConditionalGeneration.from_pretrained

    def grown_() -> nn.Module:
        torch.manual_seed(9)
        model = load_(tmp_path / "base").eval()
        model.resize_token_embeddings(44)
        return model

    some = {"target_modules": ["q_proj", "embed_tokens"]}
    adapter = trained(tmp_path / "a", grown_(), 1, {"save_embedding_layers": True}, **some)
    merge(tmp_path, [adapter])
    expected = together(grown_(), [adapter])
    found = logits(load_(tmp_path / "out").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    text = config(tmp_path / "out")["text_config"]
    assert (text["vocab_size"], text["tie_word_embeddings"]) == (44, False)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
