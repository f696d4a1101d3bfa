"""Files of different tools are merged together, and written for any of them: what the tools' own
readers make of that is the sum of what they make of the inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.make import random_factors, write_adapter
from support.modules import modules
from torch import Tensor

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.formats.names.join import joined
from domerge_fast.storage.safetensors_file import SafetensorsFile

WEIGHTS = (1.0, -0.5)
ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "musubi": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "comfy": (".lora_A.weight", ".lora_B.weight"),
}
SUFFIX = ".safetensors"


def file_of(
    path: Path, name: str, rank: int, among: Iterable[str] = ("",), scale: int = 96
) -> Path:
    """A file with the modules of a list, those that have one of these in their names, all sizes
    over `scale`; kohya's with alphas."""
    kind = name.partition("-")[0]
    down, up = ENDINGS[kind]
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for module, sizes in modules(name).items():
        if any(part in module for part in among):
            m, n = (max(1, size // scale) for size in sizes)
            tensors[module + down] = torch.randn(rank, n, generator=generator)
            tensors[module + up] = torch.randn(m, rank, generator=generator)
            if kind in ("kohya", "musubi"):
                tensors[f"{module}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def seen(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What every update makes of the same inputs, in float64."""
    found = {}
    for name, (a, b) in factors.items():
        x = torch.randn(a.shape[1], 3, generator=torch.Generator().manual_seed(len(name)))
        found[name] = b.double() @ (a.double() @ x.double())
    return found


def summed(found: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    wanted: dict[str, Tensor] = {}
    for weight, updates in zip(WEIGHTS, found):
        for name, update in updates.items():
            wanted[name] = wanted.get(name, 0) + weight * update
    return wanted


def check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert_close(found[name], update, 1e-6, name=name)


def in_one_spelling(*paths: Path) -> list[dict[str, Tensor]]:
    """What each file's modules do, by diffusers' names."""
    adapters, _ = joined([dm.load(path) for path in paths])
    return [
        seen({n: (x.scaling * a.factors(n)[0], a.factors(n)[1]) for n, x in a.modules.items()})
        for a in adapters
    ]


PAIRS = [
    ("kohya-flux", "diffusers-flux"),
    ("kohya-sd3-medium", "diffusers-sd3-medium"),
    ("kohya-sdxl-c3lier", "diffusers-sdxl"),
    ("musubi-wan14b", "diffusers-wan14b"),
    ("musubi-wan14b", "comfy-wan14b"),
]


@pytest.mark.parametrize("style", ["kohya", "diffusers", "comfyui"])
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_files_of_two_tools_are_merged_and_written_for_any(one, other, style, tmp_path):
    first = file_of(tmp_path / f"one{SUFFIX}", one, 2)
    second = file_of(tmp_path / f"two{SUFFIX}", other, 4)
    out = tmp_path / f"out{SUFFIX}"
    merged = dm.merge([first, second], "linear", weights=WEIGHTS, output=out, format=style)
    *inputs, found = in_one_spelling(first, second, out)
    wanted = summed(inputs)
    absent = found.keys() - wanted.keys()
    assert not any(found[name].any() for name in absent)
    check({name: x for name, x in found.items() if name not in absent}, wanted)
    assert dm.load(out).style.format == style
    assert any("different names for the same modules" in note for note in merged.report.notes)
    name = merged.names[len(merged.names) // 2]
    in_memory = dm.merge([first, second], "linear", weights=WEIGHTS, format=style)
    assert_close(merged.delta(name), in_memory.delta(name), 1e-6, name=name)


def by_diffusers(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, float] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of a state dict as diffusers has it after its conversion, in its names of today."""
    found = {}
    for key, a in tensors.items():
        if down := re.search(r"\.lora_A|[._]lora\.down", key):
            name = key[: down.start()].replace(".processor.", ".")
            name = name + ".0" if name.endswith("to_out") else name
            up = down[0].replace("lora_A", "lora_B").replace("down", "up")
            told = alphas or {}
            alpha = told.get(f"{key}.alpha", told.get(f"{name}.alpha", len(a)))
            found[name] = alpha / len(a) * a, tensors[key.replace(down[0], up)]
    return found


def test_diffusers_reads_a_file_for_kohya_as_the_sum_of_flux(tmp_path):
    """Its reader has the sizes of the real model as constants: a few blocks."""
    from diffusers.loaders import FluxLoraLoaderMixin

    blocks = [f"blocks{x}" for x in ("_0_", ".0.", "_18_", ".18.", "_37_", ".37.")]
    one = file_of(tmp_path / f"one{SUFFIX}", "kohya-flux", 2, blocks, 1)
    other = file_of(tmp_path / f"two{SUFFIX}", "diffusers-flux", 3, blocks, 1)
    out = tmp_path / f"out{SUFFIX}"
    dm.merge([one, other], "linear", weights=WEIGHTS, output=out, format="kohya")

    def read(path: Path) -> dict[str, Tensor]:
        state = FluxLoraLoaderMixin.lora_state_dict(load_file(path), return_alphas=True)
        return seen(by_diffusers(*state))

    check(read(out), summed([read(one), read(other)]))
    assert len(read(out)) == 2 * 14 + 3 * 6


def test_diffusers_reads_a_file_for_kohya_as_the_sum_of_sdxl(tmp_path):
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader

    one = file_of(tmp_path / f"one{SUFFIX}", "kohya-sdxl-c3lier", 2, ["transformer_blocks"])
    other = file_of(tmp_path / f"two{SUFFIX}", "diffusers-sdxl", 3)
    out = tmp_path / f"out{SUFFIX}"
    dm.merge([one, other], "linear", weights=WEIGHTS, output=out, format="kohya")

    def read(path: Path) -> dict[str, Tensor]:
        config = SimpleNamespace(layers_per_block=2)
        return seen(by_diffusers(*Loader.lora_state_dict(load_file(path), unet_config=config)))

    check(read(out), summed([read(one), read(other)]))
    assert len(read(out)) == 700


def test_the_command_converts_a_file(tmp_path):
    one = file_of(tmp_path / f"one{SUFFIX}", "kohya-flux", 2)
    out = tmp_path / f"out{SUFFIX}"
    assert (
        cli.main(["merge", str(one), "--method", "linear", "-o", str(out), "--format", "comfyui"])
        == 0
    )
    assert all(
        key.startswith(("diffusion_model.", "text_encoders.clip_l.")) for key in load_file(out)
    )
    before, after = in_one_spelling(one, out)
    check(after, before)


def test_fused_modules_are_padded_to_unless_ragged(tmp_path):
    """But by ComfyUI, which scales every module by itself."""
    given = [file_of(tmp_path / f"one{SUFFIX}", "diffusers-flux", 2, ["transformer."])]
    out = tmp_path / f"out{SUFFIX}"
    merged = dm.merge(given, "linear", output=out, format="bare")
    assert {len(x) for key, x in load_file(out).items() if "lora_A" in key} == {4 * 2}
    assert any("fused of others have rank 8 at most" in note for note in merged.report.notes)
    for options in ({"format": "bare", "ragged": True}, {"format": "comfyui"}):
        merged = dm.merge(given, "linear", output=out, overwrite=True, **options)
        ranks = {len(x) for key, x in load_file(out).items() if "lora_A" in key}
        assert ranks >= {2, 3 * 2, 4 * 2}
        assert not any("fused of others" in note for note in merged.report.notes)


def test_x_flux_and_peft_join_kohya_s(tmp_path):
    g = torch.Generator().manual_seed(5)
    xlabs = {
        f"{name}.{side}.weight": torch.randn(shape, generator=g)
        for name in ("double_blocks.0.processor.qkv_lora1", "single_blocks.0.processor.qkv_lora")
        for side, shape in (("down", (4, 32)), ("up", (96, 4)))
    }
    save_file(xlabs, tmp_path / f"xlabs{SUFFIX}")
    blocks = ["double_blocks_0_", "single_blocks_0_"]
    kohya = file_of(tmp_path / f"kohya{SUFFIX}", "kohya-flux", 2, blocks)
    sizes = {"transformer_blocks.0.attn.to_v": (32, 32), "norm_out.linear": (64, 32)}
    peft = write_adapter(tmp_path / "peft", random_factors(sizes, 3))
    inputs = tmp_path / f"xlabs{SUFFIX}", kohya, peft
    for given, out, written in (
        (inputs, tmp_path / f"one{SUFFIX}", "kohya"),
        (inputs[::-1], tmp_path / "two", "peft"),
    ):
        merged = dm.merge(given, "linear", output=out)
        assert merged.report.recipe.format == written
        *found, of_merge = in_one_spelling(*given, out)
        names = {name for one in found for name in one}
        check(of_merge, {n: torch.stack([x[n] for x in found if n in x]).sum(0) for n in names})


def test_of_a_fused_module_only_first_rows_are_read_before_its_turn(tmp_path, monkeypatch):
    one = dm.load(file_of(tmp_path / f"one{SUFFIX}", "kohya-flux", 2))
    two = dm.load(file_of(tmp_path / f"two{SUFFIX}", "diffusers-flux", 2))
    shapes = []
    read = SafetensorsFile.read

    def seen_by(self, begin, dtype, shape):
        shapes.append(tuple(shape))
        return read(self, begin, dtype, shape)

    monkeypatch.setattr(SafetensorsFile, "read", seen_by)
    joined([one, two])
    assert set(shapes) == {(1, 2)}
    assert len(shapes) == 2 * 19 * 3 + 38 * 4
