"""Adapters with other names for the same modules are merged as one, and written in any style."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from support.make import Factors, random_factors
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter, Style
from domerge_fast.errors import AdapterError, OptionError
from domerge_fast.formats.names.join import joined
from domerge_fast.formats.names.refit import refit
from domerge_fast.formats.target import Layout

N = 24
"""Inputs of the blocks."""

Rows = list[tuple[str, int, int]]
FLUX: dict[str, Rows] = {
    "double_blocks.0.img_attn.qkv": [
        ("transformer_blocks.0.attn.to_q", 0, N),
        ("transformer_blocks.0.attn.to_k", N, 2 * N),
        ("transformer_blocks.0.attn.to_v", 2 * N, 3 * N),
    ],
    "double_blocks.0.img_attn.proj": [("transformer_blocks.0.attn.to_out.0", 0, N)],
    "single_blocks.11.linear1": [
        ("single_transformer_blocks.11.attn.to_q", 0, N),
        ("single_transformer_blocks.11.attn.to_k", N, 2 * N),
        ("single_transformer_blocks.11.attn.to_v", 2 * N, 3 * N),
        ("single_transformer_blocks.11.proj_mlp", 3 * N, 7 * N),
    ],
    "single_blocks.11.modulation.lin": [("single_transformer_blocks.11.norm.linear", 0, 3 * N)],
    "final_layer.adaLN_modulation.1": [("norm_out.linear", 0, 2 * N)],
}
"""What diffusers calls rows of Black Forest Labs' modules; of the last one it has the halves in
the other order."""


def adapter(style: str, prefix: str, factors: Factors, scaling: float = 0.5, **more) -> Adapter:
    named = {prefix + name: pair for name, pair in factors.items()}
    made = dm.from_tensors(named, scaling, name=f"of {style}", **more)
    return dataclasses.replace(made, style=Style(style, style))


def kohya(factors: Factors, **more) -> Adapter:
    named = {name.replace(".", "_"): pair for name, pair in factors.items()}
    return adapter("kohya", "lora_unet_", named, **more)


def diffusers(factors: Factors, **more) -> Adapter:
    return adapter("diffusers", "transformer.", factors, **more)


def fused(seed: int = 0, rank: int = 3) -> Factors:
    return random_factors({n: (rows[-1][2], N) for n, rows in FLUX.items()}, rank, seed=seed)


def split(seed: int = 1, rank: int = 2) -> Factors:
    sizes = {name: (stop - start, N) for rows in FLUX.values() for name, start, stop in rows}
    return random_factors(sizes, rank, seed=seed)


def of_fused(factors: Factors) -> dict[str, Tensor]:
    """Updates of diffusers' modules in float64, by the table above."""
    found = {}
    for name, (a, b) in factors.items():
        whole = b.double() @ a.double()
        if name == "final_layer.adaLN_modulation.1":
            whole = torch.cat([whole[N:], whole[:N]])
        found |= {part: whole[start:stop] for part, start, stop in FLUX[name]}
    return found


def of_adapter(found: Adapter) -> dict[str, Tensor]:
    def update(name: str) -> Tensor:
        a, b = (x.double() for x in found.factors(name))
        return found.modules[name].scaling * (b @ a)

    return {name.removeprefix("transformer."): update(name) for name in found.modules}


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-12, msg=name)


def test_a_fused_adapter_is_the_same_in_parts():
    one, other = fused(), split()
    (first, second), notes = joined([kohya(one), diffusers(other)])
    check_same(of_adapter(first), {n: 0.5 * x for n, x in of_fused(one).items()})
    check_same(
        of_adapter(second), {n: 0.5 * (b.double() @ a.double()) for n, (a, b) in other.items()}
    )
    assert {m.rank for m in first.modules.values()} == {3}
    assert notes == [
        "the adapters have different names for the same modules: merged in those of diffusers' "
        "FLUX.1, fused ones of 1 adapter split"
    ]


