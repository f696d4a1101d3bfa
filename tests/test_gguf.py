"""LoRA in GGUF: what is written is what llama.cpp's rules make of it, and is read back the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.close import assert_close
from support.make import Factors, random_factors, write_adapter, write_mlx
from torch import Tensor

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.errors import AdapterError, DomergeError, OptionError, OutputError
from domerge_fast.formats.gguf.architectures import ARCHITECTURES, module_of, tensors
from domerge_fast.methods import TABLE

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **HEADS}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
MODULES = {
    "model.layers.0.self_attn.q_proj": (32, 24),
    "model.layers.0.self_attn.k_proj": (16, 24),
    "model.layers.11.self_attn.v_proj": (16, 24),
    "model.layers.11.mlp.down_proj": (24, 40),
    "lm_head": (50, 24),
}
TENSORS = ("blk.0.attn_q", "blk.0.attn_k", "blk.11.attn_v", "blk.11.ffn_down", "output")
EMBEDDING = "model.embed_tokens"


def base(folder: Path, config: Mapping[str, Any] = LLAMA) -> Path:
    """A folder with a config, which is all of a base model that is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(rank: int, seed: int, embedding: bool = False, **scaling: Any) -> dm.Adapter:
    shapes = MODULES | ({EMBEDDING: (24, 50)} if embedding else {})
    factors = random_factors(shapes, rank, seed=seed)
    return dm.from_tensors(factors, name=f"x{seed}", embeddings=[EMBEDDING], **scaling)


def dense(x: dm.Adapter | Path, name: str) -> Tensor:
    x = x if isinstance(x, dm.Adapter) else dm.load(x)
    a, b = x.factors(name)
    return x.modules[name].scaling * (b.double() @ a.double())


def total(adapters: list[dm.Adapter], name: str) -> Tensor:
    return sum(dense(x, name) for x in adapters if name in x.modules)


