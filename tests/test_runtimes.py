"""What programs that load adapters demand: of merges before they start, and of files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import distance
from support.make import PREFIX, lora_tensors, random_factors, write_adapter
from support.merges import at_one

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.errors import OptionError, Unmet
from domerge_fast.formats import FORMATS
from domerge_fast.runtimes import RUNTIMES

ROOT = Path(__file__).parents[1]
ATTENTION = "model.layers.{}.self_attn.{}_proj"
Q, K, V = (ATTENTION.format(0, x) for x in "qkv")
SHAPES = {Q: (24, 20), K: (12, 20), V: (12, 20), "model.layers.0.mlp.up_proj": (30, 20)}
SERVERS = ("vllm", "sglang", "llama.cpp", "trtllm")
IMAGES = ("comfyui", "diffusers", "kohya")


def of(folder: Path, name: str, shapes=SHAPES, rank: int = 4, **given) -> Path:
    return write_adapter(folder / name, random_factors(shapes, rank, seed=rank), **given)


def told(folder: Path, runtime: str) -> list[str]:
    return [f"{miss.what}: {miss.why}" for miss in dm.check(folder, runtime).misses]


def refused(folder: Path, *adapters: Path, **given) -> list[str]:
    """The lines of a merge that is refused; nothing is written."""
    with pytest.raises(Unmet) as caught:
        at_one(adapters, "linear", output=folder / "out", **given)
    assert not (folder / "out").exists()
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.misses)
    assert all(line.startswith(f"runtime {given['runtime']!r}: ") for line in lines)
    return lines


# The table


def serving_table() -> str:
    """The demands as docs/serving.md has them."""
    found = dm.list_runtimes()
    demands = next(iter(found.values())).demands
    rows = [["", *found], ["---"] * (len(found) + 1)]
    rows += [[demand, *(x.demands[demand] for x in found.values())] for demand in demands]
    table = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    sources = [f"- `{name}`: {x.title}; {x.source}" for name, x in found.items()]
    return "\n".join([table, "", *sources])


def test_the_page_has_the_table():
    """Where it differs, what is printed goes between the marks."""
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- demands -->\n(.*)\n<!-- end demands -->", text, re.S)
    assert shown
    print(serving_table())
    assert shown[1] == serving_table()


def test_every_runtime_takes_a_format_that_is_written():
    for runtime in RUNTIMES.values():
        assert FORMATS[runtime.formats[0]].write
        assert set(runtime.formats) <= set(FORMATS)
        assert runtime.source
        assert runtime.ranks == () or runtime.flag


@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name not in IMAGES])
def test_what_is_made_for_a_runtime_is_what_it_takes(runtime, tmp_path):
    given = [
        of(tmp_path, "a", rank=5, use_rslora=True),
        of(tmp_path, "b", {Q: SHAPES[Q], V: SHAPES[V]}, alpha_pattern={"q_proj": 7}),
    ]
    merged = at_one(given, "linear", output=tmp_path / "out", runtime=runtime)
    assert dm.check(tmp_path / "out", runtime).ok
    assert merged.report.recipe.runtime == runtime
    again = dm.run(dm.Recipe.read(tmp_path / "out", tmp_path), output=tmp_path / "again")
    assert again.report.recipe == merged.report.recipe
    expected = at_one(given, "linear")
    for name in expected.names:
        assert distance(again.delta(name), expected.delta(name)) < 1e-6


@pytest.mark.parametrize("runtime", IMAGES)
def test_a_lora_of_an_image_model_is_made_for_its_programs(runtime, tmp_path):
    block = "transformer.single_transformer_blocks.11"
    shapes = {f"{block}.attn.to_{x}": (24, 24) for x in "qkv"} | {f"{block}.proj_mlp": (96, 24)}
    tensors = lora_tensors(random_factors(shapes, 3), prefix="")
    save_file(tensors, tmp_path / "a.safetensors")
    given = [tmp_path / "a.safetensors"]
    out = tmp_path / "out.safetensors"
    taken = RUNTIMES[runtime].formats
    assert dm.check(given[0], runtime).ok == ("diffusers" in taken)
    merged = at_one(given, "linear", output=out, runtime=runtime)
    assert dm.check(out, runtime).ok
    assert merged.report.recipe.format == ("diffusers" if "diffusers" in taken else taken[0])
    assert merged.report.notes == tuple(n for n in merged.report.notes if "vLLM" not in n)
    for folder in (of(tmp_path, "peft"), tmp_path / "a.safetensors"):
        said = [miss for miss in dm.check(folder, "vllm").misses if miss.remedy == "--format peft"]
        assert bool(said) == (folder.suffix == ".safetensors")


# Demands


@pytest.mark.parametrize(
    ("rank", "flag"), [(8, "--max-lora-rank 8"), (9, "--max-lora-rank 16"), (513, None)]
)
def test_the_largest_rank(rank, flag, tmp_path):
    folder = of(tmp_path, "a", {Q: (600, 600)}, rank)
    found = dm.check(folder, "vllm")
    if flag:
        assert found.notes == (f"written with rank {rank}: serve it with vLLM's {flag}",)
        return
    assert told(folder, "vllm") == ["rank 513: vLLM 0.33 serves 512 at most"]
    [line] = refused(tmp_path, folder, runtime="vllm")
    expected = "runtime 'vllm': rank 513: vLLM 0.33 serves 512 at most; --rank 512 cuts it"
    assert line == expected
    at_one([folder], "linear", runtime="vllm", rank=512, output=tmp_path / "cut")
    assert dm.check(tmp_path / "cut", "vllm").ok


def test_scales_that_a_runtime_takes_otherwise(tmp_path):
    rslora = of(tmp_path, "a", use_rslora=True)
    pattern = of(tmp_path, "b", alpha_pattern={"q_proj": 8})
    for folder, wrong in ((rslora, ("sglang", "llama.cpp")), (pattern, SERVERS[1:])):
        for runtime in SERVERS:
            found = [line for line in told(folder, runtime) if "scale" in line]
            assert bool(found) == (runtime in wrong), (folder, runtime)
    [line] = told(rslora, "sglang")
    assert line == f"{sorted(SHAPES)[0]} and 3 more (scaled by 2): " + (
        "SGLang 0.5.23 scales by lora_alpha / r, 1"
    )


def test_ranks_that_differ(tmp_path):
    factors = random_factors(SHAPES, 4) | random_factors({V: SHAPES[V]}, 2)
    own = {"r": 4, "lora_alpha": 4, "rank_pattern": {"v_proj": 2}}
    even = write_adapter(tmp_path / "even", factors, **own, alpha_pattern={"v_proj": 2})
    assert told(even, "vllm") == []
    assert told(even, "sglang") == ["ranks from 2 to 4: SGLang 0.5.23 takes one for all modules"]
    assert "lora_alpha / own rank, 2" in told(even, "llama.cpp")[0]
    alike = write_adapter(tmp_path / "alike", factors, **own)  # alpha / own rank is right
    assert told(alike, "llama.cpp") == []
    for runtime in SERVERS[1:]:
        [line] = refused(tmp_path, even, runtime=runtime, ragged=True)
        assert "ranks from 2 to 4" in line
        assert line.endswith("leave --ragged out")
    merged = at_one([even], "linear", runtime="sglang", energy=0.9, output=tmp_path / "energy")
    assert len({len(a) for a in factors_of(tmp_path / "energy").values()}) == 1
    assert len({r.rank for r in merged.report.modules.values()}) > 1
    at_one([even], "linear", runtime="vllm", ragged=True, output=tmp_path / "ragged")
    assert dm.check(tmp_path / "ragged", "vllm").ok


def factors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: x for key, x in tensors.items() if "lora_A" in key}


def test_target_modules_are_a_list_where_one_is_wanted(tmp_path):
    names = {"lm_head": (9, 8), "draft.lm_head": (9, 8)}
    folder = of(tmp_path, "a", names, target_modules="draft.lm_head|lm_head")
    assert told(folder, "sglang") == [
        "target_modules is a regular expression: SGLang 0.5.23 takes a list"
    ]
    assert told(folder, "vllm") == []
    at_one([folder], output=tmp_path / "out", runtime="sglang")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(names)


@pytest.mark.parametrize(
    ("name", "takers"),
    [
        ("score.weight", ("vllm",)),
        ("model.embed_tokens.weight", ("trtllm",)),
        ("model.embed_tokens.base_layer.weight", SERVERS),
        ("model.norm.weight", ()),
    ],
)
def test_tensors_saved_whole(name, takers, tmp_path):
    module = name.split(".")[-2] if "base_layer" not in name else None
    saved = {"modules_to_save": [module]} if module else {}
    folder = of(tmp_path, "a", carried={name: torch.zeros(3, 2)}, **saved)
    for runtime in SERVERS:
        found = [line for line in told(folder, runtime) if "saved whole" in line]
        assert bool(found) == (runtime not in takers), runtime
    if len(takers) < len(SERVERS):
        lines = refused(tmp_path, folder, runtime="llama.cpp")
        assert [f"{name} (saved whole)" in line for line in lines] == [True]
        assert "--whole drop" in lines[0]
        at_one([folder], runtime="llama.cpp", whole="drop", output=tmp_path / "dropped")
        assert dm.check(tmp_path / "dropped", "llama.cpp").ok


def test_kinds_of_layers(tmp_path):
    a, b = torch.zeros(2, 3, 3, 3), torch.zeros(4, 2, 1, 1)
    adapter = write_adapter(tmp_path / "a", {"conv": (a, b)})
    for runtime in SERVERS:
        assert any("conv (conv2d)" in line for line in told(adapter, runtime))
    assert told(adapter, "peft") == []
    embedding = write_adapter(
        tmp_path / "e",
        random_factors({"model.embed_tokens": (8, 50)}, 2),
        embeddings=["model.embed_tokens"],
    )
    assert told(embedding, "sglang") == []
    assert any("(embedding)" in line for line in told(embedding, "trtllm"))


def test_experts(tmp_path):
    stem = "model.layers.0.mlp.experts"
    tensors = {
        f"{PREFIX}{stem}.base_layer.lora_A.weight": torch.randn(2 * 3, 8),
        f"{PREFIX}{stem}.base_layer.lora_B.weight": torch.randn(12, 2 * 3),
        f"{PREFIX}{stem}.lora_A.weight": torch.randn(2 * 3, 6),
        f"{PREFIX}{stem}.lora_B.weight": torch.randn(8, 2 * 3),
    }
    parameters = [f"{stem}.gate_up_proj", f"{stem}.down_proj"]
    folder = of(tmp_path, "a", rank=2, target_parameters=parameters)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | tensors, path)
    assert told(folder, "vllm") == []
    assert any("(target_parameters)" in line for line in told(folder, "llama.cpp"))
    one = of(tmp_path, "b", {f"{stem}.7.gate_proj": (8, 6), f"{stem}.7.down_proj": (6, 8)})
    [line] = told(one, "vllm")
    assert line == f"{stem}.7.up_proj (not adapted): vLLM 0.33 takes experts with all of them"


def test_a_head_that_is_too_large_and_modules_outside_of_layers(tmp_path):
    folder = of(tmp_path, "a", {"lm_head": (258049, 2)}, 1)
    assert told(folder, "vllm") == ["lm_head (258049 rows): vLLM 0.33 takes 258048 at most"]
    assert told(folder, "sglang") == []
    assert any("lm_head (in none)" in line for line in told(folder, "trtllm"))


def test_replicated_layers(tmp_path):
    folder = of(tmp_path, "a", layer_replication=[[0, 1], [0, 1]])
    assert [told(folder, runtime) == [] for runtime in (*SERVERS, "peft")] == [False] * 4 + [True]


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_fields_that_a_config_lacks(field, tmp_path):
    folder = of(tmp_path, "a", rank=8)  # PEFT's default, as lora_alpha is
    config = json.loads((folder / "adapter_config.json").read_text())
    del config[field]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for runtime in (*SERVERS, "peft"):
        asks = field in RUNTIMES[runtime].stated
        assert any(f"without {field}" in line for line in told(folder, runtime)) == asks
        assert asks or told(folder, runtime) == []
        at_one([folder], runtime=runtime, output=tmp_path / runtime)
        assert dm.check(tmp_path / runtime, runtime).ok


def test_names_that_comfyui_passes_over(tmp_path):
    blocks = "diffusion_model.double_blocks.0"
    for name, said in (
        ("img_attn.proj", "its modules are those of FLUX.1"),
        ("none", "in no table"),
    ):
        tensors = lora_tensors(random_factors({f"{blocks}.{name}": (24, 24)}, 3), prefix="")
        save_file(tensors, tmp_path / "a.safetensors")
        found = dm.check(tmp_path / "a.safetensors", "comfyui")
        assert found.ok
        assert any(said in note for note in found.notes)
        assert dm.check(tmp_path / "a.safetensors", "kohya").notes == ()


# What is filled with zeros


@pytest.mark.parametrize("beside", ["k_proj", "another layer", "base"])
def test_sglang_gets_zeros_for_values_that_no_adapter_has(beside, tmp_path):
    shapes = {Q: SHAPES[Q]}
    if beside == "k_proj":
        shapes[K] = SHAPES[K]
    if beside == "another layer":
        shapes |= {ATTENTION.format(1, x): SHAPES[n] for x, n in (("q", Q), ("v", V))}
    folder = of(tmp_path, "a", shapes)
    assert any(f"{V} (not adapted)" in line for line in told(folder, "sglang"))
    given = {"base": str(base(tmp_path))} if beside == "base" else {}
    merged = at_one([folder], runtime="sglang", output=tmp_path / "out", **given)
    assert any(note.startswith(f"{V}: factors of zero") for note in merged.report.notes)
    assert dm.check(tmp_path / "out", "sglang").ok
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{V}.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((4, 20), (12, 4))
    assert not a.any()
    assert not b.any()
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted([*shapes, V])
    assert sorted(merged.names) == sorted(shapes)
    again = at_one([tmp_path / "out"], "linear")
    assert distance(again.delta(Q), merged.delta(Q)) < 1e-6
    assert not again.delta(V).any()
    in_memory = at_one([folder], runtime="sglang", **given)
    in_memory.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], x) for key, x in tensors.items())


def base(folder: Path) -> Path:
    (folder / "base").mkdir()
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "base/model.safetensors", metadata={"format": "pt"})
    (folder / "base/config.json").write_text("{}")
    return folder / "base"


def test_a_shape_that_nothing_says_is_asked_for(tmp_path):
    folder = of(tmp_path, "a", {Q: SHAPES[Q]})
    [line] = refused(tmp_path, folder, runtime="sglang")
    assert line.endswith(
        f"{V} (not adapted): SGLang 0.5.23 joins q, k and v and needs q and v; "
        "--for writes zeros, if their shape is known: --base FOLDER says it"
    )


# Choosing, and the commands


def test_all_misses_are_told(tmp_path, capsys):
    saved = {"carried": {"score.weight": torch.zeros(2, 3)}, "modules_to_save": ["score"]}
    folder = of(tmp_path, "a", {Q: SHAPES[Q]}, **saved)
    lines = refused(tmp_path, folder, runtime="sglang")
    assert len(lines) == 2
    flags = ["merge", str(folder), "-o", str(tmp_path / "out"), "--for", "sglang"]
    assert cli.main(flags) == 2
    error = capsys.readouterr().err
    assert error == "domerge-fast: error: " + "\n".join(lines) + "\n"
    assert not (tmp_path / "out").exists()


def test_a_merge_for_a_runtime_by_the_command(tmp_path, capsys):
    folder = of(tmp_path, "a")
    out = tmp_path / "out"
    flags = ["merge", str(folder), "--for", "vllm", "--method", "linear"]
    assert cli.main([*flags, "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["runtime"] == "vllm"
    assert report["notes"] == ["written with rank 4: serve it with vLLM's --max-lora-rank 8"]
    assert cli.main([*flags, "-o", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()


def test_check_by_the_command(tmp_path, capsys):
    good, bad = of(tmp_path, "good"), of(tmp_path, "bad", use_rslora=True)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["check", str(good), "--for", "llama.cpp"]) == 0
    assert capsys.readouterr().out == f"{good}: llama.cpp takes it\n"
    assert cli.main(["check", str(bad), "--for", "llama.cpp"]) == 2
    shown = capsys.readouterr()
    printed = " ".join(shown.out.split())
    assert "(scaled by 2): llama.cpp scales by lora_alpha / own rank, 1; merge it alone" in printed
    assert f"'domerge-fast merge {bad} -o OUT --for llama.cpp' writes what it takes" in printed
    assert shown.err.splitlines() == [
        f"domerge-fast: error: {str(bad)!r} is not what llama.cpp takes; demands not met: 1"
    ]
    assert cli.main(["check", str(bad), "--for", "llama.cpp", "--json"]) == 2
    plain = json.loads(capsys.readouterr().out)
    assert (plain["ok"], plain["runtime"], plain["format"]) == (False, "llama.cpp", "peft")
    assert plain["misses"][0].keys() == {"what", "why", "remedy"}
    assert cli.main(["check", str(tmp_path / "nothing"), "--for", "vllm"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["check", str(good), "--for", "vlm"]) == 2
    assert "did you mean 'vllm'?" in capsys.readouterr().err
    assert cli.main(["check", str(good)]) == 2
    assert "--for" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_list_by_the_command(capsys):
    assert cli.main(["runtimes", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert list(plain) == list(RUNTIMES)
    assert plain["vllm"]["demands"]["rows of lm_head"] == "258048"
    assert cli.main(["runtimes"]) == 0
    printed = capsys.readouterr().out
    assert all(x.title in printed for x in RUNTIMES.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"runtime": "vlm"}, "did you mean 'vllm'?"),
        ({"runtime": 3}, "3 is no text"),
        ({"runtime": "vllm", "form": "deltas"}, "'vllm' loads adapters, 'deltas' is none"),
        ({"target": "vllm"}, "it is 'runtime' here"),
    ],
)
def test_what_cannot_be_asked_for(given, said, tmp_path):
    with pytest.raises(OptionError) as caught:
        dm.merge([of(tmp_path, "a")], "linear", **given)
    assert said in str(caught.value)


def test_a_format_that_a_runtime_does_not_take(monkeypatch, tmp_path):
    other = dataclasses.replace(FORMATS["peft"], name="other")
    monkeypatch.setitem(FORMATS.own, "other", other)
    folder = of(tmp_path, "a")
    [line] = refused(tmp_path, folder, runtime="vllm", format="other")
    assert line == "runtime 'vllm': format 'other': vLLM 0.33 takes 'peft'; --format peft"
    adapter = dm.load(folder)
    styled = dataclasses.replace(adapter, style=dataclasses.replace(adapter.style, format="other"))
    assert at_one([styled], "linear").report.recipe.format == "other"
    assert at_one([styled], "linear", runtime="vllm").report.recipe.format == "peft"


KIND_OF = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w2"),
    "whole updates (.diff)": ("diff",),
    "DoRA": ("lora_up.weight", "lora_down.weight", "dora_scale"),
}


@pytest.mark.parametrize("kind", KIND_OF)
def test_other_adapters_than_lora_are_for_those_that_take_them(kind, tmp_path):
    tensors = {f"lora_unet_x.{part}": torch.ones(4, 4) for part in KIND_OF[kind]}
    tensors |= {key: torch.ones(4, 1) for key in tensors if "dora" in key}
    save_file(tensors, tmp_path / "x.safetensors")
    said = f"modules of {kind}: kohya's sd-scripts does not apply it as it was trained"
    assert told(tmp_path / "x.safetensors", "kohya") == [said]
    assert dm.check(tmp_path / "x.safetensors", "comfyui").ok == (kind != "DoRA")


def test_a_dora_of_peft_is_for_those_that_take_it(tmp_path):
    given = of(tmp_path, "dora", use_dora=True)
    tensors = load_file(given / "adapter_model.safetensors")
    for name, (m, _) in SHAPES.items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.ones(m)
    save_file(tensors, given / "adapter_model.safetensors")
    assert dm.check(given, "peft").ok
    [miss] = dm.check(given, "vllm").misses
    assert miss.what == "modules of DoRA"
    assert miss.remedy == "merge it alone for it, with its base (--for, --base, --rank)"
