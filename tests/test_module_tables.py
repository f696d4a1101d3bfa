"""The tables of module names: each style's names lead to one spelling and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.modules import FILES, modules

from domerge_fast.formats.names.models import MODELS
from domerge_fast.formats.names.tables import table

ROOT = Path(__file__).parents[1]
LISTS = {
    "comfy-wan14b": ("wan", "comfyui"),
    "diffusers-flux": ("flux", "diffusers"),
    "diffusers-hunyuanvideo": ("hunyuanvideo", "diffusers"),
    "diffusers-qwen-image": ("qwen-image", "diffusers"),
    "diffusers-sd3-medium": ("sd3", "diffusers"),
    "diffusers-sdxl": ("sdxl", "diffusers"),
    "diffusers-wan14b": ("wan", "diffusers"),
    "kohya-flux": ("flux", "kohya"),
    "kohya-sd15": ("sd15", "kohya"),
    "kohya-sd3-medium": ("sd3", "kohya"),
    "kohya-sdxl-c3lier": ("sdxl", "kohya"),
    "musubi-wan14b": ("wan", "kohya"),
}
WHOLE = {
    "bfl-flux-model": ("flux", "diffusion_model."),
    "diffusers-flux-model": ("flux", "transformer."),
    "diffusers-sdxl-unet-model": ("sdxl", "unet."),
}
OLD = {"diffusers-old-attnprocs-sdxl"}


def in_one_spelling(model: str, found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """All pieces of modules, with their sizes."""
    sizes = {}
    for name, (m, n) in found.items():
        pieces = MODELS[model].pieces(name, (m, n))
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])], name
        assert pieces[-1].stop == m, name
        sizes |= {p.name: (p.stop - p.start, n) for p in pieces}
    return sizes


def test_every_list_is_looked_at():
    assert {*LISTS, *WHOLE, *OLD} == {*FILES}


@pytest.mark.parametrize("name", LISTS)
def test_every_module_of_a_file_leads_to_the_one_spelling_and_back(name):
    model, style = LISTS[name]
    for module, size in modules(name).items():
        for piece in MODELS[model].pieces(module, size):
            of_piece = piece.stop - piece.start, size[1]
            assert MODELS[model].spelled(piece.name, of_piece, style) == (module, size[0])


@pytest.mark.parametrize("name", WHOLE)
def test_every_layer_of_a_model_is_in_its_table(name):
    model, prefix = WHOLE[name]
    assert in_one_spelling(model, {prefix + x: size for x, size in modules(name).items()})


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("kohya-flux", "diffusers-flux", 19 * 14 + 38 * 6),
        ("kohya-sd3-medium", "diffusers-sd3-medium", 24 * 7 + 23),
        ("kohya-sdxl-c3lier", "diffusers-sdxl", 560),
        ("musubi-wan14b", "comfy-wan14b", 400),
        ("musubi-wan14b", "diffusers-wan14b", 400),
    ],
)
def test_the_styles_of_a_model_agree(one, other, shared):
    model = LISTS[one][0]
    first, second = (in_one_spelling(model, modules(x)) for x in (one, other))
    both = first.keys() & second.keys()
    assert len(both) == shared
    assert {x: first[x] for x in both} == {x: second[x] for x in both}


def test_the_two_codes_of_a_model_have_the_same_layers():
    first, second = (
        in_one_spelling("flux", {WHOLE[x][1] + n: size for n, size in modules(x).items()})
        for x in ("bfl-flux-model", "diffusers-flux-model")
    )
    assert first == second
    assert len(first) == 504


def test_a_name_is_in_one_row_or_its_size_decides():
    for model in MODELS.values():
        for part, names in model.tables.items():
            for row in table(names[0]).rows:
                ratio = row.ratio or 1
                size = 64 * ratio.numerator, 64 * ratio.denominator
                name = row.original.replace("#", "7").replace(".", "_")
                assert len(model.pieces(model.prefixes["kohya"][part] + name, size)) == len(
                    row.parts
                )


def test_halves_change_places_where_the_codes_order_them_otherwise():
    def swapped(model: str, name: str, m: int) -> list[bool]:
        return [piece.swapped for piece in MODELS[model].pieces(name, (m, 64))]

    last = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"
    assert swapped("sd3", last, 2 * 64) == [True]
    assert swapped("sd3", last, 6 * 64) == [False]
    assert swapped("sd3", last, 3 * 64) == []
    for model in ("flux", "hunyuanvideo", "sd3"):
        assert swapped(model, "diffusion_model.final_layer.adaLN_modulation.1", 128) == [True]
        assert swapped(model, "transformer.norm_out.linear", 128) == [False]


@pytest.mark.parametrize(
    ("name", "m"),
    [
        ("lora_unet_double_blocks_0_img_attn_qk", 192),
        ("lora_unet_double_blocks_00_img_attn_qkv", 192),
        ("lora_unet_double_blocks_img_attn_qkv", 192),
        ("lora_unet_double.blocks_0_img_attn_qkv", 192),
        ("lora_unet_double_blocks_0_img_attn_qkv", 191),
        ("lora_unet_double_blocks_0_img_attn_qkv_", 192),
        ("lora_unet_single_blocks_0_linear1", 9 * 64),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 64),
        ("diffusion_model.double_blocks_0_img_attn_qkv", 192),
        ("transformer.single_transformer_blocks.0.attn.to_q.processor", 64),
        ("", 64),
    ],
)
def test_what_is_in_no_table_is_not_guessed(name, m):
    assert MODELS["flux"].pieces(name, (m, 64)) == ()


def test_sizes_tell_two_models_with_one_name_apart():
    """FLUX.2 calls its layers as FLUX.1 does, of other sizes."""

    def known(name: str, m: int, n: int) -> list[str]:
        found = {k: model.pieces(f"lora_unet_{name}", (m, n)) for k, model in MODELS.items()}
        return [k for k, pieces in found.items() if pieces]

    assert known("double_blocks_0_img_mlp_0", 4 * 64, 64) == ["flux"]
    assert known("double_blocks_0_img_mlp_0", 6 * 64, 64) == ["flux2"]
    assert known("single_blocks_0_linear1", 9 * 64, 64) == ["flux2"]
    assert known("single_blocks_0_linear1", 7 * 64, 64) == ["flux", "hunyuanvideo"]
    assert known("single_blocks_0_linear2", 64, 4 * 64) == ["flux2"]
    assert known("double_blocks_0_img_attn_qkv", 3 * 64, 64) == ["flux", "flux2", "hunyuanvideo"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lora_unet_double_blocks_57_img_attn_qkv", "transformer.transformer_blocks.57.attn.to_q"),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "transformer.transformer_blocks.0"),
        ("lycoris_single_transformer_blocks_3_attn_to_k", "transformer.single_transformer_blocks"),
        ("double_blocks.0.processor.qkv_lora2", "transformer.transformer_blocks.0.attn.add_q_proj"),
        ("lora_te3_encoder_block_3_layer_1_DenseReluDense_wi_0", "text_encoder_2.encoder.block.3"),
        ("lora_te2_encoder_block_3_layer_0_SelfAttention_q", "text_encoder_2.encoder.block.3"),
        ("lora_te1_encoder_layers_3_mlp_fc1", "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
        ("single_blocks.5.linear1", "transformer.single_transformer_blocks.5.attn.to_q"),
    ],
)
def test_other_spellings_are_known(name, found):
    of_three = "qkv" in name
    size = (7 * 64 if "linear1" in name else 3 * 64 if of_three else 64, 64)
    assert MODELS["flux"].pieces(name, size)[0].name.startswith(found)


@pytest.mark.slow
def test_the_tables_are_those_of_the_script(tmp_path):
    script = [sys.executable, str(ROOT / "tools/name_tables.py"), str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True)
    written = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    folder = ROOT / "domerge_fast/formats/names"
    assert written == {path.name: path.read_text("utf-8") for path in folder.glob("*.txt")}