def permuted(weight: Tensor, heads: int) -> Tensor:
    """The rows of a weight of q or k as llama.cpp's converter orders them."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def in_llama_cpp(file: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each of its weights: alpha over the rank of B, times B A."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    stored = {x.name: torch.tensor(np.array(x.data)).double() for x in reader.tensors}
    found = {}
    for name in {key.rpartition(".")[0] for key in stored}:
        a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        a = a.T if name == "token_embd.weight" else a
        found[name] = (alpha / b.shape[1] if alpha else 1.0) * (b @ a)
    return found


def said(file: Path) -> dict[str, Any]:
    return {key: x.contents() for key, x in gguf.GGUFReader(file).fields.items()}


@pytest.fixture
def pair() -> list[dm.Adapter]:
    """Of different ranks and scalings, the second with an embedding."""
    return [adapter(4, 1, scaling=1.5), adapter(6, 2, embedding=True, scaling=0.25)]


def test_llama_cpp_adds_the_sum_in_its_own_order_of_rows(pair, tmp_path):
    out = tmp_path / "merged.gguf"
    dm.merge(pair, "linear", format="gguf", base=base(tmp_path / "base"), output=out)
    found = in_llama_cpp(out)
    assert set(found) == {f"{name}.weight" for name in (*TENSORS, "token_embd")}
    for name, tensor in zip((*MODULES, EMBEDDING), (*TENSORS, "token_embd")):
        expected = total(pair, name)
        if tensor in ("blk.0.attn_q", "blk.0.attn_k"):
            expected = permuted(expected, 4 if tensor.endswith("q") else 2)
        assert_close(found[f"{tensor}.weight"], expected, 1e-6, name=name)
    fields = said(out)
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 10.0
    assert fields["general.file_type"] == 0
    ranks = {x.name: x.shape for x in gguf.GGUFReader(out).tensors if x.name.endswith("lora_b")}
    assert {int(shape[0]) for shape in ranks.values()} == {10}


def test_a_model_without_llama_s_order_keeps_its_rows(tmp_path):
    one, out = adapter(4, 1), tmp_path / "merged.gguf"
    dm.merge([one], "linear", format="gguf", base=base(tmp_path / "base", QWEN), output=out)
    found = in_llama_cpp(out)
    for name, tensor in zip(MODULES, TENSORS):
        assert_close(found[f"{tensor}.weight"], dense(one, name), 1e-6)
    assert said(out)["general.architecture"] == "qwen3"


@pytest.mark.parametrize("config", [LLAMA, QWEN])
@pytest.mark.parametrize("embedding", [False, True])
def test_what_is_written_is_read_as_the_same(config, embedding, tmp_path):
    pair = [adapter(4, 1, scaling=1.5), adapter(6, 2, embedding, scaling=0.25)]
    given = {"format": "gguf", "base": base(tmp_path / "base", config)}
    dm.merge(pair, "linear", output=tmp_path / "one.gguf", **given)
    back = dm.load(tmp_path / "one.gguf")
    assert set(back.modules) == {*MODULES, *([EMBEDDING] if embedding else [])}
    for name in back.modules:
        assert_close(dense(back, name), total(pair, name), 1e-6)
    ranks = {name: module.rank for name, module in back.modules.items()}
    assert ranks == dict.fromkeys(MODULES, 10) | ({EMBEDDING: 6} if embedding else {})
    dm.merge([tmp_path / "one.gguf"], "linear", output=tmp_path / "two.gguf")  # needs no base
    for name in back.modules:
        assert_close(dense(tmp_path / "two.gguf", name), dense(back, name), 1e-6)
    one, two = said(tmp_path / "one.gguf"), said(tmp_path / "two.gguf")
    assert two == one | {key: two[key] for key in one if "recipe" in key}


@pytest.mark.parametrize("method", TABLE)
def test_any_method_takes_gguf_beside_others(method, tmp_path):
    folders = [write_adapter(tmp_path / f"{k}", random_factors(MODULES, 4, seed=k)) for k in (1, 2)]
    for k, folder in enumerate(folders):
        where = {"base": base(tmp_path / "base"), "output": tmp_path / f"{k}.gguf"}
        dm.merge([folder], "linear", format="gguf", **where)
    expected = dm.merge(folders, method)
    for sources in ([tmp_path / "0.gguf", tmp_path / "1.gguf"], [folders[0], tmp_path / "1.gguf"]):
        merged = dm.merge(sources, method, base_model="someone/base")
        for name in MODULES:
            (a, b), (one, two) = merged.factors(name), expected.factors(name)
            assert_close(b.double() @ a.double(), two.double() @ one.double(), 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype, tmp_path):
    one, out = adapter(4, 1), tmp_path / "merged.gguf"
    given = {"format": "gguf", "base": base(tmp_path / "base", QWEN)}
    dm.merge([one], "linear", dtype=dtype, output=out, **given)
    reader = gguf.GGUFReader(out)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    assert {x.tensor_type.name for x in reader.tensors} == {kinds[dtype]}
    file_type = gguf.LlamaFileType(said(out)["general.file_type"]).name
    assert file_type.endswith(kinds[dtype])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == tuple(tensor.shape[::-1])
    back = dm.load(out)
    for name in MODULES:
        assert back.modules[name].dtype == getattr(torch, dtype)
        assert_close(dense(back, name), dense(one, name), 1e-6 if dtype == "float32" else 1e-2)


def test_a_folder_holds_the_file_and_a_card(tmp_path, pair):
    given = {"format": "gguf", "base": base(tmp_path / "base")}
    dm.merge(pair, "linear", output=tmp_path / "out", **given)
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["README.md", "adapter.gguf"]
    for name in MODULES:
        assert_close(dense(tmp_path / "out", name), total(pair, name), 1e-6)
    with pytest.raises(OutputError, match="exists already"):
        dm.merge(pair, "linear", output=tmp_path / "out", **given)
    dm.merge(pair, "linear", output=tmp_path / "out", overwrite=True, **given)


def test_the_file_has_its_recipe_and_is_made_again_from_it(tmp_path):
    folder = write_adapter(tmp_path / "in" / "ä", random_factors(MODULES, 4))
    out, given = tmp_path / "merged.gguf", {"format": "gguf", "base": base(tmp_path / "base")}
    dm.merge([folder], "svd", rank=2, output=out, **given)
    recipe = dm.Recipe.read(out, tmp_path, tmp_path / "base")
    assert (recipe.method, recipe.rank, recipe.format) == ("svd", 2, "gguf")
    assert recipe.base.files.keys() == {"config.json"}
    dm.run(recipe, output=tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
    dm.merge([folder], "linear", output=out, overwrite=True, **given)
    foreign = write_gguf(tmp_path / "foreign.gguf", random_factors(MODULES, 2))
    with pytest.raises(OutputError, match="did not write"):
        dm.merge([folder], "linear", output=foreign, overwrite=True, **given)
    with pytest.raises(OptionError, match="has no recipe in its metadata"):
        dm.Recipe.read(foreign)


def write_gguf(
    file: Path,
    factors: Factors,
    alpha: float | None = 3.0,
    architecture: str = "qwen3",
    names: tuple[str, ...] = TENSORS,
    **more: Any,
) -> Path:
    """A LoRA as llama.cpp's converter writes it, with the rows of B as they are given."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in more.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, (a, b) in zip(names, factors.values()):
        writer.add_tensor(f"{name}.weight.lora_a", a.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(("alpha", "scale"), [(3.0, 0.75), (0.0, 1.0), (None, 1.0), (4.0, 1.0)])
def test_the_scale_is_alpha_over_the_rank_and_1_without(alpha, scale, tmp_path):
    factors = random_factors(MODULES, 4)
    file = write_gguf(tmp_path / "x.gguf", factors, alpha)
    for name, (a, b) in factors.items():
        assert_close(dense(file, name), scale * (b.double() @ a.double()), 1e-6)


def test_llama_s_rows_go_back_by_the_config_beside_the_file(tmp_path):
    factors = random_factors(MODULES, 4)
    stored = dict(factors)
    for name, heads in zip(MODULES, (4, 2)):
        a, b = factors[name]
        stored[name] = a, permuted(b, heads).contiguous()
    file = write_gguf(tmp_path / "x.gguf", stored, 4.0, "llama")
    with pytest.raises(AdapterError, match=r"attention heads.*put the base model's config.json"):
        dm.load(file)
    base(tmp_path)
    loaded = dm.load(file)
    for name, (a, b) in factors.items():
        assert_close(dense(loaded, name), b.double() @ a.double(), 1e-6)
    dm.merge([file], "linear", output=tmp_path / "out.gguf")
    for name, x in in_llama_cpp(tmp_path / "out.gguf").items():
        assert_close(x, in_llama_cpp(file)[name], 1e-6)
    recipe = dm.Recipe.read(tmp_path / "out.gguf", tmp_path)
    dm.run(recipe, output=tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "names no architecture"),
        (QWEN, "is of 'llama', config.json beside it of 'qwen3'"),
        (LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5}, "not those of 5 attention"),
        (LLAMA | {"num_attention_heads": True}, "does not say the number of attention heads"),
    ],
)
def test_a_config_that_is_not_the_base_s_is_refused(config, said, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", random_factors(MODULES, 4), 4.0, "llama")
    base(tmp_path, config)
    with pytest.raises(AdapterError, match=said):
        dm.load(file)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"architecture": "gpt2"},
            "is of the architecture 'gpt2', whose weights",
        ),
        ({"general.type": "model"}, "is no adapter (general.type is 'model')"),
        ({"adapter.type": "other"}, "is an adapter of the type 'other'; only LoRA"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, "is an aLoRA"),
        ({"alpha": float("nan")}, "has scaling nan"),
        ({"adapter.lora.alpha": 3, "alpha": None}, "adapter.lora.alpha is '3', no float"),
        ({"names": ("blk.0.attn_qkv",)}, "has tensor 'blk.0.attn_qkv.weight.lora_a', which is no"),
        ({"names": ("blk.0.output",)}, "has tensor 'blk.0.output.weight.lora_a', which is no"),
        ({"names": ("attn_q",)}, "has tensor 'attn_q.weight.lora_a', which is no"),
        ({"names": ("blk.00.attn_q",)}, "has tensor 'blk.00.attn_q.weight.lora_a', which is no"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(given, said, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", random_factors(MODULES, 4), **given)
    with pytest.raises(AdapterError) as caught:
        dm.load(file)
    assert said in str(caught.value)
    assert "; " in str(caught.value)


def test_quantized_factors_and_norms_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    data = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    with pytest.raises(AdapterError, match="as GGML's type 8, not f32, f16 or bf16; convert it"):
        dm.load(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, np.float32))
    finish(writer)
    with pytest.raises(AdapterError, match=r"'blk.0.attn_norm.weight', which is no factor"):
        dm.load(tmp_path / "y.gguf")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "'gguf' needs the config of the base model; give its folder as base (--base)"),
        ({}, "names no architecture (architectures); write a PEFT folder"),
        ({"architectures": ["GPT2LMHeadModel"]}, "is of GPT2LMHeadModel, which llama.cpp may"),
        ({"architectures": ["LlamaForCausalLM"]}, "does not say the number of attention heads"),
        (LLAMA | {"num_attention_heads": 5}, "its 32 outputs are not those of 5 attention heads"),
        (LLAMA | {"tie_word_embeddings": True}, "'gguf' holds no 'lm_head' of a base with tied"),
        (
            {**QWEN, "architectures": ["Qwen3MoeForCausalLM"]},
            "has no place for 'model.layers.11",
        ),
    ],
)
def test_a_base_that_is_not_known_is_refused(config, said, tmp_path):
    where = {} if config is None else {"base": base(tmp_path / "base", config)}
    with pytest.raises(OptionError) as caught:
        dm.merge([adapter(4, 1)], "linear", format="gguf", output=tmp_path / "out.gguf", **where)
    assert said in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_other_refusals(tmp_path):
    x = random_factors({"model.layers.0.mlp.up_proj": (6, 5)}, 2)
    given = {"format": "gguf", "base": base(tmp_path / "base"), "output": tmp_path / "out.gguf"}
    whole = write_adapter(
        tmp_path / "a", x, carried={"score.weight": torch.ones(2, 2)}, modules_to_save=["score"]
    )
    with pytest.raises(OptionError, match="'gguf' holds no tensors saved whole"):
        dm.merge([whole], "linear", **given)
    twice = write_adapter(tmp_path / "b", x, layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(DomergeError, match="replicate layers"):
        dm.merge([twice], "linear", **given)
    with pytest.raises(OptionError, match="'gguf' has one rank for all modules"):
        dm.merge([adapter(4, 1)], "linear", ragged=True, **given)
    with pytest.raises(OptionError, match=r"has no config\.json"):
        dm.merge([adapter(4, 1)], "linear", **given | {"base": tmp_path})


def test_adapters_of_several_models_are_refused(tmp_path):
    factors = random_factors(MODULES, 4)
    qwen = write_gguf(tmp_path / "qwen.gguf", factors)
    where = {"base": base(tmp_path / "base"), "output": tmp_path / "llama.gguf"}
    dm.merge([dm.from_tensors(factors)], "linear", format="gguf", **where)
    where["output"] = tmp_path / "out.gguf"
    with pytest.raises(OptionError, match="are of 'qwen3' and of 'llama' with 4 and 2 heads"):
        dm.merge([qwen, tmp_path / "llama.gguf"], "linear", output=tmp_path / "out.gguf")
    with pytest.raises(OptionError, match="are of 'llama' with 4 and 2 heads and of 'qwen3'"):
        dm.merge([qwen], "linear", **where)
    with pytest.raises(OutputError, match=r"a folder is written; .*say format='gguf'"):
        dm.merge([dm.from_tensors(factors)], "linear", output=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_two_modules_of_one_name_in_gguf_are_refused(tmp_path):
    shapes = {f"{stem}layers.0.mlp.up_proj": (6, 5) for stem in ("", "model.language_model.")}
    one = dm.from_tensors(random_factors(shapes, 2))
    where = {"base": base(tmp_path / "base", QWEN), "output": tmp_path / "out.gguf"}
    with pytest.raises(OptionError, match="'gguf' has one place for 'layers' and 'model"):
        dm.merge([one], "linear", format="gguf", **where)
    for name in shapes:
        alone = dm.from_tensors(random_factors({name: (6, 5)}, 2))
        file = tmp_path / f"{name}.gguf"
        merged = dm.merge([alone], "linear", format="gguf", **where | {"output": file})
        assert {x.name for x in gguf.GGUFReader(file).tensors} >= {"blk.0.ffn_up.weight.lora_a"}
        assert_close(merged.delta(name), dense(alone, name))  # from the file
        assert list(dm.load(file).modules) == [name]


def test_a_merge_in_memory_is_saved_as_it(tmp_path, pair):
    merged = dm.merge(pair, "linear", format="gguf", base=base(tmp_path / "base"))
    merged.save(tmp_path / "out.gguf")
    for name in MODULES:
        assert_close(dense(tmp_path / "out.gguf", name), total(pair, name), 1e-6)


def test_mlx_becomes_gguf(tmp_path):
    factors = random_factors({name: MODULES[name] for name in [*MODULES][:4]}, 4)
    mlx = write_mlx(tmp_path / "mlx", factors, 2.5)
    out = tmp_path / "out.gguf"
    code = cli.main(
        ["merge", str(mlx), "-o", str(out), "--format", "gguf", "--base", str(base(tmp_path / "b"))]
    )
    assert code == 0
    for name in factors:
        assert_close(dense(out, name), dense(mlx, name), 1e-6)


def test_without_its_package_one_line_says_so(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "x.gguf", random_factors(MODULES, 4))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"has the format 'gguf'; .*pip install gguf"):
        dm.load(file)
    with pytest.raises(OptionError, match=r"'gguf' cannot be used here; .*pip install gguf"):
        dm.merge([adapter(4, 1)], "linear", format="gguf")


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize("kind", [x for x in ARCHITECTURES if x.endswith("CausalLM")])
def test_the_names_are_those_of_the_models(kind):
    """Every linear module of transformers' own class has its tensor, or is one that is left out."""
    known = tensors(ARCHITECTURES[kind])
    build = getattr(transformers, kind)
    config = build.config_class(**SIZES, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = build(config)
    weights = ((n, getattr(x, "weight", None)) for n, x in model.named_modules())
    linear = [n for n, x in weights if x is not None and x.ndim == 2]
    found = {module_of(name)[1] for name in linear}
    assert found & known.keys() == known.keys()
    assert found - known.keys() <= LEFT_OUT.get(kind, set())


LEFT_OUT = {
    "MixtralForCausalLM": {"mlp.gate"},
    "Qwen2MoeForCausalLM": {"mlp.shared_expert_gate"},
    "GemmaForCausalLM": {"lm_head"},
    "Gemma2ForCausalLM": {"lm_head"},
    "CohereForCausalLM": {"lm_head"},
    "Cohere2ForCausalLM": {"lm_head"},
}


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "x.gguf", random_factors(MODULES, 2)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(whole) - 32, 61):
        cut.write_bytes(whole[:size])
        with pytest.raises(AdapterError):
            dm.load(cut)
    shutil.copy(tmp_path / "x.gguf", cut)
    assert dm.load(cut).modules
