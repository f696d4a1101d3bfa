"""examples/search_with_a_safety_constraint.py, with little training."""

from __future__ import annotations

import re
import sys

import pytest
from support.examples import example_module


@pytest.fixture
def example():
    with example_module("search_with_a_safety_constraint") as module:
        yield module


def test_it_names_the_adapter_and_keeps_to_the_constraint(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "STEPS", 30)
    monkeypatch.setattr(example, "TRIALS", 12)
    monkeypatch.setattr(sys, "argv", ["search.py", str(tmp_path)])
    example.main()
    shown = capsys.readouterr().out
    assert re.search(r"spoils it: .*third$", shown, re.M)
    (safe,) = re.findall(r"^safety +on other data: .* safe (\d+) of 96$", shown, re.M)
    (free,) = re.findall(r"^no constraint .* safe (\d+) of 96$", shown, re.M)
    assert int(safe) >= 86 > int(free)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "asked at least 0.9: holds" in card
    assert "data sha256" in card
