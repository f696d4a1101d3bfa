"""One recipe, from keywords, files and cards; a merge that is repeated by what stands beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.files import load_bytes, unchanged
from support.make import PAIR, random_factors, write_adapter, write_pair

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.recipe import Input, Recipe, Rule, parse
from domerge_fast.recipe.mergekit import mergekit

NAMES = tuple(sorted(PAIR))
ASKED: dict[str, Any] = {
    "method": "do",
    "gamma": 2.0,
    "weights": [1.0, -0.5],
    "scale": 0.7,
    "rank": 3,
    "pre": ["canonicalize"],
    "post": ["norm_match"],
    "dtype": "float16",
    "rules": [{"modules": "*.q_proj", "weights": [2.0, 1.0]}],
}


@pytest.fixture(autouse=True)
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters "a" and "b" in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    return ["a", "b"]


def base_model(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(9)
    tensors = {f"{n}.weight": torch.randn(shape, generator=generator) for n, shape in PAIR.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def updates(merged: dm.Merged) -> dict[str, torch.Tensor]:
    return {name: merged.delta(name) for name in merged.names}


# What is asked


def test_a_recipe_is_the_same_from_keywords_yaml_and_json():
    made = Recipe.make(adapters=["a", "b"], **ASKED)
    assert Recipe.of_plain(made.plain()) == made
    assert Recipe.of_plain(json.loads(json.dumps(made.plain()))) == made
    Path("r.json").write_text(json.dumps(made.plain()))
    Path("r.yml").write_text(yaml.safe_dump(made.plain()))
    here = dataclasses.replace(made, adapters=(Input("a"), Input("b")))
    assert Recipe.read("r.json") == Recipe.read("r.yml") == here
    assert (made.rules[0], made.options["gamma"]) == (Rule("*.q_proj", weights=(2.0, 1.0)), 2.0)


def test_a_recipe_is_what_merge_runs():
    expected = dm.merge(["a", "b"], **ASKED)
    found = dm.run(Recipe.make(adapters=["a", "b"], **ASKED))
    assert found.report.recipe == expected.report.recipe
    assert all(map(torch.equal, updates(found).values(), updates(expected).values()))


def test_paths_in_a_file_are_from_its_folder(tmp_path):
    Path("recipes").mkdir()
    Path("recipes/r.yml").write_text("adapters: [../a, ../b]\nmethod: linear\ntol: 1e-3\n")
    with pytest.raises(dm.OptionError, match="method 'linear' has no such option"):
        Recipe.read("recipes/r.yml")
    Path("recipes/r.yml").write_text("adapters: [../a, ../b]\nmethod: do\ntol: 1e-3\n")
    recipe = Recipe.read(tmp_path / "recipes" / "r.yml")
    assert recipe.options["tol"] == 1e-3
    assert dm.run(recipe).names == NAMES


WRONG: dict[str, tuple[str, str]] = {
    "no mapping": ("[1, 2]", "is no mapping of names to values"),
    "a key twice": ("method: do\nmethod: linear\n", "a key occurs twice in line 1 or below"),
    "an alias": ("weights: &w [1, 1]\nrules: *w\n", "line 2 has an alias"),
    "two documents": ("method: do\n---\nmethod: do\n", "found another document in line 2"),
    "a tag": ("!!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "no YAML": ("a: [1, 2\n", "in line"),
    "not UTF-8": ("b'\\xff'", "it is no text in UTF-8"),
    "JSON with NaN": ('{"scale": NaN}', "NaN is no number"),
    "JSON with a key twice": ('{"rank": 1, "rank": 2}', "a key occurs twice"),
    "an unknown name": ("metod: do\n", "method 'auto' has no such option"),
    "rank": ("rank: 0\n", "0 is too small; use at least 1"),
    "weights": ("weights: [1, x]\n", "'x' is not a finite number"),
    "one adapter": ("adapters: a\n", "is one adapter, not a list"),
    "a number": ("adapters: [3]\n", "'3' is no path; give one"),
    "sums": ("adapters: [{name: a, files: {x: 12}}]\n", "are no names with their SHA-256"),
    "a sum's path": ("adapters: [{name: a, files: {a/x: " + 64 * "0" + "}}]\n", "are no names"),
    "rules": ("rules: {modules: x}\n", "is no list"),
    "a rule": ("rules: [{rank: 2}]\n", "names no modules"),
    "a rule for nothing": ("rules: [{modules: x}]\n", "nothing is asked of 'x'"),
    "a rule's option": ("rules: [{modules: x, gamma: 2}]\n", "'gamma' of 'x' is no part of a rule"),
    "a rule's weights": ("rules: [{modules: x, weights: [0]}]\n", "all weights of 'x' are zero"),
    "form": ("form: model\n", "'model' needs the base model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_recipe_is_refused_in_one_line(name, tmp_path, capsys):
    text, words = WRONG[name]
    Path("r.yml").write_bytes(b"a: \xff" if name == "not UTF-8" else text.encode())
    with unchanged(tmp_path):
        assert cli.main(["run", "r.yml", "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_recipe_of_any_size_is_not_read(capsys):
    Path("r.yml").write_bytes(b"#" * 1_000_001)
    assert cli.main(["run", "r.yml", "-o", "out"]) == 2
    assert "at most 1000000 are read" in capsys.readouterr().err


def test_deep_yaml_is_refused():
    with pytest.raises(dm.OptionError, match="nested too deep"):
        parse(b"[" * 100_000, "r.yml")


# Rules


def test_modules_are_left_out(tmp_path):
    rules = [{"modules": "layers.[01].*", "leave_out": True}]
    merged = dm.merge(["a", "b"], "linear", rules=rules, output="out")
    assert merged.names == ("layers.2.q_proj", "layers.3.q_proj")
    plain = dm.merge(["a", "b"], "linear")
    for name in merged.names:
        assert torch.equal(merged.delta(name), plain.delta(name))
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(merged.names)


def test_a_module_has_weights_of_its_own():
    name = "layers.0.up_proj"
    rules = [{"modules": "*.up_proj", "weights": [3.0, -1.0]}]
    merged = dm.merge(["a", "b"], "linear", weights=[1.0, 2.0], rules=rules)
    everywhere = dm.merge(["a", "b"], "linear", weights=[3.0, -1.0])
    plain = dm.merge(["a", "b"], "linear", weights=[1.0, 2.0])
    assert torch.equal(merged.delta(name), everywhere.delta(name))
    for other in set(plain.names) - {name}:
        assert torch.equal(merged.delta(other), plain.delta(other))
    left = dm.merge(["a", "b"], "linear", rules=[{"modules": name, "weights": [1.0, 0.0]}])
    assert left.report[name].rank == 12


@pytest.mark.parametrize(
    "rule", [{"rank": 2}, {"energy": 0.5}, {"method": "tsvm", "power": 0.5}, {"method": "ties"}]
)
def test_modules_with_a_merge_of_their_own_are_merged_as_if_alone(rule):
    chosen = ["layers.0.q_proj", "layers.3.q_proj"]
    rules = [{"modules": "layers.[03].q_proj", **rule}]
    given = {"post": ["norm_match"], "ragged": True}
    merged = dm.merge(["a", "b"], "do", rules=rules, **given)
    left_out = [{"modules": name, "leave_out": True} for name in PAIR if name not in chosen]
    asked = {"method": "do", **given, **rule}
    alone = dm.merge(["a", "b"], rules=left_out, **asked)
    left_out = [{"modules": name, "leave_out": True} for name in chosen]
    rest = dm.merge(["a", "b"], "do", rules=left_out, **given)
    assert merged.names == NAMES
    for expected in (alone, rest):
        for name in expected.names:
            assert torch.equal(merged.delta(name), expected.delta(name)), name
            assert merged.report[name] == expected.report[name]
    assert rest.report.scale == merged.report.scale
    (note,) = [x for x in merged.report.notes if "by themselves" in x]
    method = rule.get("method", "do")
    expected_note = f"2 modules (layers.[03].q_proj) by themselves: {method}, scale"
    assert note == f"{expected_note} {alone.report.scale:g}"


def test_progress_goes_through_all_parts():
    seen: list[tuple[int, int]] = []
    rules = [{"modules": "*.up_proj", "method": "linear"}]
    dm.merge(["a", "b"], "tsvm", rules=rules, progress=lambda *x: seen.append(x))
    assert seen == [(k, 9) for k in range(1, 10)]


def test_weights_by_pattern_are_rules():
    by_pattern = {"*.up_proj": [3.0, -1.0], "layers.1.*": (0.5, 1)}
    rules = [{"modules": pattern, "weights": weights} for pattern, weights in by_pattern.items()]
    expected = dm.merge(["a", "b"], "linear", rules=rules)
    merged = dm.merge(["a", "b"], "linear", weights_for=by_pattern)
    assert merged.report.recipe == expected.report.recipe
    assert dm.Recipe.of_plain({"weights_for": by_pattern}).rules == expected.report.recipe.rules
    flags = ["--weights-for", "*.up_proj=3,-1", "--weights-for", "layers.1.*=.5,1"]
    assert cli.main(["merge", "a", "b", "-o", "out", "--method", "linear", *flags]) == 0
    assert dm.Recipe.read("out", ".").rules == expected.report.recipe.rules
    for name in expected.names:
        assert all(map(torch.equal, dm.load("out").factors(name), expected.factors(name)))
    dm.run(dm.Recipe.read("out", "."), output="again")
    same = "adapter_model.safetensors"
    assert Path("out", same).read_bytes() == Path("again", same).read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["x"], "'x' is no PATTERN=W,W"),
        (["=1,2"], "'=1,2' is no PATTERN=W,W"),
        (["x=1,"], "'x=1,' is no PATTERN=W,W"),
        (["*=0,0"], "all weights of '*' are zero"),
        (["*=1"], "1 weights for 2 adapters"),
        (["*.none=1,2"], "'*.none' matches no module"),
        (["*=1,2", "*=2,1"], "'*' is given twice"),
        (["*=1,2", "*.up_proj=2,1"], "two rules set another weights"),
    ],
)
def test_weights_by_pattern_that_cannot_be(flags, words, tmp_path, capsys):
    given = [word for flag in flags for word in ("--weights-for", flag)]
    with unchanged(tmp_path):
        assert cli.main(["merge", "a", "b", "-o", "out", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    with pytest.raises(dm.OptionError, match="is no mapping of patterns to weights"):
        dm.Recipe.make(weights_for=[1, 2])


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            [{"modules": "*.none", "rank": 2}],
            "'*.none' matches no module; there is, for one, 'layers.0.q_proj'",
        ),
        (
            [{"modules": "*", "rank": 2}, {"modules": "*.up_proj", "rank": 3}],
            "two rules set another rank for 'layers.0.up_proj'",
        ),
        ([{"modules": "*", "weights": [1, 2, 3]}], "3 weights for 2 adapters"),
        ([{"modules": "*", "leave_out": True}], "every module is left out"),
        ([{"modules": "*", "method": "linaer"}], "did you mean 'linear'?"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rules, words, tmp_path, capsys):
    with unchanged(tmp_path):
        assert cli.main(["merge", "a", "b", "-o", "out", "--rules", json.dumps(rules)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_two_rules_may_agree():
    rules = [{"modules": "*.q_proj", "rank": 2}, {"modules": "layers.0.*", "rank": 2}]
    merged = dm.merge(["a", "b"], "linear", rules=rules)
    assert {module.rank for module in merged.report.modules.values()} == {2}


# A merge that is repeated


FORMS: dict[str, dict[str, Any]] = {
    "adapter": {"method": "do", "weights": [1.0, -0.5]},
    "ragged": {"method": "tsvm", "energy": 0.9},
    "rules": {"rules": [{"modules": "*.up_proj", "method": "linear"}, ASKED["rules"][0]]},
    "deltas": {"form": "deltas", "method": "ties"},
    "model": {"form": "model", "base": "models/base"},
}


def outputs(folder: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(Path(folder).iterdir()):
        if path.name != "README.md":
            yield path.name, path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_card_repeats_its_merge_bitwise(form, tmp_path, monkeypatch, capsys):
    Path("models").mkdir()
    base_model(tmp_path / "models" / "base")
    dm.merge(["a", "b"], output="out", **FORMS[form])
    card = Path("out/README.md").read_text()
    assert str(tmp_path) not in card
    moved = tmp_path / "elsewhere" / "deep"
    moved.mkdir(parents=True)
    for old, new in (("a", "x"), ("b", "y"), ("models", "z")):
        shutil.move(old, moved / new)
    write_adapter(moved / "a", random_factors(PAIR, 12, seed=5))
    monkeypatch.chdir(moved.parent)
    for source in ("../out", "../out/README.md"):
        assert cli.main(["run", source, "--adapters", ".", "-o", "again", "--overwrite"]) == 0
        assert list(outputs("again")) == list(outputs("../out"))
    assert capsys.readouterr().err == ""


def test_a_card_has_the_sums_of_files(pair):
    import hashlib

    merged = dm.merge(pair)
    merged.save("saved")
    dm.merge(pair, output="written")
    for card in ("saved", "written"):
        recipe = Recipe.read(card, under=".")
        for name, adapter in zip(pair, recipe.adapters, strict=True):
            assert adapter.name == name
            assert set(adapter.files) == {"adapter_config.json", "adapter_model.safetensors"}
            for file, digest in adapter.files.items():
                assert hashlib.sha256(Path(name, file).read_bytes()).hexdigest() == digest


def test_a_merge_in_memory_whose_files_are_gone_is_saved_without_their_sums(pair):
    merged = dm.merge(pair)
    shutil.rmtree("b")
    merged.save("saved")
    text = Path("saved/README.md").read_text()
    assert "adapter 2 (b): its files have changed, and have no sums here" in text
    recipe = Recipe.of_plain(parse(text.encode(), "saved"))
    assert [bool(x.files) for x in recipe.adapters] == [True, False]


def test_an_adapter_that_has_changed_is_not_taken_for_what_was_merged(pair, tmp_path, capsys):
    dm.merge(pair, output="out")
    config = json.loads(Path("b/adapter_config.json").read_text())
    Path("b/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    for line in ("run out -o again", "run out --adapters . -o again"):
        with unchanged(tmp_path):
            assert cli.main(line.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert "'a' is not here as the recipe's files were; say below which" in said[0]
    assert "nothing under '.' has the files of 'b'; download it again" in said[1]


def test_a_base_that_has_changed_is_refused(pair, tmp_path, capsys):
    base_model(tmp_path / "base")
    dm.merge(pair, form="model", base="base", output="out")
    os.rename("base", "moved")
    line = "run out --adapters . -o again --base moved"
    assert cli.main(line.split()) == 0
    assert list(outputs("again")) == list(outputs("out"))
    tensors = {f"{n}.weight": torch.zeros(shape) for n, shape in PAIR.items()}
    save_file(tensors, "moved/model.safetensors")
    assert cli.main([*line.split(), "--overwrite"]) == 2
    assert "not here as the recipe's files were" in capsys.readouterr().err


def test_a_saved_recipe_runs_from_anywhere(pair, tmp_path, monkeypatch, capsys):
    line = "merge a b -o out --method do --gamma 0.5 --weights 1 2 --save-recipe r.yml"
    assert cli.main(line.split()) == 0
    assert cli.main([*line.split()[:-1], "r.yml"]) == 2
    assert "output 'r.yml': is there already" in capsys.readouterr().err
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert cli.main(["run", "../r.yml", "-o", "again"]) == 0
    assert load_bytes(Path("again")) == load_bytes(tmp_path / "out")


def test_recipe_show_prints_what_a_merge_was_made_by(pair, capsys):
    merged = dm.merge(pair, output="out", **ASKED)
    assert cli.main(["recipe", "show", "out"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == merged.report.recipe.plain()
    assert cli.main(["recipe", "show", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_a_run_has_to_be_told_where_to_write(capsys):
    Path("r.yml").write_text("adapters: [a, b]\n")
    assert cli.main(["run", "r.yml"]) == 2
    assert "option 'output': is not given" in capsys.readouterr().err


# Without a merge


@pytest.mark.parametrize(
    "given",
    [{}, {"rank": 2, "dtype": "bfloat16"}, {"form": "deltas"}, {"form": "model", "base": "base"}],
    ids=str,
)
def test_a_dry_run_tells_bytes_and_writes_nothing(given, pair, tmp_path, capsys):
    base_model(tmp_path / "base")
    Path("r.json").write_text(json.dumps({"adapters": pair, "method": "linear", **given}))
    with unchanged(tmp_path):
        assert cli.main(["run", "r.json", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["run", "r.json", "-o", "out", "-q"]) == 0
    written = sum(p.stat().st_size for p in Path("out").glob("*.safetensors"))
    assert 0 < found["written"] <= written < found["written"] + 5000
    factors = sum(dm.load(name).nbytes for name in pair)
    copied = sum(4 * m * n for m, n in PAIR.values()) if "base" in given else 0
    assert factors + copied <= found["read"] <= factors + copied + 64 * 20
    assert list(found["modules"]) == list(NAMES)
    assert set(found["modules"].values()) == ({2} if "rank" in given else {12, 20})
    ranks = {Path(name).name: span for name, span in found["adapters"].items()}
    assert ranks == {"a": [12, 12, 12], "b": [8, 8, 8]}
    assert found["memory"] > factors
    assert found["seconds"] > 0


def test_a_dry_run_of_merge_is_for_people_too(tmp_path, capsys):
    with unchanged(tmp_path):
        assert cli.main(["merge", "a", "b", "-o", "out", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was written" in shown
    assert "to write" in shown
    assert cli.main(["merge", "a", "b", "-o", "out", "--dry-run", "--save-recipe", "r.yml"]) == 2


# mergekit's recipes


KIT = """
merge_method: ties
base_model: base
dtype: bfloat16
parameters: {density: 0.5, int8_mask: true}
models:
  - model: base
  - model: base+a
    parameters: {weight: 0.5}
  - model: b
    parameters: {weight: 0.25}
