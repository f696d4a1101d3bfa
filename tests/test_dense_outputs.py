"""Merges written as dense updates and into base models, with models of transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.files import PAGE, small_disk, unchanged
from support.make import random_factors, write_adapter
from support.merges import at_one, of_base
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import domerge_fast as dm
from domerge_fast import DomergeError, Merged, OptionError, OutputError
from domerge_fast.formats import deltas
from domerge_fast.formats.deltas import DeltaFolder
from domerge_fast.formats.model import write as model_output
from domerge_fast.formats.model.write import ModelFolder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TOKENS = torch.arange(32).reshape(2, 16)
CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def llama(**settings: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_hidden_layers": 2}
    return LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **settings
    )


def gpt2(**settings: Any) -> GPT2Config:
    return GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=32, n_positions=16, **settings)


CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
# The class that is saved as the base, the class that is trained, their config, what is trained.
CASES: dict[str, tuple[type, type, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaForCausalLM, llama(), {"target_modules": "all-linear"}),
    "llama with its embeddings": (
        LlamaForCausalLM,
        LlamaForCausalLM,
        llama(),
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    ),
    "llama with a head saved whole": (
        LlamaForSequenceClassification,
        LlamaForSequenceClassification,
        llama(),
        {"target_modules": ["v_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"},
    ),
    "llama, trained without its head": (
        LlamaForCausalLM,
        LlamaModel,
        llama(),
        {"target_modules": ["o_proj", "down_proj"]},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2LMHeadModel, gpt2(), CONV1D),
    "gpt2, saved without its head": (GPT2Model, GPT2LMHeadModel, gpt2(), CONV1D),
    "gpt2, Conv1D and Linear": (
        GPT2LMHeadModel,
        GPT2LMHeadModel,
        gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn", "c_fc", "lm_head"]},
    ),
}


def save_base(case: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    saved, _, config, _ = CASES[case]
    saved(config).save_pretrained(folder, **options)
    return folder


def trained(case: str, base: Path, adapters: Iterable[str] = ("one", "two")) -> peft.PeftModel:
    """Adapters of ranks 3 and 2 on the base as its own class loads it, B random."""
    model = CASES[case][1].from_pretrained(base)
    model.config.name_or_path = ""
    for seed, name in enumerate(adapters):
        torch.manual_seed(seed + 1)
        settings = {"lora_alpha": 2, "init_lora_weights": False} | CASES[case][3]
        config = peft.LoraConfig(r=3 - seed, **settings)
        if seed == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            torch.manual_seed(7)
            parameter.data.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def gpt2_made(tmp_path_factory) -> SimpleNamespace:
    return prepared("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def gpt2_case(gpt2_made, tmp_path) -> SimpleNamespace:
    """A base folder, a merge of two adapters of it, and an output that does not exist."""
    base = shutil.copytree(gpt2_made.base, tmp_path / "base")
    return SimpleNamespace(base=base, merged=gpt2_made.merged, out=tmp_path / "out")


def prepared(case: str, tmp_path: Path, **options: Any) -> SimpleNamespace:
    base = save_base(case, tmp_path / "base", **options)
    model = trained(case, base)
    model.save_pretrained(tmp_path / "adapters")
    merged = at_one([tmp_path / "adapters/one", tmp_path / "adapters/two"], method="linear")
    return SimpleNamespace(base=base, model=model, merged=merged, out=tmp_path / "out")


def write_model(case: SimpleNamespace, reverse: bool = False, **replacing: bool) -> None:
    names = reversed(case.merged.names) if reverse else case.merged.names
    replacing = {"overwrite": False} | replacing
    with ModelFolder(case.out, of_base(case.merged.target, case.base), **replacing) as folder:
        for name in names:
            folder.add(name, case.merged.delta(name))
        folder.finish(case.merged.report)


def write_deltas(merged: Merged, out: Path, overwrite: bool = False, **changed: Tensor) -> None:
    with DeltaFolder(out, merged.target, overwrite) as folder:
        for name in merged.names:
            folder.add(name, changed.get(name, merged.delta(name)))
        folder.finish(merged.report)


def output(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that is in a folder's safetensors files."""
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    return json.loads(data[8 : 8 + length])


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "9KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_what_peft_merges(name, shards, tmp_path):
    case = prepared(name, tmp_path, **shards)
    with unchanged(case.base):
        write_model(case)
    loaded, info = type(case.model.get_base_model()).from_pretrained(
        case.out, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    before = output(case.model.get_base_model().__class__.from_pretrained(case.base))
    expected = output(case.model.merge_and_unload(adapter_names=["one", "two"]))
    assert_close(output(loaded), expected, 1e-5)
    assert (expected - before).abs().max() > 1e-2
    names = {path.name for path in case.base.iterdir()}
    assert {path.name for path in case.out.iterdir()} == names | {CARD}
    for path in case.base.glob("*.safetensors"):
        found, expected = header(case.out / path.name), header(path)
        expected["__metadata__"]["domerge_fast"] = dm.__version__
        assert list(found.items()) == list(expected.items())
    assert (len(list(case.base.glob("model-*"))) > 2) == bool(shards)
    old, new = tensors(case.base), tensors(case.out)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert len(changed) == len(case.merged.names) + len(
        case.merged.target.carried.keys() & {"base_model.model.score.weight"}
    )


@pytest.mark.parametrize("metadata", [None, {}, {"format": "np", "näme": 'of "theirs"'}], ids=str)
def test_metadata_of_the_base_is_kept_beside_our_mark(metadata, gpt2_case):
    path = gpt2_case.base / WEIGHTS
    stored = load_file(path)
    save_file(stored, path, metadata)
    write_model(gpt2_case)
    with safe_open(gpt2_case.out / WEIGHTS, "pt") as opened:
        expected = {"format": "pt"} | (metadata or {}) | {"domerge_fast": dm.__version__}
        assert opened.metadata() == expected
    found = load_file(gpt2_case.out / WEIGHTS)
    changed = {f"{name}.weight" for name in gpt2_case.merged.names}
    assert found.keys() == stored.keys()
    assert {key for key in stored if not torch.equal(found[key], stored[key])} == changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_rounded_once_to_the_dtype_of_the_base(dtype, gpt2_case, monkeypatch):
    case = gpt2_case
    monkeypatch.setattr(model_output, "CHUNK_BYTES", 1000)  # several chunks, the last one smaller
    edit_weights(
        case.base, lambda stored: stored.update({k: v.to(dtype) for k, v in stored.items()})
    )
    write_model(case)
    old, new = tensors(case.base), tensors(case.out)
    for name in case.merged.names:
        before = old.pop(f"{name}.weight")
        after = new.pop(f"{name}.weight")
        assert before.dtype == after.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        change = case.merged.delta(name).T.to(wide)
        assert torch.equal(after, (before.to(wide) + change).to(dtype))
        exact = before.double() + change.double()
        assert (after - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
        assert not torch.equal(after, before)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_modules_may_come_in_any_order(gpt2_case, tmp_path):
    write_model(gpt2_case)
    gpt2_case.out = tmp_path / "reversed"
    write_model(gpt2_case, reverse=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (gpt2_case.out / WEIGHTS).read_bytes()


def test_a_module_that_was_not_added_is_an_error(gpt2_case):
    merged = gpt2_case.merged
    some = {n: m for n, m in merged.report.modules.items() if n != "transformer.h.0.attn.c_proj"}
    report = dataclasses.replace(merged.report, modules=some)
    gpt2_case.merged = dataclasses.replace(merged, report=report)
    with (
        unchanged(gpt2_case.base.parent),
        pytest.raises(AssertionError, match=r"attn.c_proj.weight was never"),
    ):
        write_model(gpt2_case)


def test_the_rest_of_the_folder_is_copied_but_no_other_weights(gpt2_case):
    kept = ["tokenizer.json", "vocab[1].txt", "modeling_own.py", "LICENSE", "chat_template.jinja"]
    left = [
        *("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "flax_model.msgpack"),
        *("adapter_config.json", "adapter_model.safetensors", ".gitattributes", CARD, INDEX),
    ]
    for name in kept + left:
        (gpt2_case.base / name).write_text(name)
    (gpt2_case.base / "original").mkdir()
    write_model(gpt2_case)
    usual = ["config.json", "generation_config.json", WEIGHTS, CARD]
    assert sorted(os.listdir(gpt2_case.out)) == sorted(kept + usual)
    for name in [*kept, "config.json"]:
        assert (gpt2_case.out / name).read_bytes() == (gpt2_case.base / name).read_bytes()
    card = (gpt2_case.out / CARD).read_text()
    assert "library_name: transformers" in card
    assert '"method": "linear"' in card
    write_model(gpt2_case, overwrite=True)
    assert sorted(os.listdir(gpt2_case.out)) == sorted(kept + usual)


def test_only_a_model_we_wrote_is_replaced(gpt2_case, tmp_path):
    write_model(gpt2_case)
    with unchanged(tmp_path), pytest.raises(OutputError, match=r"exists already; .*--overwrite"):
        write_model(gpt2_case)
    (gpt2_case.out / CARD).write_text("somebody else's")
    write_model(gpt2_case, overwrite=True)
    card = (gpt2_case.out / CARD).read_text()
    edit_weights(gpt2_case.out, lambda stored: None)
    (gpt2_case.out / CARD).write_text(card)
    with unchanged(tmp_path), pytest.raises(OutputError, match=r"domerge_fast did not write; give"):
        write_model(gpt2_case, overwrite=True)
    write_model(gpt2_case, force=True)
    write_model(gpt2_case, overwrite=True)


def test_the_base_and_the_adapters_are_never_written_to(gpt2_case, tmp_path):
    base = gpt2_case.base
    (tmp_path / "link").symlink_to(base)
    with unchanged(tmp_path):
        for out in (base, base / "out", base / "new/out", tmp_path / "link", tmp_path / "link/out"):
            gpt2_case.out = out
            with pytest.raises(OutputError, match=r"is in the base model's folder; give another"):
                write_model(gpt2_case, overwrite=True)
        (gpt2_case.out, *_) = gpt2_case.merged.target.inputs
        with pytest.raises(OutputError, match=r"is one of the adapters to merge"):
            write_model(gpt2_case, overwrite=True)
        with pytest.raises(OutputError, match=r"is one of the adapters to merge"):
            write_deltas(gpt2_case.merged, gpt2_case.out, overwrite=True)


def edit_config(base: Path, **fields: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(base: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    stored = load_file(base / WEIGHTS)
    edit(stored)
    save_file({k: v.contiguous() for k, v in stored.items()}, base / WEIGHTS, {"format": "pt"})


C_FC = "transformer.h.1.mlp.c_fc.weight"


def shorten(stored: dict[str, Tensor]) -> None:
    stored[C_FC] = stored[C_FC][:, :90]


def quantize(stored: dict[str, Tensor]) -> None:
    stored[C_FC] = stored[C_FC].to(torch.float8_e4m3fn)


def pack(stored: dict[str, Tensor]) -> None:
    stored[C_FC.replace("weight", "qweight")] = stored.pop(C_FC).to(torch.int32)


def double(stored: dict[str, Tensor]) -> None:
    for key in list(stored):
        outer, _, rest = key.partition(".")
        tensor = stored.pop(key)
        stored |= {f"encoder.{outer}.{rest}": tensor, f"decoder.{outer}.{rest}": tensor.clone()}


def unlink_weights(base: Path) -> None:
    (base / WEIGHTS).rename(base / "pytorch_model.bin")


def truncate(base: Path) -> None:
    data = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(data[:-4])


MODULE = "module 'transformer.h.1.mlp.c_fc'"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing weight": (
        lambda base: edit_weights(base, lambda stored: stored.pop(C_FC)),
        # The bias is still there.
        f"stores {MODULE} as 'transformer.h.1.mlp.c_fc.bias'",
    ),
    "another base": (
        lambda base: edit_weights(
            base, lambda stored: [stored.pop(k) for k in list(stored) if ".1.mlp.c_fc." in k]
        ),
        f"has no '{C_FC}' for {MODULE} (the nearest is '{C_FC.replace('.1.', '.0.')}'); give the",
    ),
    "another shape": (
        lambda base: edit_weights(base, shorten),
        f"stores '{C_FC}' as [24, 90], {MODULE} needs [24, 96]; give the base model",
    ),
    "float8": (
        lambda base: edit_weights(base, quantize),
        f"of {MODULE} as float8_e4m3fn: it is quantized; give the base in float32",
    ),
    "packed weights": (
        lambda base: edit_weights(base, pack),
        f"stores {MODULE} as 'transformer.h.1.mlp.c_fc.bias', not as '{C_FC}'",
    ),
    "names that fit twice": (
        lambda base: edit_weights(base, double),
        "modules under more than one name ('decoder.transformer.h.' and 'encoder.transformer.h.')",
    ),
    "a pickle": (unlink_weights, f"has no {WEIGHTS}; save it as safetensors"),
    "half a file": (truncate, "is truncated: its header promises"),
    "no config": (lambda base: (base / "config.json").unlink(), "has no config.json; give"),
    "a broken config": (
        lambda base: (base / "config.json").write_text("{"),
        "config.json is not valid JSON",
    ),
    "no folder": (shutil.rmtree, "is no folder; give a model folder, or an id on the Hugging Face"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_base_that_does_not_fit_is_refused(what, gpt2_case, tmp_path):
    spoil, fragment = REFUSED[what]
    spoil(gpt2_case.base)
    with unchanged(tmp_path), pytest.raises(OptionError) as caught:
        write_model(gpt2_case)
    message = str(caught.value)
    assert message.startswith(f"option 'base': '{gpt2_case.base}' ")
    assert fragment in message
    assert "; " in message
    assert len(message.splitlines()) == 1


def lose_shard(base: Path) -> None:
    max(base.glob("model-*")).unlink()


def place(base: Path, file: str) -> None:
    """Say in the index that C_FC is in this file."""
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][C_FC] = file
    (base / INDEX).write_text(json.dumps(index))


def copy_shard(base: Path) -> None:
    shutil.copyfile(min(base.glob("model-*")), base / "copy.safetensors")
    place(base, "copy.safetensors")


REFUSED_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lose_shard, "has no model-00003-of-00003.safetensors; download or save"),
    "a tensor twice": (copy_shard, "in two files; download or save it again"),
    "a tensor elsewhere": (
        lambda base: place(base, "model-00001-of-00003.safetensors"),
        f"has '{C_FC}' not where {INDEX} says",
    ),
    "a path": (
        lambda base: place(base, "../base/model-00003-of-00003.safetensors"),
        f"in {INDEX}, which is outside",
    ),
    "a name too long": (lambda base: place(base, "x" * 5000), "has no xxxx"),
    "no map": (lambda base: (base / INDEX).write_text("{}"), f"has no weight_map in {INDEX}"),
}


@pytest.mark.parametrize("what", REFUSED_SHARDS)
def test_damaged_shards_are_refused(what, tmp_path):
    case = prepared("gpt2", tmp_path, max_shard_size="30KB")
    assert len(list(case.base.glob("model-*"))) == 3
    spoil, fragment = REFUSED_SHARDS[what]
    spoil(case.base)
    with unchanged(tmp_path), pytest.raises(OptionError) as caught:
        write_model(case)
    assert fragment in str(caught.value)


def carried_case(tmp_path: Path, carried: dict[str, Tensor]) -> SimpleNamespace:
    base = save_base("gpt2", tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "one",
        random_factors({"transformer.h.0.mlp.c_fc": (96, 24)}, 2),
        carried=carried,
        fan_in_fan_out=True,
        modules_to_save=["transformer.wpe", "score"],
    )
    return SimpleNamespace(base=base, merged=at_one([adapter]), out=tmp_path / "out")


def test_tied_embeddings_saved_along_unchanged_are_none_of_our_business(tmp_path):
    own = tensors(save_base("gpt2", tmp_path / "base"))["transformer.wte.weight"]
    saved = {"transformer.wte.weight": own, "lm_head.weight": own.clone()}
    case = carried_case(tmp_path, saved)
    write_model(case)
    assert torch.equal(tensors(case.out)["transformer.wte.weight"], own)
    assert "lm_head.weight" not in tensors(case.out)


def test_a_tensor_saved_whole_takes_the_place_of_the_base_s(tmp_path):
    case = carried_case(tmp_path, {"transformer.wpe.weight": torch.randn(16, 24).double()})
    write_model(case)
    after = tensors(case.out)["transformer.wpe.weight"]
    saved = case.merged.target.carried["base_model.model.transformer.wpe.weight"].read()
    assert after.dtype == torch.float32
    assert torch.equal(after, saved.float())
    assert not torch.equal(after, tensors(case.base)["transformer.wpe.weight"])


def test_an_update_of_a_base_saved_along_is_added_to_that(tmp_path):
    """PEFT saves an adapted embedding's own weight too: it may have been resized or trained."""
    case = prepared("llama with its embeddings", tmp_path)
    own = "model.embed_tokens.weight"
    edit_weights(case.base, lambda stored: stored[own].zero_())
    write_model(case)
    before = case.model.get_base_model().get_input_embeddings().base_layer.weight.data
    expected = before + case.merged.delta("model.embed_tokens").T
    assert_close(tensors(case.out)[own], expected)
    assert before.abs().max() > 0


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ({"score.weight": torch.ones(2, 24)}, r"has no 'score.weight', .*; load the base as the"),
        (
            {"transformer.wpe.weight": torch.ones(17, 24)},
            r"as float32 \[16, 24\], the adapters save it as float32 \[17, 24\]; give the base",
        ),
        ({"transformer.wpe.weight": torch.ones(16, 24, dtype=torch.int32)}, r"it as int32 \[16"),
    ],
)
def test_tensors_saved_whole_that_do_not_fit_are_refused(carried, message, tmp_path):
    case = carried_case(tmp_path, carried)
    with unchanged(tmp_path), pytest.raises(OptionError, match=message):
        write_model(case)


def test_a_square_weight_beside_both_orientations_is_refused(tmp_path):
    base = save_base("gpt2", tmp_path / "base")
    shapes = {"transformer.h.0.attn.c_attn": (72, 24), "transformer.h.0.attn.c_proj": (24, 24)}
    adapter = write_adapter(tmp_path / "one", random_factors(shapes, 2))  # no fan_in_fan_out
    case = SimpleNamespace(base=base, merged=at_one([adapter]), out=tmp_path / "out")
    message = r"'transformer.h.0.attn.c_proj' is square; say fan_in_fan_out"
    with unchanged(tmp_path), pytest.raises(OptionError, match=message):
        write_model(case)


@pytest.mark.parametrize("write", [write_model, lambda case: write_deltas(case.merged, case.out)])
def test_replicated_layers_are_refused(write, tmp_path):
    base = save_base("gpt2", tmp_path / "base")
    factors = random_factors({"transformer.h.3.mlp.c_fc": (96, 24)}, 2)
    adapter = write_adapter(tmp_path / "one", factors, layer_replication=[[0, 2], [0, 2]])
    case = SimpleNamespace(base=base, merged=at_one([adapter]), out=tmp_path / "out")
    with unchanged(tmp_path), pytest.raises(DomergeError, match=r"replicate layers .*; write an"):
        write(case)


def add_some(folder: Any, merged: Merged, then: Callable[[], object]) -> None:
    """Write modules, but for something that happens after a few."""
    with folder:
        for number, name in enumerate(merged.names):
            if number == 3:
                then()
            folder.add(name, merged.delta(name))


def test_a_base_that_changes_meanwhile_is_noticed(gpt2_case, tmp_path):
    folder = ModelFolder(gpt2_case.out, of_base(gpt2_case.merged.target, gpt2_case.base), False)
    with pytest.raises(OptionError, match=r"changed since it was loaded; start again"):
        add_some(
            folder,
            gpt2_case.merged,
            lambda: edit_weights(gpt2_case.base, lambda stored: stored[C_FC].zero_()),
        )
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_sums_that_do_not_fit_are_refused(gpt2_case, tmp_path):
    case = gpt2_case
    edit_weights(case.base, lambda stored: stored.update({k: v.half() for k, v in stored.items()}))
    name = case.merged.names[0]
    folder = ModelFolder(case.out, of_base(case.merged.target, case.base), False)
    message = rf"'{name}': the result has values that are not finite in float16; .* wider dtype"
    with unchanged(tmp_path), pytest.raises(DomergeError, match=message), folder:
        folder.add(name, case.merged.delta(name) + 1e5)


def in_bfloat16(stored: dict[str, Tensor]) -> None:
    stored.update({key: tensor.bfloat16() for key, tensor in stored.items()})


def test_an_update_that_the_base_rounds_away_is_refused(gpt2_case, tmp_path):
    edit_weights(gpt2_case.base, in_bfloat16)
    name = gpt2_case.merged.names[0]
    folder = ModelFolder(gpt2_case.out, of_base(gpt2_case.merged.target, gpt2_case.base), False)
    message = rf"'{name}': the update is lost in the rounding of the base's bfloat16 .* float32$"
    with unchanged(tmp_path), pytest.raises(DomergeError, match=message), folder:
        folder.add(name, 1e-7 * gpt2_case.merged.delta(name))


def test_what_the_base_rounds_away_in_part_is_said(gpt2_case):
    edit_weights(gpt2_case.base, in_bfloat16)
    merged, notes = gpt2_case.merged, {}
    for size in (1.0, 3e-5):
        folder = ModelFolder(gpt2_case.out, of_base(merged.target, gpt2_case.base), size != 1.0)
        with folder:
            for name in merged.names:
                change = size * merged.delta(name)
                # The rows that are looked at first lose theirs, the others do not.
                rows = change.T if folder._fit.places[name][0].turned else change
                rows[:: model_output.SAMPLED] *= 1e-7 if name == merged.names[0] else 1.0
                folder.add(name, change)
            folder.finish(merged.report)
        notes[size] = folder.notes
    assert notes[1.0] == ()
    (note,) = notes[3e-5]
    assert re.fullmatch(r"rounding to the base's dtype keeps \d\d? % of the update", note)


def test_dense_updates_below_float16_are_refused(gpt2_case, tmp_path):
    target = dataclasses.replace(gpt2_case.merged.target, dtype=torch.float16)
    name = gpt2_case.merged.names[0]
    folder = DeltaFolder(gpt2_case.out, target, False)
    message = rf"'{name}': the merged update is too small for float16 \(rounding would change it"
    with unchanged(tmp_path), pytest.raises(DomergeError, match=message), folder:
        folder.add(name, 1e-5 * gpt2_case.merged.delta(name))


@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("form", ["model", "deltas"])
def test_an_interrupted_write_leaves_nothing(form, error, gpt2_case, tmp_path):
    merged, out = gpt2_case.merged, tmp_path / "new/out"
    if form == "model":
        folder: Any = ModelFolder(out, of_base(merged.target, gpt2_case.base), False)
    else:
        folder = DeltaFolder(out, merged.target, False)
    written = []

    def interrupt() -> None:
        written.extend(
            path.stat().st_size for path in out.parent.glob(".domerge_fast-*/new/*.safetensors")
        )
        raise error

    with unchanged(tmp_path), pytest.raises(type(error)):
        add_some(folder, merged, interrupt)
    assert sum(written) > 3 * 24 * 24 * 4


def test_a_full_disk_leaves_nothing(gpt2_case, tmp_path):
    size = (gpt2_case.base / WEIGHTS).stat().st_size
    for room in (1, size // 2 // PAGE, size // PAGE):
        with small_disk(tmp_path / "disk", f"size={room * PAGE}") as disk:
            gpt2_case.out = disk / "out"
            with pytest.raises(OutputError, match=r"No space left on device\); nothing was kept"):
                write_model(gpt2_case)
            assert os.listdir(disk) == []


class Net(torch.nn.Module):
    """Layers of every kind; nothing is computed with them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(32, 6)
        self.conv = torch.nn.Conv2d(6, 10, (3, 2), padding=1)
        self.line = torch.nn.Conv1d(5, 4, 3)
        self.fc = torch.nn.Linear(8, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deltas_add_up_to_what_peft_merges(dtype, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights=False, target_modules=["emb", "conv", "line", "fc"]
    )
    net = Net()
    own = {key: value.clone() for key, value in net.state_dict().items()}
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path / "one")
    merged = at_one([tmp_path / "one"], method="linear", dtype=dtype)
    write_deltas(merged, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [CARD, "deltas.safetensors"]
    found = load_file(tmp_path / "out/deltas.safetensors")
    assert set(found) == {f"{name}.weight" for name in ("emb", "conv", "line", "fc")}
    expected = model.merge_and_unload().state_dict()
    for key, delta in found.items():
        assert delta.dtype == getattr(torch, dtype)
        assert delta.shape == own[key].shape
        change = expected[key] - own[key]
        allowed = 1e-6 if dtype == "float32" else 0.02
        assert (delta.float() - change).norm() <= allowed * change.norm()
    assert "library_name" not in (tmp_path / "out" / CARD).read_text()


def test_deltas_of_conv1d_are_stored_as_it_is(tmp_path):
    gpt2_case = prepared("gpt2", tmp_path)
    write_deltas(gpt2_case.merged, gpt2_case.out)
    old = tensors(gpt2_case.base)
    found = tensors(gpt2_case.out)
    assert set(found) == {f"{name}.weight" for name in gpt2_case.merged.names}
    model = AutoModelForCausalLM.from_pretrained(gpt2_case.base)
    model.load_state_dict({k: old[k] + delta for k, delta in found.items()}, strict=False)
    expected = output(gpt2_case.model.merge_and_unload(adapter_names=["one", "two"]))
    assert_close(output(model), expected, 1e-5)


def test_large_deltas_are_sharded_as_hugging_face_does(gpt2_case, monkeypatch, tmp_path):
    write_deltas(gpt2_case.merged, gpt2_case.out)
    whole = tensors(gpt2_case.out)
    monkeypatch.setattr(deltas, "SHARD_BYTES", 9000)  # c_fc has 9216 bytes, attn.c_proj 2304
    write_deltas(gpt2_case.merged, gpt2_case.out, overwrite=True)
    names = [f"deltas-{k:05d}-of-00008.safetensors" for k in range(1, 9)]
    index = "deltas.safetensors.index.json"
    assert sorted(os.listdir(gpt2_case.out)) == sorted([CARD, index, *names])
    table = json.loads((gpt2_case.out / index).read_text())
    assert set(table["weight_map"]) == set(whole)
    for key, name in table["weight_map"].items():
        assert torch.equal(load_file(gpt2_case.out / name)[key], whole[key])
    sizes = {
        name: sum(t.nbytes for t in load_file(gpt2_case.out / name).values()) for name in names
    }
    assert table["metadata"]["total_size"] == sum(sizes.values())
    for name, size in sizes.items():
        assert size <= 9000 or len(load_file(gpt2_case.out / name)) == 1
    monkeypatch.undo()
    write_deltas(gpt2_case.merged, gpt2_case.out, overwrite=True)
    assert sorted(os.listdir(gpt2_case.out)) == [CARD, "deltas.safetensors"]


def test_deltas_hold_no_tensor_saved_whole(tmp_path):
    case = carried_case(tmp_path, {"score.weight": torch.ones(2, 24)})
    with unchanged(tmp_path), pytest.raises(DomergeError, match=r"score.weight' is saved whole"):
        write_deltas(case.merged, case.out)


def test_deltas_that_do_not_fit_are_refused(tmp_path):
    adapter = dm.from_tensors({"q": (torch.ones(1, 4), torch.ones(3, 1))})
    merged = at_one([adapter], dtype="float16")
    with unchanged(tmp_path), pytest.raises(DomergeError, match="not finite in float16"):
        write_deltas(merged, tmp_path / "out", q=torch.full((3, 4), -7e4))
