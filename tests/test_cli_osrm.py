"""domerge-fast osrm, on a small Llama and its tokenizer in a folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from support.trained import trained

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.osrm.texts import batches_of, load_model, load_tokenizer

WORDS = [f"w{k}" for k in range(60)]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in "base", and texts of three tasks with words of their own."""
    folder = tmp_path_factory.mktemp("osrm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    vocabulary = {word: k for k, word in enumerate(["[UNK]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    fast.save_pretrained(folder / "base")
    for k, task in enumerate("abc"):
        own = WORDS[20 * k : 20 * k + 20]
        lines = [" ".join(own[j % 20] for j in range(i, i + 3 + i % 5)) for i in range(20)]
        (folder / f"{task}.txt").write_text("\n\n".join(lines) + "\n")
    return folder


def texts(place: Path, tasks: str = "abc") -> list[str]:
    return [word for task in tasks for word in ("--texts", f"{task}={place / task}.txt")]


def ran(capsys: pytest.CaptureFixture[str], *line: object) -> dict:
    assert cli.main([*map(str, line), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_one_task_is_what_the_api_writes(place, tmp_path, capsys):
    given = ("--target-modules", *TARGETS, "--rank", 4, "--alpha", 8, "--samples", 12)
    shown = ran(
        capsys,
        *("osrm", "init", place / "base", *texts(place), "--task", "b", *given),
        *("-o", tmp_path / "b"),
    )
    model, tokenizer = load_model(str(place / "base")), load_tokenizer(str(place / "base"))
    batches = batches_of(tokenizer, {t: place / f"{t}.txt" for t in "abc"}, 12, 128)
    made = dm.osrm_init(
        model, batches, task="b", target_modules=TARGETS, rank=4, alpha=8, output=tmp_path / "api"
    )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "api" / file).read_bytes()
    assert shown["b"]["tokens"] == made.tokens
    assert made.tokens["a"] == sum(3 + i % 5 for i in range(12))
    assert shown["b"]["modules"].keys() == made.modules.keys()
    assert len(made.modules) == 4
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(place / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = peft.PeftModel.from_pretrained(model, tmp_path / "b", is_trainable=True)
    assert sum(x.requires_grad for x in ready.parameters()) == 8


def test_without_a_task_all_are_written(place, tmp_path, capsys):
    line = ["osrm", "init", place / "base", *texts(place), "--target-modules", "q_proj"]
    line += ["--rank", "2", "--energy", "0.5", "-o", tmp_path / "all"]
    assert cli.main([*map(str, line)]) == 0
    shown = capsys.readouterr().out
    for task in "abc":
        assert str(tmp_path / "all" / task) in shown
        tensors = load_file(tmp_path / "all" / task / "adapter_model.safetensors")
        assert len(tensors) == 4


def test_a_trained_adapter_is_projected(place, tmp_path, capsys):
    model, tokenizer = load_model(str(place / "base")), load_tokenizer(str(place / "base"))
    folder = trained(model, 1, tmp_path / "trained", target_modules=TARGETS)
    line = ("osrm", "project", folder, "--model", place / "base", *texts(place), "--task", "a")
    shown = ran(capsys, *line, "-k", 5, "-o", tmp_path / "out")
    batches = batches_of(tokenizer, {t: place / f"{t}.txt" for t in "bc"}, 256, 128)
    features = dm.osrm_features(model, batches, target_modules=TARGETS)
    made = dm.osrm_project(folder, features, k=5)
    assert shown["kept"] == pytest.approx(made.kept)
    assert 0 < made.kept < 1
    written = dm.load(tmp_path / "out")
    for name in made.modules:
        for x, y in zip(written.factors(name), made.adapter.factors(name)):
            torch.testing.assert_close(x, y)


def test_a_file_of_what_layers_are_given_is_as_good_as_the_model(place, tmp_path, capsys):
    model = load_model(str(place / "base"))
    folder = trained(model, 1, tmp_path / "a", target_modules=TARGETS)
    file = tmp_path / "features.safetensors"
    line = ("osrm", "features", place / "base", *texts(place), "--target-modules", *TARGETS)
    assert ran(capsys, *line, "-o", file) == {"output": str(file), "tasks": ["a", "b", "c"]}
    line = ("osrm", "project", folder, "--task", "a")
    found = ran(capsys, *line, "--features", file, "-o", tmp_path / "of_file")
    given = ("--model", place / "base", *texts(place))
    expected = ran(capsys, *line, *given, "-o", tmp_path / "of_texts")
    assert found["kept"] == pytest.approx(expected["kept"], rel=1e-5)
    for more in ((), ("--features", file, "--model", place / "base"), given[:2]):
        assert cli.main([*map(str, line), *map(str, more), "-o", str(tmp_path / "none")]) == 2
        assert "give --features, or --model and --texts" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (["--texts", "a"], "'a' is no TASK=FILE"),
        (["--texts", "a=none.txt"], "'none.txt' cannot be read"),
        (["--texts", "a={place}/empty.txt"], "empty.txt' has no text"),
        (["--texts", "a={place}/bytes.txt"], "is not UTF-8"),
        (["--texts", "a={place}/a.txt", "--texts", "a={place}/b.txt"], "is given twice"),
        (["--texts", "a={place}/a.txt"], "are of one task"),
        (["--texts", "a={place}/a.txt", "--task", "a"], "of 'a' alone"),
        (["--texts", "a={place}/a.txt", "--samples", "0"], "option 'samples'"),
    ],
)
def test_what_does_not_fit_is_one_line(place, tmp_path, capsys, line, part):
    (place / "empty.txt").write_text("\n  \n")
    (place / "bytes.txt").write_bytes(b"\xff\xfe")
    given = [word.format(place=place) for word in line]
    fixed = ["osrm", "init", str(place / "base"), "--target-modules", "q_proj"]
    assert cli.main([*fixed, *given, "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert part in told
    assert told.splitlines()[-1].startswith("domerge-fast: error: ")
    assert not any(tmp_path.iterdir())


def test_a_folder_without_a_model_is_one_line(place, tmp_path, capsys):
    line = ["osrm", "init", str(tmp_path), *texts(place), "--target-modules", "q_proj"]
    assert cli.main([*line, "-o", str(tmp_path / "out")]) == 2
    assert "cannot load" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    line = ["osrm", "init", str(place / "base"), *texts(place), "--target-modules", "q_proj"]
    assert cli.main([*line, "-o", str(tmp_path / "out")]) == 2
    assert "pip install 'domerge-fast[osrm]'" in capsys.readouterr().err