def test_what_was_fused_of_parts_has_their_ranks_again():
    parts = split(rank=2)
    rows = FLUX["single_blocks.11.linear1"]
    pairs = [parts[name] for name, *_ in rows if not name.endswith("to_k")]
    b = torch.zeros(7 * N, 2 * len(pairs))
    k = 0
    for name, start, stop in rows:
        if not name.endswith("to_k"):
            b[start:stop, 2 * k : 2 * k + 2] = parts[name][1]
            k += 1
    whole = {"single_blocks.11.linear1": (torch.cat([a for a, _ in pairs]), b)}
    (first, _), _ = joined([kohya(whole), diffusers(parts)])
    wanted = {n: parts[n] for n, *_ in rows if not n.endswith("to_k")}
    check_same(
        of_adapter(first), {n: 0.5 * (b.double() @ a.double()) for n, (a, b) in wanted.items()}
    )
    assert {m.rank for m in first.modules.values()} == {2}


def test_adapters_of_one_style_are_left_as_they_are():
    strange = {"lora_unet_no_table_has_this": (torch.ones(2, 8), torch.ones(8, 2))}
    given = [adapter("kohya", "", strange), kohya(fused())]
    assert joined(given) == (given, [])


@pytest.mark.parametrize("bad", ["double_blocks.0.img_attn.qvk", "double_blocks.0.img_attn.qkv"])
def test_a_name_that_is_in_no_table_is_refused(bad):
    factors = fused() | {bad: (torch.ones(2, N), torch.ones(3 * N + 1, 2))}
    with pytest.raises(AdapterError) as caught:
        joined([kohya(factors), diffusers(split())])
    text = str(caught.value)
    assert "adapter 'of kohya'" in text
    assert bad.replace(".", "_") in text
    assert "in no table of modules" in text
    assert "'kohya'" in text
    assert "FLUX.1" in text
    assert "merge adapters of one format" in text


