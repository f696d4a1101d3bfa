"""DoRA in single files, with bases of image models, against LyCORIS' own weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from safetensors.torch import save_file
from support.close import assert_close
from support.single_file import tensors_of
from torch import Tensor, nn

import domerge_fast as dm
from domerge_fast import AdapterError, OptionError

LAYERS = {
    "attn1": nn.Linear(20, 24),
    "in_layers": nn.Conv2d(20, 24, 3, padding=1),
    "proj_in": nn.Conv2d(24, 20, 1),
    "text": nn.Linear(16, 20),
}
KOHYA = {
    "attn1": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "in_layers": "lora_unet_input_blocks_1_0_in_layers_2",
    "proj_in": "lora_unet_input_blocks_4_1_proj_in",
    "text": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
}
ONE_FILE = {
    "attn1": "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "in_layers": "model.diffusion_model.input_blocks.1.0.in_layers.2",
    "proj_in": "model.diffusion_model.input_blocks.4.1.proj_in",
    "text": "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
}
FOLDER = {
    "attn1": "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "in_layers": "unet/down_blocks.0.resnets.0.conv1",
    "proj_in": "unet/down_blocks.1.attentions.0.proj_in",
    "text": "text_encoder/text_model.encoder.layers.0.mlp.fc1",
}


@pytest.fixture
def layers():
    torch.manual_seed(0)
    for layer in LAYERS.values():
        layer.reset_parameters()
    return LAYERS


def decomposed(kind: type, layer: nn.Module, seed: int, **options: object) -> nn.Module:
    """A DoRA of LyCORIS around a layer, with random values, in float64."""
    torch.manual_seed(seed)
    given = {"lora_dim": 2, "alpha": 3.0, "weight_decompose": True} | options
    made = kind("x", layer, **given)
    for key, x in made.named_parameters():
        if not key.startswith("org_module"):
            x.data = 0.5 * torch.randn_like(x).abs().float() + 0.1
    return made.double().requires_grad_(False)


def wanted(made: nn.Module, weight: Tensor) -> Tensor:
    """W' - W by LyCORIS, in float64."""
    if isinstance(made, LoConModule):
        update = made.make_weight() * made.scale
    else:
        update = made.get_weight(made.shape)
    whole = weight.double() + update.double().reshape(weight.shape)
    return made.apply_weight_decompose(whole) - weight.double()


def file_of(path: Path, made: Mapping[str, nn.Module]) -> Path:
    tensors = {
        f"{name}.{key}": x.float().contiguous()
        for name, module in made.items()
        for key, x in module.custom_state_dict().items()
    }
    save_file(tensors, path)
    return path


def one_file(path: Path, weights: Mapping[str, Tensor]) -> Path:
    tensors = {f"{key}.weight": x.contiguous() for key, x in weights.items()}
    save_file({**tensors, "first_stage_model.decoder.conv_in.weight": torch.ones(3, 3)}, path)
    return path


