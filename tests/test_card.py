"""The model card holds names that come from anywhere, and says nothing of this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast.results.card import CARD

FACTORS = random_factors({"layer": (6, 8)}, 2)

HOSTILE = [
    "x`\n\n<img src=https://evil/x.png>\n\n`y",
    "a\n---\nlicense: mit",
    '" # no: "comment',
    "``` ```",
    "`",
    "a | b \\| c",
    "\u2028<b>\u202emoc\x00\x85\ufeff",
    "a/\U0001f600b",
    "[link](https://evil)",
    "--- [x]: y",
]


def card_of(folder: Path) -> tuple[dict[str, object], str, dict[str, object]]:
    """Front matter, text, recipe. All of it is UTF-8 that prints."""
    text = (folder / CARD).read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    fence, recipe = re.search(r"^(```+)json\n(.*?)\n\1$", body, re.DOTALL | re.MULTILINE).groups()
    assert fence not in recipe
    return yaml.safe_load(front), body.replace(recipe, ""), json.loads(recipe)


def shown(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def code(text: str) -> str:
    """A code span, read back: what stands between its fences."""
    fence, inside = re.search(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", text).groups()
    return inside[1:-1] if len(fence) > 1 else inside


@pytest.mark.parametrize("base", HOSTILE)
def test_a_base_model_is_only_a_name(base, tmp_path):
    folder = write_adapter(tmp_path / "a", FACTORS, base_model_name_or_path=base)
    dm.merge([folder], output=tmp_path / "out")
    front, text, _ = card_of(tmp_path / "out")
    assert set(front) == {"base_model", "library_name", "tags"}
    assert front["base_model"] == shown(base)
    (made,) = [line for line in text.splitlines() if line.startswith("Made by")]
    assert code(made) == shown(base)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


@pytest.mark.parametrize("name", [*HOSTILE, "a\udcffb"])
def test_an_adapter_is_only_a_name(name, tmp_path):
    adapters = [dm.from_tensors(FACTORS, name=n) for n in (name, "other")]
    dm.merge(adapters, output=tmp_path / "out")
    _, text, recipe = card_of(tmp_path / "out")
    assert recipe["adapters"] == [shown(name), "other"]
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 | `")]
    cells = re.split(r"(?<!\\)\|", row)
    assert len(cells) == 8
    assert code(cells[2]).replace("\\|", "|") == re.sub(r"\\+\|", "|", shown(name))


def test_what_a_note_quotes_is_only_text(tmp_path):
    merged = dm.merge([dm.from_tensors(FACTORS, name="a")])
    note = "module 'a|`b`' of [it](https://evil) <img src=x> is \\| left out"
    report = dataclasses.replace(merged.report, notes=(note,))
    dataclasses.replace(merged, report=report).save(tmp_path / "out")
    _, text, _ = card_of(tmp_path / "out")
    (row,) = [line for line in text.splitlines() if line.startswith("| note ")]
    assert len(re.split(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)[<`\[\]]", row)


def test_no_path_of_this_machine_is_told(tmp_path, monkeypatch):
    base = tmp_path / "models" / "base"
    folders = [
        write_adapter(tmp_path / run / "final", FACTORS, base_model_name_or_path=str(base))
        for run in ("first", "second")
    ]
    dm.merge(folders, output=tmp_path / "out")
    front, text, recipe = card_of(tmp_path / "out")
    assert front["base_model"] == "base"
    assert [x["name"] for x in recipe["adapters"]] == ["first/final", "second/final"]
    assert str(tmp_path) not in (tmp_path / "out" / CARD).read_text()
    assert "`first/final`" in text
    monkeypatch.chdir(tmp_path)
    dm.run(dm.Recipe.read("out", under="."), output="again")
    weights = [Path(f, "adapter_model.safetensors").read_bytes() for f in ("out", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/base", "base"),
        ("/home/me/models/base/", "base"),
        ("C:\\Users\\me\\base", "base"),
        ("\\\\server\\share\\me\\base", "base"),
        ("~/models/base", "base"),
        ("../../me/base", "base"),
        ("file:///home/me/base", "base"),
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B"),
        ("models/base", "models/base"),
    ],
)
def test_a_base_model_is_called_by_its_name(path, name, tmp_path):
    adapter = write_adapter(tmp_path / "a", FACTORS, base_model_name_or_path=path)
    dm.merge([adapter], output=tmp_path / "out")
    front, text, _ = card_of(tmp_path / "out")
    assert front["base_model"] == name
    assert f"of `{name}`." in text


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_folder_of_any_bytes_is_named_in_utf8(tmp_path):
    folder = write_adapter(tmp_path / "plain", FACTORS)
    odd = os.fsencode(tmp_path) + b"/odd\xff"
    os.rename(folder, odd)
    dm.merge([os.fsdecode(odd)], output=tmp_path / "out")
    _, _, recipe = card_of(tmp_path / "out")
    (adapter,) = recipe["adapters"]
    assert adapter["name"].startswith("odd")
