"""examples/learn_coefficients.py, with little training."""

from __future__ import annotations

import re
import sys

import pytest
from support.examples import example_module

import domerge_fast as dm


@pytest.fixture
def example():
    with example_module("learn_coefficients") as module:
        yield module


def test_it_finds_coefficients_and_writes_the_best_merge(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "STEPS", 6)
    monkeypatch.setattr(example, "FEW", 2)
    monkeypatch.setattr(sys, "argv", ["learn_coefficients.py", str(tmp_path)])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    figures = {
        re.split(" {2,}", x)[0]: [*map(float, re.findall(r"\d+\.\d+", x))]
        for x in lines
        if not x.startswith(" ")
    }
    ways = ("base", "as it is prepared", "tune", "tune by adapter", "cocktail", "adamerge")
    assert all(len(figures[name]) == 4 for name in (*ways, "gradients of the loss"))
    assert figures["tune"][3] <= figures["as it is prepared"][3] + 0.01
    assert len(dm.load(tmp_path / "merged").modules) == 14