"""


def test_a_recipe_of_mergekit_is_read():
    Path("kit.yml").write_text(KIT)
    recipe = Recipe.read("kit.yml")
    assert recipe == Recipe.make(
        method="ties",
        conventions="mergekit",
        density=0.5,
        adapters=["a", "b"],
        weights=[0.5, 0.25],
        scale=1.0,
        base_model="base",
        dtype="bfloat16",
    )
    assert dm.run(recipe).names == NAMES


def test_weights_of_its_linear_are_normalized():
    models = [{"model": x, "parameters": {"weight": w}} for x, w in (("a", 1), ("b", 3))]
    found = mergekit({"merge_method": "linear", "models": models})
    assert (found["method"], found["weights"], found["scale"]) == ("linear", [0.25, 0.75], 1.0)
    found = mergekit({"merge_method": "task_arithmetic", "models": models})
    assert found["weights"] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ties", "slerp", "'slerp' is read of linear, task_arithmetic,"),
        ("ties", "sce", "nothing here selects by variance"),
        ("dtype: bfloat16", "slices: []", "has no meaning for adapters"),
        ("weight: 0.5", "weight: [0.5, 1]", "'weight' differs by layer or by name"),
        ("weight: 0.5", "weight: 0.5, density: 0.1", "'density' differs between models"),
        ("density: 0.5", "normalize: false", "is here as by default"),
        ("weight: 0.5", "wait: 0.5", "'wait' is not read"),
        ("{weight: 0.5}", "{}", "a model has no 'weight'"),
    ],
)
def test_what_means_something_else_there_is_refused(old, new, words, capsys):
    Path("kit.yml").write_text(KIT.replace(old, new))
    assert cli.main(["run", "kit.yml", "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# docs/recipes.md


PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_the_recipes_shown_are_run(tmp_path, capsys):
    names = ("model.layers.0.mlp.up", "model.layers.2.mlp.up", "model.layers.2.q", "model.lm_head")
    for seed, name in enumerate(("math", "code")):
        factors = random_factors(dict.fromkeys(names, (40, 48)), 4, seed=seed)
        write_adapter(tmp_path / "adapters" / name, factors)
    texts = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(texts) == 2
    for text in reversed(texts):
        Path("recipe.yml").write_text(text)
        assert cli.main(["run", "recipe.yml", "-o", "merged", "--overwrite"]) == 0
    assert list(dm.load("merged").modules) == list(names[:3])
    shown = re.findall(r"^    domerge-fast (.*?)(?:  +#.*)?$", PAGE.read_text("utf-8"), re.M)
    assert len(shown) == 5
    for line in shown:
        line = line.replace("adapters/*", "adapters/math adapters/code")
        words = [*line.split(), *(["--overwrite"] if "-o" in line.split() else [])]
        assert cli.main(words) == 0, line
    assert capsys.readouterr().err == ""
