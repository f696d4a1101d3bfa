"""What diffusers saves is read as it means it, and what is written for it is what it loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import (
    FluxLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.single_file import metadata_of
from torch import Tensor

import domerge_fast as dm
from domerge_fast.errors import AdapterError

FILE = "pytorch_lora_weights.safetensors"
SMALL = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}


@dataclass(frozen=True)
class Family:
    """A small model, its part of a pipeline, what loads and saves, and modules to adapt."""

    make: Callable[[], torch.nn.Module]
    part: str
    loader: Any
    targets: list[str]
    alone: list[str]
    """Of a second adapter."""


FAMILIES = {
    "unet": Family(
        lambda: UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        "unet",
        StableDiffusionLoraLoaderMixin,
        ["to_q", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"],
        ["to_q", "to_k", "conv2"],
    ),
    "flux": Family(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            pooled_projection_dim=12,
            axes_dims_rope=(2, 2, 4),
            **SMALL,
        ),
        "transformer",
        FluxLoraLoaderMixin,
        ["to_q", "to_add_out", "proj_mlp", "norm1.linear"],
        ["to_q", "to_k", "proj_out"],
    ),
    "sd3": Family(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            out_channels=4,
            **SMALL,
        ),
        "transformer",
        SD3LoraLoaderMixin,
        ["to_q", "add_k_proj", "ff.net.2"],
        ["to_q", "to_v"],
    ),
}


def trained(family: Family, targets: list[str], rank: int, alpha: int, seed: int, **given: Any):
    """A model with a random adapter."""
    torch.manual_seed(seed)
    model = family.make()
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **given))
    for layer in layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    return model


def layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: x for name, x in model.named_modules() if isinstance(x, LoraLayer)}


def updates(model: torch.nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name: layer.get_delta_weight(adapter)
            for name, layer in layers(model).items()
            if adapter in layer.scaling
        }


def save(family: Family, model: torch.nn.Module, folder: Path, tells: bool) -> Path:
    """As diffusers saves it; tells: with PEFT's config in the metadata."""
    given = {f"{family.part}_lora_layers": get_peft_model_state_dict(model)}
    if tells:
        given[f"{family.part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    family.loader.save_lora_weights(folder, **given)
    return folder


def loaded(family: Family, place: Path) -> dict[str, Tensor]:
    """The updates after diffusers' own loading of a folder or file."""
    model = family.make()
    where = {"weight_name": FILE} if place.is_dir() else {}
    state, *_ = family.loader.lora_state_dict(place, return_lora_metadata=True, **where)
    assert not [key for key in state if "alpha" in key]
    load = getattr(family.loader, f"load_lora_into_{family.part}")
    without = {"network_alphas"} & inspect.signature(load).parameters.keys()
    load(state, **dict.fromkeys(without), **{family.part: model}, adapter_name="x")
    return updates(model, "x")


def same(got: dict[str, Tensor], wanted: dict[str, Tensor], part: str = "") -> None:
    assert got.keys() == {part + name for name in wanted}
    for name, update in wanted.items():
        assert_close(got[part + name].flatten(1), update.flatten(1), 1e-6, name=name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("one_file", [False, True])
def test_a_merge_is_what_diffusers_loads(name, one_file, tmp_path):
    family = FAMILIES[name]
    first = trained(family, family.targets, 4, 2, 1, alpha_pattern={"to_q": 6})
    second = trained(family, family.alone, 3, 3, 2)
    folders = [
        save(family, first, tmp_path / "first", tells=True),
        save(family, second, tmp_path / "second", tells=False),
    ]
    same(read(folders[0]), updates(first), f"{family.part}.")
    out = tmp_path / ("out.safetensors" if one_file else "out")
    merged = dm.merge(folders, "linear", weights=[1.0, -2.0], output=out)
    one, two = updates(first), updates(second)
    wanted = {n: one.get(n, 0) - 2 * two.get(n, 0) for n in {**one, **two}}
    same(loaded(family, out), wanted)
    assert [note for note in merged.report.notes if "no alpha" in note] == [
        "adapter 2 (second): no alpha: scale 1 assumed, as diffusers and ComfyUI do"
    ]


def read(folder: Path) -> dict[str, Tensor]:
    adapter = dm.load(folder)
    found = {}
    for name, module in adapter.modules.items():
        a, b = adapter.factors(name)
        found[name] = module.scaling * b.double() @ a.double()
    return found


def test_a_model_s_own_file_has_no_prefix(tmp_path):
    """Of `save_lora_adapter`: names of one model, its config as a whole in the metadata."""
    family = FAMILIES["flux"]
    model = trained(family, family.targets, 4, 2, 1, alpha_pattern={"to_q": 6})
    model.save_lora_adapter(tmp_path / "x")
    assert dm.load(tmp_path / "x").style.names == "bare"
    same(read(tmp_path / "x"), updates(model))
    dm.merge([tmp_path / "x"], "linear", output=tmp_path / "out")
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "out/lora.safetensors")
    again = family.make()
    again.load_lora_adapter(tmp_path / "out/lora.safetensors", prefix=None)
    same(updates(again, next(iter(again.peft_config))), updates(model))


def test_alphas_beside_a_config_are_refused(tmp_path):
    family = FAMILIES["flux"]
    folder = save(family, trained(family, ["to_q"], 4, 2, 1), tmp_path / "x", tells=True)
    with_alpha = load_file(folder / FILE)
    key = next(key for key in with_alpha if key.endswith(".lora_A.weight"))
    with_alpha[key.replace(".lora_A.weight", ".alpha")] = torch.tensor(2.0)
    save_file(with_alpha, folder / FILE, metadata_of(folder / FILE))
    with pytest.raises(
        AdapterError, match="has alphas and, in its metadata, lora_adapter_metadata"
    ):
        dm.load(folder)
