"""Base models are the same where their names lead to the same place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import domerge_fast as dm
from domerge_fast.errors import AdapterError


def merge(*bases: str | None, **options: str) -> dm.Merged:
    pair = torch.ones(2, 4), torch.ones(3, 2)
    made = [
        dm.from_tensors({"q": pair}, name=f"a{k}", base_model=base) for k, base in enumerate(bases)
    ]
    return dm.merge(made, "linear", **options)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "org" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "other", ["org/base/", "./org/base", "org//base", "org/../org/base", "link", "{}/org/base/"]
)
def test_spellings_of_one_folder_are_one_base(other, place):
    other = other.format(place)
    assert merge("org/base", other).target.config["base_model_name_or_path"] == "org/base"
    assert merge(other, None, "org/base").target.config["base_model_name_or_path"] == other


@pytest.mark.parametrize("other", ["gone/base/", "./gone/base"])
def test_a_path_need_not_be_there_any_more(other, place):
    merge("gone/base", other)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("org/other", r"'org/other', that of adapter 'a0' is 'org/base'; merge"),
        ("org/Base", r"'org/base' \(only upper and lower case differ\); merge"),
        ("base", r"its base model is 'base'"),
        ("org/base\0", r"its base model is"),
    ],
)
def test_other_names_are_other_bases_until_one_is_said(other, said, place):
    with pytest.raises(AdapterError, match=said):
        merge("org/base", other)
    assert merge("org/base", other, base_model="mine").names == ("q",)
