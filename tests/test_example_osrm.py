"""examples/osrm_before_training.py, with little training."""

from __future__ import annotations

import re
import sys

import pytest
from support.examples import example_module

import domerge_fast as dm


@pytest.fixture
def example(monkeypatch):
    with example_module("osrm_before_training") as module:
        monkeypatch.setattr(module, "STEPS", 12)
        yield module


def test_it_trains_from_both_starts_and_compares_what_merges_keep(
    example, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys, "argv", ["osrm_before_training.py", str(tmp_path)])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    figures = {
        re.split(":? {2,}", x)[0]: [*map(float, re.findall(r"-?\d+\.\d+", x))] for x in lines
    }
    for task in example.RULES:
        [told] = [numbers for x, numbers in figures.items() if x.startswith(f"{task}: A lets")]
        assert told[0] < 0.1 * told[1] < 1
        assert len(dm.load(tmp_path / "starts" / task).modules) == 14
    base = figures["base"]
    for start in ("PEFT's start", "OSRM's start"):
        alone = figures[f"from {start}: each alone"]
        assert all(own < before for own, before in zip(alone, base))
        assert len(figures[f"from {start}: merged"]) == 4
        merged = dm.load(tmp_path / f"{start}-merged")
        assert len(merged.modules) == 14