def stacked(*found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of updates by module."""
    names = dict.fromkeys(name for one in found for name in one)
    return {n: torch.stack([one[n] for one in found if n in one]).sum(0) for n in names}


def test_fused_modules_are_written_as_diffusers_has_them(tmp_path):
    one, other = fused(0), fused(1)
    del other["single_blocks.11.linear1"]
    given = [kohya(one, scaling=1.0), kohya(other, scaling=2.0)]
    merged = dm.merge(given, "linear", output=tmp_path / "out", format="peft")
    wanted = stacked(of_fused(one), {n: 2 * x for n, x in of_fused(other).items()})
    found = of_adapter(dm.load(tmp_path / "out"))
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=1e-6 * update.norm().item())
    in_memory = dm.merge(given, "linear", format="peft")
    for name in merged.names:
        kept = in_memory.delta(name)
        torch.testing.assert_close(merged.delta(name), kept, rtol=0, atol=1e-5)


def test_a_merge_in_memory_is_saved_the_same(tmp_path):
    given = [kohya(fused()), diffusers(split())]
    dm.merge(given, "linear", output=tmp_path / "streamed", format="peft")
    dm.merge(given, "linear", format="peft").save(tmp_path / "saved")
    one, other = (tmp_path / x / "adapter_model.safetensors" for x in ("streamed", "saved"))
    assert one.read_bytes() == other.read_bytes()


def onetrainer(factors: Factors) -> Adapter:
    named = {name.replace(".", "_"): pair for name, pair in factors.items()}
    return adapter("kohya", "lora_transformer_", named)


def test_two_spellings_of_one_kind_of_names_are_joined():
    (first, second), notes = joined([kohya(fused()), onetrainer(split())])
    assert first.modules.keys() == second.modules.keys()
    assert len(notes) == 1
    apart = {"transformer_blocks.0.norm1.linear": (torch.ones(2, N), torch.ones(6 * N, 2))}
    given = [kohya(fused()), onetrainer(apart)]
    assert joined(given) == (given, [])


def test_a_kind_of_base_model_does_not_stand_against_its_name():
    named = fused(), split()
    one = kohya(named[0], base_model="flux1")
    other = dataclasses.replace(
        dm.from_tensors(named[1], base_model="black-forest-labs/FLUX.1-dev"), style=Style("peft")
    )
    found, _ = joined([one, other])
    assert [a.config.base_model_name_or_path for a in found] == [
        None,
        "black-forest-labs/FLUX.1-dev",
    ]
    found, _ = joined([one, diffusers(named[1])])
    assert [a.config.base_model_name_or_path for a in found] == ["flux1", None]


def written(given: list[Adapter], style: str, base_model: str | None = None) -> Factors:
    """Factors by the names of a style, from a merge that is the sum of adapters of one style."""
    layouts = {
        name: Layout(name, x.kind, x.m, x.a_shape[1:], sum(a.modules[name].rank for a in given))
        for name, x in given[0].modules.items()
    }
    made = refit(given, layouts, style, base_model)
    found: Factors = {}

    def add(name: str, a: Tensor, b: Tensor) -> None:
        assert len(a) <= made.layouts[name].largest_rank
        assert (len(b), a.shape[1]) == (made.layouts[name].m, made.layouts[name].inputs[0])
        found[name] = a.clone(), b.clone()  # a writer writes at once

    take = made.sink(add)
    for name in layouts:
        pairs = [(a.factors(name), a.modules[name].scaling) for a in given]
        a = torch.cat([pair[0] for pair, _ in pairs])
        b = torch.cat([scaling * pair[1] for pair, scaling in pairs], 1)
        take(name, a, b)
        a.fill_(torch.nan), b.fill_(torch.nan)
    assert found.keys() == made.layouts.keys()
    return found


def updates(factors: Factors) -> dict[str, Tensor]:
    return {name: b.double() @ a.double() for name, (a, b) in factors.items()}


def test_parts_of_any_rank_are_fused_exactly():
    parts = split(rank=2)
    k, v = (f"transformer_blocks.0.attn.to_{x}" for x in "kv")
    parts |= random_factors({k: (N, N)}, 5) | random_factors({v: (N, N)}, 1)
    found = written([diffusers(parts, scaling=1.0)], "kohya", "flux1")
    wanted = {name: torch.cat([updates(parts)[n] for n, *_ in FLUX[name]]) for name in FLUX}
    last = "final_layer.adaLN_modulation.1"
    wanted[last] = torch.cat([wanted[last][N:], wanted[last][:N]])
    check_same(updates(found), {f"lora_unet_{n.replace('.', '_')}": x for n, x in wanted.items()})
    assert len(found["lora_unet_double_blocks_0_img_attn_qkv"][0]) == 2 + 5 + 1
    assert len(found["lora_unet_single_blocks_11_linear1"][0]) == 4 * 2
    assert len(found["lora_unet_final_layer_adaLN_modulation_1"][0]) == 2


def test_rows_of_parts_that_are_missing_are_zeros():
    parts = {n: x for n, x in split().items() if n.endswith(("attn.to_v", "0.attn.to_out.0"))}
    found = updates(written([diffusers(parts, scaling=1.0)], "comfyui", "flux1"))
    qkv, linear1 = (torch.zeros(k * N, N, dtype=torch.float64) for k in (3, 7))
    for whole, name in ((qkv, "transformer_blocks.0"), (linear1, "single_transformer_blocks.11")):
        whole[2 * N : 3 * N] = updates(parts)[f"{name}.attn.to_v"]
    check_same(
        found,
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": qkv,
            "diffusion_model.single_blocks.11.linear1": linear1,
            "diffusion_model.double_blocks.0.img_attn.proj": updates(parts)[
                "transformer_blocks.0.attn.to_out.0"
            ],
        },
    )


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "bare", "model"])
def test_there_and_back_is_the_same(style):
    one = fused()
    there = written([kohya(one, scaling=1.0)], style)
    prefix = {"diffusers": "transformer.", "comfyui": "diffusion_model."}.get(style, "")
    made = dm.from_tensors(there)
    back = written([dataclasses.replace(made, style=Style(style, style))], "kohya", "flux1")
    assert all(name.startswith(prefix) for name in there)
    for name, (a, b) in one.items():
        there, again = back[f"lora_unet_{name.replace('.', '_')}"]
        assert torch.equal(there, a)
        assert torch.equal(again, b)


HUNYUAN = {
    "txt_in.individual_token_refiner.blocks.1.self_attn_qkv": 3 * N,
    "double_blocks.3.txt_attn_qkv": 3 * N,
    "final_layer.adaLN_modulation.1": 2 * N,
    "single_blocks.39.linear1": 7 * N,
}


def test_hunyuanvideo_is_cut_as_its_checkpoint_is():
    """diffusers' own converter of LoRA files swaps halves of A too, and cuts A of the refiner."""
    one = random_factors({n: (m, N) for n, m in HUNYUAN.items()}, 8)
    found = updates(written([adapter("comfyui", "diffusion_model.", one, 1.0)], "diffusers"))
    whole = updates(one)
    refiner = "transformer.context_embedder.token_refiner.refiner_blocks.1.attn"
    wanted = {}
    for block, fused_name, names in (
        (refiner, "txt_in.individual_token_refiner.blocks.1.self_attn_qkv", "to_q to_k to_v"),
        (
            "transformer.transformer_blocks.3.attn",
            "double_blocks.3.txt_attn_qkv",
            "add_q_proj add_k_proj add_v_proj",
        ),
        (
            "transformer.single_transformer_blocks.39",
            "single_blocks.39.linear1",
            "attn.to_q attn.to_k attn.to_v proj_mlp",
        ),
    ):
        for k, name in enumerate(names.split()):
            stop = None if name == "proj_mlp" else (k + 1) * N
            wanted[f"{block}.{name}"] = whole[fused_name][k * N : stop]
    last = whole["final_layer.adaLN_modulation.1"]
    wanted["transformer.norm_out.linear"] = torch.cat([last[N:], last[:N]])
    check_same(found, wanted)


def test_what_may_be_of_two_models_is_refused_where_they_differ():
    """HunyuanVideo has all the names that these modules of FLUX.1 have in diffusers."""
    parts = {n: x for n, x in split().items() if "transformer_blocks" in n and "attn" in n}
    named = [diffusers(parts)]
    with pytest.raises(AdapterError) as caught:
        written(named, "comfyui")
    assert str(caught.value) == (
        "adapter 'of diffusers': may be of FLUX.1 or HunyuanVideo, by its modules; "
        "say base_model=... (flux.1, hunyuanvideo)"
    )
    flux = written(named, "comfyui", "black-forest-labs/FLUX.1-dev")
    video = written(named, "comfyui", "hunyuanvideo")
    assert "diffusion_model.double_blocks.0.img_attn.qkv" in flux
    assert "diffusion_model.double_blocks.0.img_attn_qkv" in video
    last = {n.replace(".0.", ".18.").replace(".11.", ".37."): x for n, x in parts.items()}
    assert "diffusion_model.double_blocks.18.img_attn.qkv" in written([diffusers(last)], "comfyui")
    last |= {n.replace(".0.", ".19.").replace(".11.", ".39."): x for n, x in parts.items()}
    assert "diffusion_model.double_blocks.18.img_attn_qkv" in written([diffusers(last)], "comfyui")
    assert written(named, "diffusers").keys() == {f"transformer.{name}" for name in parts}


def test_a_style_without_names_for_a_part_is_refused():
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (torch.ones(2, 8), torch.ones(32, 2))}
    both = {f"lora_unet_{n.replace('.', '_')}": pair for n, pair in fused().items()} | text
    with pytest.raises(OptionError, match="'model' has no name for 'text_encoder"):
        written([adapter("kohya", "", both)], "model")
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in written(
        [adapter("kohya", "", both)], "diffusers"
    )


def test_one_module_under_two_names_is_refused(tmp_path):
    pair = torch.ones(2, N), torch.ones(3 * N, 2)
    q = {"lora_transformer_transformer_blocks_0_attn_to_q": (torch.ones(2, N), torch.ones(N, 2))}
    both = adapter("kohya", "", {"lora_unet_double_blocks_0_img_attn_qkv": pair} | q)
    said = "are both 'transformer.transformer_blocks.0.attn.to_q'"
    with pytest.raises(AdapterError, match=said):
        joined([both, diffusers(split())])
    with pytest.raises(OptionError, match=said):
        dm.merge([both], "linear", output=tmp_path / "out", format="diffusers")
    assert not (tmp_path / "out").exists()
