"""A model is written in the memory of a few weights, however many it has."""

from __future__ import annotations

import gc
import json
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.merges import at_one, of_base
from support.processes import forked
from test_memory import memory

import domerge_fast as dm
from domerge_fast.formats.deltas import DeltaFolder
from domerge_fast.formats.model.write import ModelFolder

SIZE, COUNT = 1024, 24
WEIGHT = 4 * SIZE * SIZE  # bytes
MERGED = [f"model.layers.{i}" for i in range(COUNT)]
OTHERS = [f"model.norms.{i}" for i in range(COUNT)]


def measure(folder: Path, form: str, pipe: Connection) -> None:
    """Write a merge, and send how far memory rose above what it was before."""
    factors = {name: (torch.ones(1, SIZE), torch.ones(SIZE, 1)) for name in MERGED}
    merged = at_one([dm.from_tensors(factors)], method="linear")
    merged.delta(MERGED[0])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel starts VmHWM again
    before = memory()["VmHWM"]
    if form == "model":
        writing = ModelFolder(folder / "out", of_base(merged.target, folder / "base"), False)
    else:
        writing = DeltaFolder(folder / "out", merged.target, False)
    with writing as out:
        for name in merged.names:
            out.add(name, merged.delta(name))
        out.finish(merged.report)
    pipe.send(memory()["VmHWM"] - before)


@pytest.mark.parametrize("form", ["model", "deltas"])
def test_memory_holds_a_few_weights(form, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    weights = {f"{name}.weight": torch.ones(SIZE, SIZE) for name in MERGED + OTHERS}
    save_file(weights, tmp_path / "base/model.safetensors")
    process, pipe = forked(measure, tmp_path, form)
    grown = pipe.recv()
    process.join()
    assert grown < 8 * WEIGHT < COUNT * WEIGHT / 2
    (file,) = (tmp_path / "out").glob("*.safetensors")
    expected = 2.0 if form == "model" else 1.0
    found = load_file(file)
    assert all((found[f"{name}.weight"] == expected).all() for name in MERGED)
    file.unlink()
    (tmp_path / "base/model.safetensors").unlink()