def folder_of(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """As diffusers saves a pipeline; the weights of its main part in shards."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, x in weights.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[f"{name}.weight"] = x.contiguous()
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({"_class_name": "X"}))
    for part, tensors in parts.items():
        (path / part).mkdir()
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        if part.startswith("text"):
            save_file(tensors, path / part / f"{stem}.safetensors")
            save_file(tensors, path / part / f"{stem}.fp16.safetensors")
            continue
        where = {}
        for k, (name, x) in enumerate(tensors.items()):
            where[name] = f"{stem}-{k}.safetensors"
            save_file({name: x}, path / part / where[name])
        index = {"weight_map": where}
        (path / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("kind", [LoConModule, LohaModule])
@pytest.mark.parametrize("form", ["one file", "folder"])
def test_updates_are_those_of_lycoris(form, kind, by_output, layers, tmp_path):
    """Uncut they are written whole; in the base a kernel of 1 x 1 may be a matrix."""
    made = {
        KOHYA[n]: decomposed(kind, x, k, wd_on_out=by_output)
        for k, (n, x) in enumerate(layers.items())
    }
    adapter = file_of(tmp_path / "dora.safetensors", made)
    weights = {n: x.weight.detach() for n, x in layers.items()}
    given = weights | {"proj_in": weights["proj_in"].flatten(1)}
    if form == "one file":
        base = one_file(tmp_path / "base.safetensors", {ONE_FILE[n]: x for n, x in given.items()})
    else:
        base = folder_of(tmp_path / "base", {FOLDER[n]: x for n, x in given.items()})
    out = tmp_path / "out.safetensors"
    merged = dm.merge([adapter], "linear", base=base, weights=[-0.5], scale=1.0, output=out)
    found = tensors_of(out)
    assert any("4 modules are DoRA" in note for note in merged.report.notes)
    assert found.keys() == {f"{name}.diff" for name in KOHYA.values()}
    for name, weight in weights.items():
        update = -0.5 * wanted(made[KOHYA[name]], weight)
        ours = found[f"{KOHYA[name]}.diff"]
        assert_close(ours.double().reshape(update.shape), update, 1e-6)
        assert float(update.norm() / weight.norm()) > 0.05


def test_a_dora_is_merged_with_others_and_cut(layers, tmp_path):
    """With a plain file of other names: of diffusers."""
    name = KOHYA["attn1"]
    made = decomposed(LoConModule, layers["attn1"], 1, wd_on_out=False)
    dora = file_of(tmp_path / "dora.safetensors", {name: made})
    a, b = torch.randn(3, 20), torch.randn(24, 3)
    other = "unet." + FOLDER["attn1"].partition("/")[2]
    plain = {f"{other}.lora_A.weight": a, f"{other}.lora_B.weight": b}
    save_file(plain, tmp_path / "plain.safetensors")
    weight = layers["attn1"].weight.detach()
    base = one_file(tmp_path / "base.safetensors", {ONE_FILE["attn1"]: weight})
    given = {"base": base, "format": "kohya", "scale": 1.0, "base_model": "sdxl"}
    files = [dora, tmp_path / "plain.safetensors"]
    out = tmp_path / "out.safetensors"
    dm.merge(files, "linear", output=out, rank=20, **given)
    found = tensors_of(out)
    assert set(found) == {f"{name}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    update = wanted(made, weight) + b.double() @ a.double()
    ours = found[f"{name}.lora_up.weight"].double() @ found[f"{name}.lora_down.weight"].double()
    assert_close(ours, update, 1e-5)


FUSED = {
    "lora_unet_double_blocks_0_img_attn_qkv": ((36, 12), "double_blocks.0.img_attn.qkv"),
    "lora_unet_single_blocks_0_linear1": ((84, 12), "single_blocks.0.linear1"),
    "lora_unet_final_layer_adaLN_modulation_1": ((24, 12), "final_layer.adaLN_modulation.1"),
}
SPLIT = {
    "transformer/transformer_blocks.0.attn.to_q": (0, slice(0, 12)),
    "transformer/transformer_blocks.0.attn.to_k": (0, slice(12, 24)),
    "transformer/transformer_blocks.0.attn.to_v": (0, slice(24, 36)),
    "transformer/single_transformer_blocks.0.attn.to_q": (1, slice(0, 12)),
    "transformer/single_transformer_blocks.0.attn.to_k": (1, slice(12, 24)),
    "transformer/single_transformer_blocks.0.attn.to_v": (1, slice(24, 36)),
    "transformer/single_transformer_blocks.0.proj_mlp": (1, slice(36, 84)),
}


def dora_of(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    tensors = {}
    for k, (name, (m, n)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(k)
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, n, generator=generator),
            f"{name}.lora_up.weight": torch.randn(m, 2, generator=generator),
            f"{name}.dora_scale": torch.rand(m, 1, generator=generator) + 0.5,
        }
    save_file(tensors, path)
    return path


def test_fused_modules_find_their_parts(tmp_path):
    """FLUX.1 as Black Forest Labs have it and as diffusers has it: rows of q, k, v and the MLP one
    after the other, the halves of the last layer in the other order."""
    adapter = dora_of(tmp_path / "x.safetensors", {n: shape for n, (shape, _) in FUSED.items()})
    whole = [torch.randn(shape) for shape, _ in FUSED.values()]
    originals = {key: x for (_, key), x in zip(FUSED.values(), whole)}
    one = one_file(tmp_path / "flux.safetensors", originals)
    parts = {name: whole[k][rows] for name, (k, rows) in SPLIT.items()}
    parts["transformer/norm_out.linear"] = torch.cat([whole[2][12:], whole[2][:12]])
    found = []
    for base in (one, folder_of(tmp_path / "flux", parts)):
        out = tmp_path / f"{len(found)}.safetensors"
        dm.merge([adapter], "linear", base=base, output=out)
        found.append(tensors_of(out))
    assert found[0].keys() == found[1].keys() == {f"{name}.diff" for name in FUSED}
    stored = tensors_of(adapter)
    for weight, name in zip(whole, FUSED):
        one, other = (x[f"{name}.diff"] for x in found)
        assert torch.equal(one, other)
        a, b = (stored[f"{name}.lora_{side}.weight"].double() for side in ("down", "up"))
        after = weight.double() + b @ a
        after = stored[f"{name}.dora_scale"] * after / after.norm(dim=1, keepdim=True)
        assert_close(one.double(), after - weight.double(), 1e-6)


NAME = KOHYA["attn1"]


def refused(error: type, tmp_path: Path, said: str, base: Path | None, **changed: Tensor) -> None:
    tensors = {
        f"{NAME}.lora_down.weight": torch.ones(2, 20),
        f"{NAME}.lora_up.weight": torch.ones(24, 2),
        f"{NAME}.dora_scale": torch.ones(24, 1),
    }
    save_file({**tensors, **changed}, tmp_path / "x.safetensors")
    with pytest.raises(error) as caught:
        dm.merge(
            [tmp_path / "x.safetensors"], "linear", base=base, output=tmp_path / "o.safetensors"
        )
    assert said in str(caught.value)
    assert not (tmp_path / "o.safetensors").exists()


def language(folder: Path) -> Path:
    folder.mkdir()
    save_file({"model.x.weight": torch.ones(24, 20)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


GOOD = {ONE_FILE["attn1"]: torch.ones(24, 20)}


def test_what_has_no_weight_is_one_line(tmp_path):
    base = one_file(tmp_path / "base.safetensors", GOOD)
    where = "give its base (base, --base): one file, or a folder of diffusers"
    refused(AdapterError, tmp_path, where, None)
    said = "give its base as one safetensors file, or a folder of diffusers"
    refused(AdapterError, tmp_path, said, language(tmp_path / "language"))
    for k, shape in enumerate([(24, 21), (23, 20)]):
        other = one_file(tmp_path / f"{k}.safetensors", {ONE_FILE["attn1"]: torch.ones(shape)})
        said = "is a DoRA of what the base has no weight for"
        refused(AdapterError, tmp_path, said, other)
    other = one_file(tmp_path / "other.safetensors", {ONE_FILE["text"]: torch.ones(24, 20)})
    refused(AdapterError, tmp_path, "is a DoRA of a weight that the base", other)
    in_fp8 = {ONE_FILE["attn1"]: torch.ones(24, 20).to(torch.float8_e4m3fn)}
    other = one_file(tmp_path / "fp8.safetensors", in_fp8)
    refused(AdapterError, tmp_path, "that the base has as float8_e4m3fn", other)
    for shape in ((23, 1), (1, 19), (24, 2), (1, 20, 2), ()):
        changed = {f"{NAME}.dora_scale": torch.ones(shape)}
        refused(AdapterError, tmp_path, "which fits no weight [24, 20]", base, **changed)
    strange = {
        f"lora_unet_other.{x}": torch.ones(4, 4) for x in ("lora_down.weight", "lora_up.weight")
    }
    strange["lora_unet_other.dora_scale"] = torch.ones(4, 1)
    refused(
        AdapterError, tmp_path, "module 'lora_unet_other': is a DoRA of a module", base, **strange
    )
    alone = {"lora_unet_other.dora_scale": torch.ones(4, 1)}
    refused(AdapterError, tmp_path, "but no A (lora_down, lora_A)", base, **alone)


def test_a_base_without_weights_or_with_two_is_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "model_index.json").write_text("{}")
    refused(OptionError, tmp_path, "without weights in safetensors", empty)
    (empty / "unet").mkdir()
    for name in ("a", "b"):
        save_file({"x.weight": torch.ones(2, 2)}, empty / "unet" / f"{name}.safetensors")
    refused(OptionError, tmp_path, "has several files of weights (a.safetensors, b.safe", empty)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"xxxx")
    refused(OptionError, tmp_path, "is truncated or no safetensors file", damaged)


def test_a_pipeline_is_no_base_to_merge_into(tmp_path):
    base = one_file(tmp_path / "base.safetensors", GOOD)
    adapter = dm.from_tensors({"x": (torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(
        OptionError, match="is the base of an image or video model; write an adapter"
    ):
        dm.merge([adapter], "linear", form="model", base=base, output=tmp_path / "out")
