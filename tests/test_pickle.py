"""Adapters whose weights PEFT saved as a pickle (adapter_model.bin)."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.make import write_pair

import domerge_fast as dm
from domerge_fast import AdapterError
from domerge_fast.cli.main import main
from domerge_fast.storage import pickle_file

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def pickled(folder: Path, change: Callable[[dict], Any] = dict, **how: Any) -> Path:
    """The folder with its weights as torch saves them, after a change."""
    torch.save(change(load_file(folder / WEIGHTS)), folder / PICKLE, **how)
    (folder / WEIGHTS).unlink()
    return folder


def turned(tensors: dict) -> dict:
    """Stored column by column, as a transposed view."""
    return {key: x.T.contiguous().T for key, x in tensors.items()}


def parameters(tensors: dict) -> dict:
    return collections.OrderedDict((key, torch.nn.Parameter(x)) for key, x in tensors.items())


def parts_of_one(tensors: dict) -> dict:
    """All in one storage, behind each other."""
    whole = torch.cat([x.flatten() for x in tensors.values()])
    parts = whole.split([x.numel() for x in tensors.values()])
    return {key: part.view(x.shape) for (key, x), part in zip(tensors.items(), parts)}


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (dict, {}),
        (dict, {"_use_new_zipfile_serialization": False}),
        (turned, {}),
        (parameters, {}),
        (parts_of_one, {}),
    ],
)
def test_it_is_read_like_safetensors(change, how, tmp_path):
    one, two = write_pair(tmp_path)
    expected = dm.merge([one, two], "linear")
    pickled(two, change, **how)
    merged = dm.merge([one, two], "linear", output=tmp_path / "out")
    for name in expected.names:
        assert all(map(torch.equal, merged.factors(name), expected.factors(name)))


def test_of_both_files_safetensors_is_taken(tmp_path):
    one, two = write_pair(tmp_path)
    (two / PICKLE).write_bytes(b"no pickle")
    assert dm.load(two).inputs[-1].path.name == WEIGHTS
    assert dm.merge([one, two], "linear").names


def test_its_folder_is_known(tmp_path):
    """It is not written to, its tokenizer comes along, and a card finds it by its sums."""
    one, two = write_pair(tmp_path)
    for folder in (one, two):
        pickled(folder)
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(dm.OutputError):
        dm.merge([one, two], "linear", output=two, overwrite=True, force=True)
    out = tmp_path / "out"
    dm.merge([one, two], "linear", output=out)
    assert (out / "tokenizer.json").read_text() == "{}"
    again = ["run", str(out), "--adapters", str(tmp_path), "-o", str(tmp_path / "again")]
    assert main(again) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


class Tagged(torch.Tensor):
    pass


def first_as(other: Callable[[torch.Tensor], Any]) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        key = next(iter(tensors))
        return tensors | {key: other(tensors[key])}

    return change


REFUSED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "code": (lambda tensors: tensors | {"x": Runs()}, "more than tensors"),
    "a list": (lambda tensors: list(tensors.values()), "holds a list"),
    "numbers for names": (lambda tensors: dict(enumerate(tensors.values())), "holds a dict"),
    "a number": (lambda tensors: tensors | {"alpha": 2.0}, "'alpha', a float"),
    "within another": (lambda tensors: {"state_dict": tensors}, "'state_dict', a dict"),
    "another class": (first_as(lambda x: x.as_subclass(Tagged)), "more than tensors"),
    "sparse": (first_as(lambda x: x.to_sparse()), "sparse_coo"),
    "quantized": (
        first_as(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        "qint8",
    ),
    "complex": (first_as(lambda x: x.to(torch.complex128)), "complex128"),
    "without values": (first_as(lambda x: x.to("meta")), "without values (meta)"),
    "repeated": (first_as(lambda x: torch.ones(1, 1).expand(x.shape)), "repeats its values"),
    "float64": (first_as(lambda x: x.double()), "float64"),
}


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_than_plain_tensors_is_refused(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change, said = REFUSED[case]
    pickled(write_pair(tmp_path)[1], change)
    assert main(["merge", "a", "b", "-o", "out"]) == 2
    line = capsys.readouterr().err
    assert "adapter 'b'" in line
    assert said in line
    assert "; " in line
    assert sorted(os.listdir()) == ["a", "b"]


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    folder = pickled(write_pair(tmp_path)[1])
    (folder / PICKLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AdapterError, match="git-lfs pointer, not the weights; run 'git lfs pull'"):
        dm.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    folder = pickled(write_pair(tmp_path)[1])
    os.truncate(folder / PICKLE, int(share * os.path.getsize(folder / PICKLE)))
    with pytest.raises(AdapterError, match=f"{PICKLE} is damaged"):
        dm.load(folder)


def test_a_size_in_the_pickle_that_its_data_has_not_is_refused(tmp_path):
    """A crafted file may say that a tensor is larger than what the file holds of it."""
    folder = pickled(write_pair(tmp_path)[1], lambda x: {"x": torch.ones(200, dtype=torch.uint8)})
    data = (folder / PICKLE).read_bytes()
    assert data.count(b"K\xc8") == 2
    (folder / PICKLE).write_bytes(data.replace(b"K\xc8", b"K\xff"))
    with pytest.raises(AdapterError, match=f"{PICKLE} is damaged"):
        dm.load(folder)


def test_a_file_that_changes_during_the_merge_is_refused(tmp_path):
    one, two = write_pair(tmp_path)
    adapter = dm.load(pickled(two))
    os.utime(two / PICKLE, (1, 1))
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        dm.merge([one, adapter], "linear", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torch_that_a_crafted_file_can_get_past_reads_none(tmp_path, monkeypatch):
    folder = pickled(write_pair(tmp_path)[1])
    monkeypatch.setattr(pickle_file, "SAFE", (99, 0))
    with pytest.raises(AdapterError, match="not read safely; install torch 99"):
        dm.load(folder)
