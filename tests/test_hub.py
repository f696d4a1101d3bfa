"""Adapters and base models by their ids on the Hugging Face Hub, which is a server in this test."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.hub import Hub, serving
from support.make import PAIR, write_pair

import domerge_fast as dm
from domerge_fast import AdapterError, OptionError
from domerge_fast.cli.main import main
from domerge_fast.recipe import Recipe
from domerge_fast.storage.hub import is_id

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """me/one and me/two hold adapters "a" and "b", me/base their base model."""
    one, two = write_pair(tmp_path / "hub")
    (one / "training_args.bin").write_bytes(b"x")
    (one / "tokenizer.json").write_text("{}")
    found = Hub(
        {
            "me/one": {"main": one, "v2": two, "refs/pr/1": two},
            "me/two": {"main": two},
            "me/many": {"main": one.parent},
            "me/base": {"main": base(tmp_path / "hub" / "base")},
            "me/gated": {"main": one},
        },
        frozenset({"me/gated"}),
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    with serving(found):
        to(found.url, monkeypatch)
        yield found


def to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_ENDPOINT, which is read once."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    made = {f"{k}.weight": torch.randn(m, n, generator=generator) for k, (m, n) in PAIR.items()}
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 11}))
    (folder / "pytorch_model.bin").write_bytes(b"the same again")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"and again")
    return folder


def offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("source", "there"),
    [
        ("me/one", "a"),
        ("me/one@main", "a"),
        ("me/one@v2", "b"),
        ("me/one@refs/pr/1", "b"),
        ("me/many/b", "b"),
        ("me/many/a@main", "a"),
    ],
)
def test_an_id_is_the_adapter_there(source, there, hub, tmp_path):
    loaded, expected = dm.load(source), dm.load(tmp_path / "hub" / there)
    assert loaded.name == source
    assert loaded.modules == expected.modules
    for name in expected.modules:
        assert all(map(torch.equal, loaded.factors(name), expected.factors(name)))


def test_only_the_adapter_s_files_are_fetched_and_but_once(hub):
    dm.load("me/one")
    fetched = {"adapter_config.json", WEIGHTS, "tokenizer.json"}
    assert set(hub.asked) == fetched
    hub.asked.clear()
    dm.load("me/one")
    assert hub.asked == []


def test_a_pickle_is_fetched_where_there_is_nothing_else(hub, tmp_path):
    (tmp_path / "hub" / "a" / PICKLE).write_bytes(b"never read")
    folder = tmp_path / "hub" / "b"
    expected = dm.load(folder).factors("layers.0.up_proj")
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    assert all(map(torch.equal, dm.load("me/two").factors("layers.0.up_proj"), expected))
    hub.asked.clear()
    dm.load("me/one")
    assert PICKLE not in hub.asked


def test_offline_the_cache_is_used(hub, monkeypatch):
    dm.load("me/one")
    offline(monkeypatch)
    hub.asked.clear()
    assert dm.load("me/one").modules
    with pytest.raises(AdapterError, match="adapter 'me/two': is no path here, nor whole in the "):
        dm.load("me/two")
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_told(hub, monkeypatch):
    to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(AdapterError, match="cannot be reached; check the path, the network"):
        dm.load("me/one")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("me/none", "is no path here and no repository on the Hugging Face Hub, or a private one"),
        ("me/one@v9", "has no such revision on the Hugging Face Hub; check what is after '@'"),
        ("me/gated", "is gated on the Hugging Face Hub; "),
        ("me/many", "has no files of an adapter on the Hub; name the folder"),
        ("me/one/none", "has no files of an adapter on the Hub"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(source, said, hub, tmp_path, capsys):
    assert main(["merge", "me/two", source, "-o", "out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if said in line and repr(source) in line]
    assert not (tmp_path / "out").exists()


def test_without_the_library_it_is_one_line(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AdapterError, match="need the package huggingface_hub; check the path, or "):
        dm.load("me/one")
    assert dm.load("hub/a").modules
    with pytest.raises(OptionError, match="option 'base': 'me/base' is no path here"):
        dm.merge(["hub/a"], "linear", base="me/base", output="out", form="model")


def test_a_path_comes_first(hub):
    os.makedirs("me")
    os.symlink("../hub/b", "me/one")
    assert dm.load("me/one").modules == dm.load("hub/b").modules
    assert hub.asked == []


@pytest.mark.parametrize(
    "source",
    [
        "one",
        "/me/one",
        "./me",
        "../one",
        "me/",
        "me/../one",
        "me//one",
        "~/one",
        "me/one@",
        "me/.x",
    ],
)
def test_what_is_no_id_is_a_path(source):
    assert not is_id(source)


def test_a_base_by_its_id(hub, tmp_path):
    given = {"method": "linear", "form": "model"}
    dm.merge(["me/one", "me/two"], base="me/base", output="out", **given)
    dm.merge(["hub/a", "hub/b"], base="hub/base", output="expected", **given)
    assert set(hub.asked) >= {"config.json", "model.safetensors"}
    assert not {"pytorch_model.bin", "original/model.safetensors"} & set(hub.asked)
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "expected"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ours.keys() == theirs.keys()
    with pytest.raises(OptionError, match="option 'base': 'me/none' is no path here and no rep"):
        dm.merge(["hub/a"], base="me/none", output="out2", **given)


def test_a_recipe_and_a_card_keep_the_id(hub, tmp_path, monkeypatch):
    arguments = ["me/one@main", "me/two", "-o", "out", "--method", "linear"]
    assert main(["merge", *arguments, "--save-recipe", "recipe.yaml"]) == 0
    written = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert "me/one@main" in (tmp_path / "recipe.yaml").read_text()
    assert "me/one@main" in (tmp_path / "out" / "README.md").read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for recipe in ("../recipe.yaml", "../out"):
        assert main(["run", recipe, "-o", "again", "--overwrite"]) == 0
        assert (elsewhere / "again" / WEIGHTS).read_bytes() == written


def test_a_card_s_id_is_refused_once_it_has_other_files(hub, tmp_path):
    dm.merge(["me/one", "me/two"], "linear", output="out")
    card = (tmp_path / "out" / "README.md").read_text()
    other = card.replace('"name": "me/two"', '"name": "me/one"')
    assert other != card
    (tmp_path / "out" / "README.md").write_text(other)
    with pytest.raises(OptionError, match="'me/one' is not here as the recipe's files were"):
        Recipe.read("out")
