"""One adapter in another format: the same factors, the same updates, nothing of the engine."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.make import Factors, random_factors, write_adapter
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Style
from domerge_fast.cli import main as cli
from domerge_fast.errors import AdapterError, DomergeError, OptionError, OutputError, Unmet

SHAPES = {f"model.layers.{k}.self_attn.{x}_proj": (24, 20) for k in range(2) for x in "qkv"}
Q = "model.layers.0.self_attn.q_proj"
BLOCK = "single_blocks.11"
FUSED = {f"{BLOCK}.linear1": (7 * 24, 24), f"{BLOCK}.modulation.lin": (72, 24)}


def update(adapter: dm.Adapter, name: str) -> Tensor:
    a, b = (x.double() for x in adapter.factors(name))
    return adapter.modules[name].scaling * (b @ a)


def updates(path: Path) -> dict[str, Tensor]:
    adapter = dm.load(path)
    return {name: update(adapter, name) for name in adapter.modules}


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative distance of an update."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - x).norm() / x.norm()) for n, x in expected.items())


def of_kohya(file: Path, alpha: float | None = 3.0, rank: int = 4, **metadata: str) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in random_factors(FUSED, rank).items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file, metadata=metadata)
    return file


def uneven(folder: Path, **more: object) -> Path:
    """Ranks 4 and 2, rsLoRA and a pattern: scales of three kinds."""
    factors: Factors = random_factors(SHAPES, 4) | random_factors({Q: SHAPES[Q]}, 2)
    given = {"r": 4, "lora_alpha": 7, "use_rslora": True, "alpha_pattern": {"k_proj": 3}}
    return write_adapter(folder, factors, **given, rank_pattern={Q: 2}, **more)


# PEFT


def test_factors_and_scales_are_kept_in_a_peft_folder(tmp_path):
    source = uneven(
        tmp_path / "a", carried={"score.weight": torch.ones(2, 3)}, modules_to_save=["score"]
    )
    done = dm.convert(source, tmp_path / "out", format="peft")
    before, after = (load_file(x / "adapter_model.safetensors") for x in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    given, found = dm.load(source), dm.load(tmp_path / "out")
    for name, module in given.modules.items():
        assert math.isclose(found.modules[name].scaling, module.scaling, rel_tol=1e-15)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["r"] == 4
    assert len(config["alpha_pattern"]) == 2
    assert done.modules == 6
    assert any("SGLang 0.5.23 scales by lora_alpha / r" in note for note in done.notes)


def test_peft_scales_a_converted_adapter_alike(tmp_path):
    peft = pytest.importorskip("peft")
    source = uneven(tmp_path / "a")
    dm.convert(source, tmp_path / "out", format="peft")

    def scales(folder: Path) -> dict[str, float]:
        class Attention(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for x in "qkv":
                    setattr(self, f"{x}_proj", torch.nn.Linear(20, 24, bias=False))

        layers = []
        for _ in range(2):
            layer = torch.nn.Module()
            layer.self_attn = Attention()
            layers.append(layer)
        net = torch.nn.Module()
        net.model = torch.nn.Module()
        net.model.layers = torch.nn.ModuleList(layers)
        config = peft.LoraConfig.from_pretrained(folder)
        config.base_model_name_or_path = None
        wrapped = peft.PeftModel(net, config, autocast_adapter_dtype=False)
        return {
            name: module.scaling["default"]
            for name, module in wrapped.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }

    before, after = scales(source), scales(tmp_path / "out")
    assert before.keys() == after.keys() != set()
    assert all(math.isclose(after[name], x, rel_tol=1e-15) for name, x in before.items())


def test_padding_is_kept(tmp_path):
    dm.merge([uneven(tmp_path / "a")], "linear", output=tmp_path / "padded")
    dm.convert(tmp_path / "padded", tmp_path / "out", format="peft")
    name = "adapter_model.safetensors"
    before, after = (load_file(tmp_path / x / name) for x in ("padded", "out"))
    assert all(torch.equal(after[key], x) for key, x in before.items())
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})


def test_a_pickle_becomes_safetensors(tmp_path):
    source = write_adapter(tmp_path / "a", random_factors(SHAPES, 4))
    tensors = load_file(source / "adapter_model.safetensors")
    torch.save(tensors, source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    dm.convert(source, tmp_path / "out", format="peft")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(found[key], x) for key, x in tensors.items())


# For runtimes


def test_one_scale_is_kept_for_a_runtime_that_reads_no_patterns(tmp_path):
    source = write_adapter(tmp_path / "a", random_factors(SHAPES, 4), lora_alpha=7, use_rslora=True)
    assert not dm.check(source, "sglang").ok
    done = dm.convert(source, tmp_path / "out", runtime="sglang")
    assert dm.check(tmp_path / "out", "sglang").ok
    assert done.notes == ()
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_alpha"] == 14
    before, after = (load_file(x / "adapter_model.safetensors") for x in (source, tmp_path / "out"))
    assert all(torch.equal(after[key], x) for key, x in before.items())


@pytest.mark.parametrize("runtime", ["sglang", "llama.cpp", "trtllm"])
def test_several_scales_go_into_the_factors_for_it(runtime, tmp_path):
    source = uneven(tmp_path / "a")
    done = dm.convert(source, tmp_path / "out", runtime=runtime)
    assert dm.check(tmp_path / "out", runtime).ok
    [note] = [note for note in done.notes if "the scale" in note]
    assert note.startswith("the scale (1.5 to 4.95) is in the factors, rounded to float32")
    assert far(updates(tmp_path / "out"), updates(source)) < 1e-6
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})


def test_what_a_runtime_does_not_take_is_told(tmp_path):
    saved = {"carried": {"score.weight": torch.ones(2, 3)}, "modules_to_save": ["score"]}
    source = write_adapter(tmp_path / "a", random_factors({Q: (600, 600)}, 513), **saved)
    with pytest.raises(Unmet) as caught:
        dm.convert(source, tmp_path / "out", runtime="sglang")
    assert len(caught.value.misses) == 2
    with pytest.raises(Unmet, match="rank 513"):
        dm.convert(source, tmp_path / "out", runtime="vllm")
    assert not (tmp_path / "out").exists()


# Files


def test_kohya_keeps_alphas_and_metadata(tmp_path):
    said = {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "4",
        "ss_network_alpha": "3",
        "ss_network_args": "{}",
        "ss_base_model_version": "flux1",
        "sshs_model_hash": "0",
    }
    source = of_kohya(tmp_path / "a.safetensors", **said)
    dm.convert(source, tmp_path / "out.safetensors", format="kohya")
    before, after = (load_file(tmp_path / f"{x}.safetensors") for x in ("a", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        found = file.metadata()
    assert {key: found.get(key) for key in said} == said | {"sshs_model_hash": None}
    with pytest.raises(OptionError, match="has no recipe in its metadata"):
        dm.Recipe.read(tmp_path / "out.safetensors")


@pytest.mark.parametrize("alpha", [3.0, 4.0, 8.0, None])
@pytest.mark.parametrize("format", ["diffusers", "comfyui", "peft", "bare"])
def test_there_and_back(format, alpha, tmp_path):
    source = of_kohya(tmp_path / "a.safetensors", alpha)
    name = "out" if format == "peft" else "out.safetensors"
    done = dm.convert(source, tmp_path / name, format=format)
    assert dm.load(tmp_path / name).style.format == format
    keeps = format in ("comfyui", "peft")
    told = [note for note in done.notes if note.startswith("the scale")]
    assert bool(told) == (not keeps and alpha not in (4.0, None))
    if told:
        assert ("exactly" in told[0]) == (alpha == 8)
    back_in = {"format": "kohya", "base_model": "flux.1"}
    dm.convert(tmp_path / name, tmp_path / "back.safetensors", **back_in)
    given, back = dm.load(source), dm.load(tmp_path / "back.safetensors")
    assert far(updates(tmp_path / "back.safetensors"), updates(source)) < (
        1e-15 if keeps or alpha != 3 else 1e-6
    )
    for module in given.modules:
        scaling = given.modules[module].scaling
        assert back.modules[module].scaling == (scaling if keeps else 1.0)
        if keeps:
            assert all(map(torch.equal, back.factors(module), given.factors(module)))


def test_fused_modules_of_several_scales_get_them_in_their_factors(tmp_path):
    names = [f"transformer.single_transformer_blocks.11.attn.to_{x}" for x in "qkv"]
    names.append("transformer.single_transformer_blocks.11.proj_mlp")
    sizes = dict(zip(names, ((24, 24), (24, 24), (24, 24), (96, 24))))
    factors = random_factors(sizes, 2)
    adapter = dm.from_tensors(factors, {n: k + 0.5 for k, n in enumerate(names)})
    adapter = dataclasses.replace(adapter, style=Style("diffusers", "diffusers"))
    done = dm.convert(adapter, tmp_path / "out.safetensors", format="comfyui")
    assert any("the scale (0.5 to 3.5) is in the factors" in note for note in done.notes)
    [found] = updates(tmp_path / "out.safetensors").values()
    expected = torch.cat([update(adapter, name) for name in names])
    assert float((found - expected).norm() / expected.norm()) < 1e-6


# MLX


@pytest.mark.parametrize(("alpha", "pattern"), [(7, {}), (7, {"k_proj": 3})])
def test_mlx_has_one_scale(alpha, pattern, tmp_path):
    source = write_adapter(
        tmp_path / "a", random_factors(SHAPES, 4), lora_alpha=alpha, alpha_pattern=pattern
    )
    done = dm.convert(source, tmp_path / "mlx", format="mlx")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == (1.0 if pattern else 1.75)
    assert bool(done.notes) == bool(pattern)
    assert far(updates(tmp_path / "mlx"), updates(source)) < (1e-6 if pattern else 1e-15)
    dm.convert(tmp_path / "mlx", tmp_path / "back", format="peft")
    assert far(updates(tmp_path / "back"), updates(tmp_path / "mlx")) == 0


# GGUF


@pytest.mark.parametrize("pattern", [{}, {"k_proj": 3}])
def test_gguf_has_one_alpha(pattern, tmp_path):
    pytest.importorskip("gguf")
    shapes = {f"model.layers.0.self_attn.{x}_proj": (8, 16) for x in "qkv"}
    given = {"lora_alpha": 7, "alpha_pattern": pattern}
    source = write_adapter(tmp_path / "a", random_factors(shapes, 4), **given)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 2,
        "model_type": "llama",
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    done = dm.convert(source, tmp_path / "out.gguf", format="gguf", base=tmp_path / "base")
    assert bool(done.notes) == bool(pattern)
    assert dm.check(tmp_path / "out.gguf", "llama.cpp").ok
    found = dm.load(tmp_path / "out.gguf")
    scale = 1.0 if pattern else 1.75
    assert {module.scaling for module in found.modules.values()} == {scale}
    assert far(updates(tmp_path / "out.gguf"), updates(source)) < (1e-6 if pattern else 1e-15)
    with pytest.raises(OptionError):
        dm.Recipe.read(tmp_path / "out.gguf")
    dm.convert(tmp_path / "out.gguf", tmp_path / "back", format="peft")
    assert far(updates(tmp_path / "back"), updates(tmp_path / "out.gguf")) == 0
    dm.convert(tmp_path / "out.gguf", tmp_path / "again.gguf", format="gguf")
    assert far(updates(tmp_path / "again.gguf"), updates(tmp_path / "out.gguf")) == 0


# What cannot be


@pytest.mark.parametrize(
    ("format", "given", "said"),
    [
        (
            "mlx",
            {"carried": {"score.weight": torch.ones(2, 3)}, "modules_to_save": ["score"]},
            "'mlx' holds no tensors saved whole",
        ),
        ("deltas", {}, "'deltas' is no format of adapters"),
        ("peft", {"embeddings": ["x"]}, None),
        (None, {}, "say one, or what it is for"),
        ("pfet", {}, "did you mean 'peft'?"),
    ],
)
def test_what_cannot_be_written_is_told(format, given, said, tmp_path):
    source = write_adapter(tmp_path / "a", random_factors({"x": (8, 6)}, 2), **given)
    if said is None:
        dm.convert(source, tmp_path / "out", format=format)
        return
    with pytest.raises(DomergeError) as caught:
        dm.convert(source, tmp_path / "out", format=format)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    if "carried" in given:
        dm.convert(source, tmp_path / "out", format=format, whole="drop")


def test_a_scale_that_a_dtype_does_not_hold(tmp_path):
    factors = random_factors({"x": (8, 6)}, 2, dtype=torch.float16)
    adapter = dm.from_tensors(factors, 1e5, name="large")
    with pytest.raises(AdapterError, match="does not fit float16; say another dtype"):
        dm.convert(adapter, tmp_path / "out.safetensors", format="diffusers")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_no_numbers(value, tmp_path):
    factors = random_factors(SHAPES, 4)
    factors[Q][1][3, 2] = value
    source = write_adapter(tmp_path / "a", factors)
    with pytest.raises(AdapterError, match=r"q_proj': NaN or an infinite value"):
        dm.convert(source, tmp_path / "out", format="mlx")
    assert not (tmp_path / "out").exists()


def test_the_source_and_what_others_wrote_stay(tmp_path):
    source = write_adapter(tmp_path / "a", random_factors(SHAPES, 4))
    with pytest.raises(OutputError):
        dm.convert(source, source, format="peft", force=True)
    dm.convert(source, tmp_path / "out", format="peft")
    with pytest.raises(OutputError):
        dm.convert(source, tmp_path / "out", format="peft")
    dm.convert(source, tmp_path / "out", format="peft", overwrite=True)
    card = (tmp_path / "out/README.md").read_text()
    assert "Converted by domerge_fast from `a`." in card
    assert "adapter_model.safetensors" in card
    with pytest.raises(OptionError):
        dm.Recipe.read(tmp_path / "out")


# The command


def test_by_the_command(tmp_path, capsys):
    source = of_kohya(tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    flags = ["convert", str(source), "-o", str(out)]
    assert cli.main([*flags, "--format", "diffusers"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the scale (0.75) is in the factors, rounded to float32" in printed
    assert f"5 modules written to {out} (diffusers)" in printed
    assert cli.main([*flags, "--format", "diffusers"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*flags, "--for", "comfyui", "--overwrite", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["path"], plain["format"], plain["modules"]) == (str(out), "kohya", 2)
    assert cli.main([*flags, "--overwrite"]) == 2
    assert "option 'format': is not given" in capsys.readouterr().err
    assert cli.main([*flags, "--for", "vllm", "--overwrite"]) == 2
    capsys.readouterr()
    assert cli.main([*flags, "--format", "kohya", "--overwrite", "-q"]) == 0
    assert capsys.readouterr().out == ""
