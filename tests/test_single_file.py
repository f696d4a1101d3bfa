"""LoRA files of kohya's tools, diffusers, ComfyUI and others: what is read is what their own
readers make of them, and so is what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.close import assert_close
from support.files import unchanged
from support.modules import FILES, modules
from support.single_file import (
    KOHYA,
    STYLES,
    comfyui,
    file_of,
    metadata_of,
    sd_scripts,
    tensors_of,
)

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.errors import AdapterError, OutputError
from domerge_fast.formats.single_file.grammar import names_of, split

NOTE = "no alpha: scale 1 assumed, as diffusers and ComfyUI do"


def updates(adapter: dm.Adapter) -> dict[str, torch.Tensor]:
    """ΔW [m, n] of every module as it was read."""
    found = {}
    for name, module in adapter.modules.items():
        a, b = adapter.factors(name)
        found[name] = module.scaling * b.double() @ a.double()
    return found


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, update in wanted.items():
        assert_close(got[name].flatten(1), update.flatten(1), 1e-6, name=name)


def pair(folder: Path, style: str, **given: object) -> list[Path]:
    one = file_of(folder / "one.safetensors", style, 4, alpha=2.0, seed=1, **given)
    return [one, file_of(folder / "two.safetensors", style, 6, alpha=9.0, seed=2, **given)]


@pytest.mark.parametrize("style", STYLES)
def test_a_file_is_read_as_its_reader_takes_it(style, tmp_path):
    path = file_of(tmp_path / "x.safetensors", style, 4)
    adapter = dm.load(path)
    same(updates(adapter), comfyui(path, style))
    name, shapes, _, _, has_alpha = STYLES[style]
    assert (adapter.style.format, adapter.style.names) == (name, name)
    assert adapter.notes == (() if has_alpha else (NOTE,))
    for module, shape in shapes.items():
        assert adapter.modules[module].a_shape == (4, *shape[1:])


@pytest.mark.parametrize("style", STYLES)
def test_a_merge_of_files_is_a_file_of_their_kind(style, tmp_path):
    one, two = pair(tmp_path, style)
    out = tmp_path / "out.safetensors"
    merged = dm.merge([one, two], "linear", weights=[1.0, -0.5], output=out)
    first, second = comfyui(one, style), comfyui(two, style)
    wanted = {name: first[name] - 0.5 * second[name] for name in first}
    assert merged.report.recipe.format == STYLES[style][0]
    same(comfyui(out, style) if "diffusers" not in style else updates(dm.load(out)), wanted)
    same(updates(dm.load(out)), wanted)
    same({name: merged.delta(name) for name in merged.names}, wanted)
    if style.startswith("kohya"):
        same(sd_scripts(out), wanted)
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "out.safetensors", "two.safetensors"]


@pytest.mark.parametrize("style", STYLES)
def test_one_file_in_the_same_update_out(style, tmp_path):
    path = file_of(tmp_path / "x.safetensors", style, 4)
    dm.merge([path], "linear", output=tmp_path / "out.safetensors")
    same(updates(dm.load(tmp_path / "out.safetensors")), comfyui(path, style))
    before, after = tensors_of(path), tensors_of(tmp_path / "out.safetensors")
    if "diffusers with alpha" in style:
        before = {key: x for key, x in before.items() if not key.endswith("alpha")}
    if style == "kohya without alpha":
        after = {key: x for key, x in after.items() if not key.endswith("alpha")}
    assert {key: x.shape for key, x in after.items()} == {key: x.shape for key, x in before.items()}


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_a_folder_gets_the_usual_file_and_a_card(style, tmp_path):
    files = pair(tmp_path, style)
    merged = dm.merge(files, "linear", output=tmp_path / "out")
    name = {"kohya": "lora.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}[style]
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", name]
    assert dm.Recipe.read(tmp_path / "out", tmp_path).format == style
    same(updates(dm.load(tmp_path / "out")), updates(dm.load(tmp_path / "out" / name)))
    again = tmp_path / "again.safetensors"
    merged.save(tmp_path / "out", overwrite=True)
    dm.merge([tmp_path / "out"], "linear", output=again)
    same(updates(dm.load(again)), updates(dm.load(tmp_path / "out")))


def test_kohya_s_files_keep_every_module_s_rank_and_have_it_as_alpha(tmp_path):
    one, two = pair(tmp_path, "kohya", dtype=torch.bfloat16)
    less = tensors_of(two)
    save_file({k: x for k, x in less.items() if "lora_te1" not in k}, two)
    dm.merge([one, two], "linear", output=tmp_path / "out.safetensors")
    found = tensors_of(tmp_path / "out.safetensors")
    for module in KOHYA:
        rank = 4 if "lora_te1" in module else 10
        assert len(found[f"{module}.lora_down.weight"]) == rank
        assert found[f"{module}.lora_down.weight"].dtype == torch.bfloat16
        alpha = found[f"{module}.alpha"]
        assert (alpha.dtype, alpha.shape, float(alpha)) == (torch.float32, (), rank)


def test_diffusers_files_have_one_rank_unless_ragged(tmp_path):
    one, two = pair(tmp_path, "diffusers")
    save_file({k: x for k, x in tensors_of(two).items() if "text_encoder" not in k}, two)
    for ragged, ranks in ((False, {10}), (True, {4, 10})):
        out = tmp_path / f"{ragged}.safetensors"
        dm.merge([one, two], "linear", ragged=ragged, output=out)
        assert {len(x) for k, x in tensors_of(out).items() if "lora_A" in k} == ranks
    same(*(updates(dm.load(tmp_path / f"{ragged}.safetensors")) for ragged in (True, False)))


# Shapes


def test_a_convolution_s_middle_is_folded_into_a(tmp_path):
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    g = torch.Generator().manual_seed(3)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 6, 1, 1, generator=g),
        f"{name}.lora_mid.weight": torch.randn(4, 4, 3, 3, generator=g),
        f"{name}.lora_up.weight": torch.randn(12, 4, 1, 1, generator=g),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = comfyui(tmp_path / "x.safetensors", "kohya")
    adapter = dm.load(tmp_path / "x.safetensors")
    assert adapter.modules[name].a_shape == (4, 6, 3, 3)
    same(updates(adapter), wanted)
    dm.merge([adapter], "linear", output=tmp_path / "out.safetensors")
    same(comfyui(tmp_path / "out.safetensors", "kohya"), wanted)
    assert set(tensors_of(tmp_path / "out.safetensors")) == tensors.keys() - {
        f"{name}.lora_mid.weight"
    }


@pytest.mark.parametrize("first", ["2-D", "4-D"])
def test_one_layer_in_two_dimensions_and_in_four_is_the_same(first, tmp_path):
    name = "lora_unet_mid_block_attentions_0_ff_net_2"
    one, two = pair(tmp_path, "kohya")
    flat = tensors_of(two)
    deep = {k: x[..., None, None] if name in k and x.ndim else x for k, x in flat.items()}
    wanted = comfyui(one, "kohya"), comfyui(two, "kohya")
    save_file(deep, two)
    files = [one, two] if first == "2-D" else [two, one]
    dm.merge(files, "linear", output=tmp_path / "out.safetensors")
    same(
        comfyui(tmp_path / "out.safetensors", "kohya"),
        {module: wanted[0][module] + wanted[1][module] for module in wanted[0]},
    )
    shape = tensors_of(tmp_path / "out.safetensors")[f"{name}.lora_down.weight"].shape
    assert shape == ((10, 24) if first == "2-D" else (10, 24, 1, 1))


def test_a_flat_convolution_is_that_of_the_other_file(tmp_path):
    """ComfyUI reads A of a convolution as a matrix, too."""
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    one, two = pair(tmp_path, "kohya")
    wanted = comfyui(one, "kohya"), comfyui(two, "kohya")
    save_file(
        {k: x.flatten(1) if name in k and x.ndim else x for k, x in tensors_of(one).items()}, one
    )
    dm.merge([one, two], "linear", output=tmp_path / "out.safetensors")
    found = tensors_of(tmp_path / "out.safetensors")
    assert found[f"{name}.lora_down.weight"].shape == (10, 6, 3, 3)
    total = {module: wanted[0][module] + wanted[1][module] for module in wanted[0]}
    same(sd_scripts(tmp_path / "out.safetensors"), total)


def test_other_shapes_of_one_module_are_refused(tmp_path):
    one, two = pair(tmp_path, "kohya")
    name = "lora_unet_mid_block_attentions_0_ff_net_2.lora_down.weight"
    save_file(tensors_of(two) | {name: torch.ones(6, 23)}, two)
    with pytest.raises(AdapterError, match="adapts a linear of 10 outputs and 23 inputs"):
        dm.merge([one, two], "linear")


# Names


def test_old_and_new_keys_of_diffusers_are_one_module(tmp_path):
    old = {
        "unet.up_blocks.0.attn1.processor.to_q_lora": "unet.up_blocks.0.attn1.to_q",
        "unet.up_blocks.0.attn1.processor.to_out_lora": "unet.up_blocks.0.attn1.to_out.0",
        "unet.up_blocks.0.attn1.processor.add_k_proj_lora": "unet.up_blocks.0.attn1.add_k_proj",
        "mid_block.attn2.processor.to_v_lora": "unet.mid_block.attn2.to_v",
        "text_encoder.layers.0.self_attn.to_out_lora": "text_encoder.layers.0.self_attn.out_proj",
        "text_encoder.layers.0.mlp.fc1.lora_linear_layer": "text_encoder.layers.0.mlp.fc1",
    }
    g = torch.Generator().manual_seed(1)
    tensors, renamed = {}, {}
    for before, after in old.items():
        a, b = torch.randn(4, 10, generator=g), torch.randn(12, 4, generator=g)
        tensors |= {f"{before}.down.weight": a, f"{before}.up.weight": b}
        renamed |= {f"{after}.lora_A.weight": 2 * a, f"{after}.lora_B.weight": b}
    save_file(tensors, tmp_path / "old.safetensors")
    save_file(renamed, tmp_path / "new.safetensors")
    same(
        updates(dm.load(tmp_path / "old.safetensors")),
        {module: x / 2 for module, x in updates(dm.load(tmp_path / "new.safetensors")).items()},
    )
    out = tmp_path / "out.safetensors"
    dm.merge([tmp_path / "old.safetensors", tmp_path / "new.safetensors"], "linear", output=out)
    assert {k.rpartition(".lora_")[0] for k in tensors_of(out)} == {*old.values()}


ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight", ".alpha"),
    "musubi": (".lora_down.weight", ".lora_up.weight", ".alpha"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "comfy": (".lora_A.weight", ".lora_B.weight"),
    "diffusers-old": (".down.weight", ".up.weight"),
}
LISTS = [name for name in FILES if not name.endswith("-model")]


@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_real_files_is_read(name, tmp_path):
    found = modules(name)
    kind = "diffusers-old" if "-old-" in name else name.partition("-")[0]
    shapes = {".alpha": (), ENDINGS[kind][0]: (1, 3), ENDINGS[kind][1]: (2, 1)}
    tensors = {m + end: torch.ones(shapes[end]) for m in found for end in ENDINGS[kind]}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = dm.load(tmp_path / "x.safetensors")
    names = {"kohya": "kohya", "musubi": "kohya", "comfy": "comfyui"}.get(kind, "diffusers")
    assert adapter.style.names == names
    assert len(adapter.modules) == len(found)
    if "-old-" not in name:
        assert adapter.modules.keys() == found.keys()


@pytest.mark.parametrize(
    ("key", "module", "part", "names"),
    [
        ("lora_unet__blocks_0_q.lora_down.weight", "lora_unet__blocks_0_q", "down", "kohya"),
        ("lora_transformer_a_to_q.lora_up.weight", "lora_transformer_a_to_q", "up", "kohya"),
        ("lora_prior_unet_down.lora_mid.weight", "lora_prior_unet_down", "mid", "kohya"),
        ("lycoris_lin.alpha", "lycoris_lin", "alpha", "kohya"),
        ("transformer_2.blocks.0.q.lora_A.weight", "transformer_2.blocks.0.q", "down", "diffusers"),
        ("unet.a.lora_B.default.weight", "unet.a", "up", "diffusers"),
        ("transformer_blocks.0.attn.to_q.lora_A", "transformer_blocks.0.attn.to_q", "down", "bare"),
        ("model.diffusion_model.a.lora_A.weight", "model.diffusion_model.a", "down", "comfyui"),
        (
            *("double_blocks.0.processor.qkv_lora2.up.weight",),
            *("double_blocks.0.processor.qkv_lora2", "up", "xlabs"),
        ),
    ],
)
def test_keys_are_taken_apart(key, module, part, names):
    found = split(key)
    assert (found.module, found.part, names_of(found)) == (module, part, names)


# Refusals


def refusal(path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        dm.load(path, name="mine")
    message = str(caught.value)
    assert message.startswith("adapter 'mine'")
    return message


UP, DOWN = {"lora_a.lora_up.weight": (3, 2)}, {"lora_a.lora_down.weight": (2, 4)}
REFUSED = {
    "no A": (UP, "'lora_a.lora_up.weight', but no A"),
    "no B": (DOWN, "'lora_a.lora_down.weight', but no B"),
    "alpha alone": ({"lora_a.alpha": ()}, "'lora_a.alpha', but no A (lora_down, lora_A) and no B"),
    "other rank": (UP | {"lora_a.lora_down.weight": (3, 4)}, "do not fit (A [3, 4], B [3, 2])"),
    "deep B": (DOWN | {"lora_a.lora_up.weight": (3, 2, 2)}, "do not fit (A [2, 4], B [3, 2, 2])"),
    "alphas": (UP | DOWN | {"lora_a.alpha": (2,)}, "'lora_a.alpha' is no number (shape [2]"),
    "empty": (UP | {"lora_a.lora_down.weight": (0, 4)}, "do not fit (A [0, 4]"),
    "scalar": (UP | {"lora_a.lora_down.weight": ()}, "do not fit (A []"),
    "unknown": (UP | DOWN | {"lora_a.lora_side.weight": (2,)}, "tensor 'lora_a.lora_side.weight'"),
    "twice": (
        {"a.x.lora_A.weight": (2, 4), "a.x.lora_A.default.weight": (2, 4)},
        "stores one factor twice, as 'a.x.lora_A.default.weight' and 'a.x.lora_A.weight'",
    ),
    "two spellings": (UP | {"lora_a.lora_A.weight": (2, 4)}, "'lora_a.lora_A.weight': two spell"),
    "mixed": (
        UP | DOWN | {"unet.x.lora_A.weight": (2, 4), "unet.x.lora_B.weight": (4, 2)},
        "names of 'kohya' ('lora_a.lora_down.weight') and of 'diffusers' ('unet.x.lora_A.weight')",
    ),
    "dylora": (
        {"lora_a.lora_up.weight": (3, 2), "lora_a.lora_down.weight": (2, 4, 3, 3)},
        "as a DyLoRA does",
    ),
    "middle": (UP | DOWN | {"lora_a.lora_mid.weight": (2, 3, 3, 3)}, "parts that do not fit"),
    "dora": (UP | DOWN | {"lora_a.dora_scale": (4, 1)}, "which fits no weight [3, 4]"),
    "nothing": ({}, "has no LoRA factors"),
    "model": ({"model.embed.weight": (3, 2)}, "no part of a LoRA that is known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_its_key(case, tmp_path):
    shapes, said = REFUSED[case]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("alpha", "said"),
    [(0.0, "alpha is 0, which kohya's tools take"), (float("nan"), "is nan"), (True, "no number")],
)
def test_an_alpha_that_tools_take_differently_is_refused(alpha, said, tmp_path):
    tensors = {key: torch.ones(shape) for key, shape in (UP | DOWN).items()}
    save_file(tensors | {"lora_a.alpha": torch.tensor(alpha)}, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(3.0, dtype=torch.float16),
        torch.tensor([3.0], dtype=torch.bfloat16),
        torch.tensor([[3.0]]),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor(3),
    ],
)
def test_alphas_of_any_dtype_are_one_number(alpha, tmp_path):
    tensors = {key: torch.ones(shape) for key, shape in (UP | DOWN).items()}
    save_file(tensors | {"lora_a.alpha": alpha}, tmp_path / "x.safetensors")
    assert dm.load(tmp_path / "x.safetensors").modules["lora_a"].scaling == 1.5


def test_files_whose_names_nothing_joins_are_refused_together(tmp_path):
    one = file_of(tmp_path / "one.safetensors", "kohya", 4)
    two = file_of(tmp_path / "two.safetensors", "diffusers", 4)
    with pytest.raises(AdapterError, match=r"in no table of modules.*merge adapters of one format"):
        dm.merge([one, two])


# Metadata


TRAINED = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_base_model_version": "sdxl_base_v1-0",
    "sshs_model_hash": "0123",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.hash_sha256": "0x12",
}


def test_metadata_is_kept_and_corrected(tmp_path):
    one = file_of(
        tmp_path / "one.safetensors", "kohya", 4, metadata=TRAINED | {"ss_output_name": "one"}
    )
    two = file_of(
        *(tmp_path / "two.safetensors", "kohya", 6),
        metadata=TRAINED | {"ss_output_name": "two", "ss_v2": "False"},
    )
    dm.merge([one, two], "linear", output=tmp_path / "out.safetensors")
    found = metadata_of(tmp_path / "out.safetensors")
    assert found.pop("domerge_fast_recipe")
    assert found.pop("domerge_fast")
    assert found == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "10",
        "ss_network_alpha": "10",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.merged_from": "one.safetensors, two.safetensors",
    }


def test_files_that_name_other_bases_are_refused(tmp_path):
    one = file_of(tmp_path / "one.safetensors", "kohya", 4, metadata=TRAINED)
    other = TRAINED | {"ss_base_model_version": "sd_v1"}
    two = file_of(tmp_path / "two.safetensors", "kohya", 4, metadata=other)
    with pytest.raises(AdapterError, match="base model is 'sd_v1', that of adapter"):
        dm.merge([one, two])
    assert dm.merge([one, two], "linear", base_model="sdxl").names


def test_metadata_of_any_text_has_room(tmp_path):
    """In a header as JSON a character may be three times as long as in UTF-8."""
    texts = {"ss_tag_frequency": '"\U0001f600\x01\n' * 5000, "ss_output_name": "\\é" * 100}
    one = file_of(tmp_path / ("x" * 200 + ".safetensors"), "kohya", 4, metadata=TRAINED | texts)
    dm.merge([one], "linear", output=tmp_path / "out.safetensors")
    found = metadata_of(tmp_path / "out.safetensors")
    assert {key: found[key] for key in texts} == texts
    assert found["modelspec.merged_from"] == one.name


def test_a_dylora_is_told_by_its_metadata(tmp_path):
    told = {"ss_network_args": '{"conv_dim": "4", "algo": "dylora"}'}
    file_of(tmp_path / "x.safetensors", "kohya", 4, metadata=told)
    assert "is a LyCORIS DyLoRA" in refusal(tmp_path / "x.safetensors")


def config(**fields: object) -> dict[str, str]:
    """Metadata of diffusers with a config of PEFT."""
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    whole = {f"unet.{name}": value for name, value in (usual | fields).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(whole)}


def test_a_config_in_the_metadata_tells_scales(tmp_path):
    path = file_of(tmp_path / "x.safetensors", "diffusers", 4, metadata=config(use_rslora=True))
    adapter = dm.load(path)
    scalings = {name: module.scaling for name, module in adapter.modules.items()}
    assert scalings == {n: 4.0 if n.startswith("unet.") else 1.0 for n in scalings}
    assert adapter.notes == (NOTE.replace(":", " for 1 of 3 modules:"),)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (config(r=5), "the config says 5; correct r or rank_pattern in lora_adapter_metadata"),
        (config(use_dora=True), "is a DoRA"),
        (config(new=1), "unknown field 'new' (1) in lora_adapter_metadata"),
        (config(alpha_pattern=3), "correct lora_adapter_metadata"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in its metadata is no JSON"),
        (
            {"lora_adapter_metadata": "[]"},
            "lora_adapter_metadata in its metadata is no JSON object",
        ),
    ],
)
def test_a_config_that_tells_nothing_is_refused(metadata, said, tmp_path):
    file_of(tmp_path / "x.safetensors", "diffusers", 4, metadata=metadata)
    assert said in refusal(tmp_path / "x.safetensors")


# One file as an output


def test_a_file_tells_its_recipe_and_is_made_again_by_it(tmp_path, capsys):
    pair(tmp_path / "in", "kohya")
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    inputs = [str(tmp_path / f"in/{name}.safetensors") for name in ("one", "two")]
    assert cli.main(["merge", *inputs, "-o", str(out), "--method", "ties", "-q"]) == 0
    assert cli.main(["recipe", "show", str(out)]) == 0
    assert "method: ties" in capsys.readouterr().out
    run = ["run", str(out), "--adapters", str(tmp_path / "in"), "-o", str(again), "-q"]
    assert cli.main(run) == 0
    assert out.read_bytes() == again.read_bytes()


def test_a_file_without_a_recipe_says_so(tmp_path, capsys):
    path = file_of(tmp_path / "x.safetensors", "kohya", 4)
    assert cli.main(["recipe", "show", str(path)]) == 2
    assert "has no recipe in its metadata" in capsys.readouterr().err


def test_an_output_file_is_replaced_by_the_rules_of_folders(tmp_path):
    one, two = pair(tmp_path, "kohya")
    out = tmp_path / "out.safetensors"
    dm.merge([one, two], "linear", output=out)
    with unchanged(tmp_path), pytest.raises(OutputError, match="exists already; give another file"):
        dm.merge([one], "linear", output=out)
    dm.merge([one], "linear", output=out, overwrite=True)
    file_of(out, "kohya", 2)
    with unchanged(tmp_path), pytest.raises(OutputError, match="file that domerge_fast did not"):
        dm.merge([one], "linear", output=out, overwrite=True)
    dm.merge([one], "linear", output=out, force=True)
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "out.safetensors", "two.safetensors"]


def test_an_input_is_never_replaced(tmp_path):
    one, two = pair(tmp_path, "kohya")
    (tmp_path / "link.safetensors").symlink_to(two)
    for out in (one, tmp_path / "link.safetensors"):
        with unchanged(tmp_path), pytest.raises(OutputError, match="one of the adapters to merge"):
            dm.merge([one, two], "linear", output=out, force=True)
    with unchanged(tmp_path), pytest.raises(OutputError, match="one of the adapters"):
        dm.merge([one, two], "linear", output=tmp_path, force=True)


def test_a_folder_s_format_is_not_written_to_a_file(tmp_path):
    adapter = dm.from_tensors({"x": (torch.ones(2, 3), torch.ones(4, 2))})
    with pytest.raises(OutputError, match="name of a file, and a folder is written"):
        dm.merge([adapter], "linear", output=tmp_path / "x.safetensors")
