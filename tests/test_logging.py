"""What a merge logs, for services: nothing unless it is asked for."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from support.merges import adapters
from support.shapes import random_case

import domerge_fast as dm

CASES = {name: random_case((2, 3), 17, 19, seed=k) for k, name in enumerate(("x", "y"))}


@pytest.fixture(autouse=True)
def by_itself(monkeypatch):
    monkeypatch.delenv("DOMERGE_BACKEND", raising=False)


def test_the_backend_and_why_the_method_and_every_group(caplog):
    caplog.set_level(logging.DEBUG, "domerge_fast")
    dm.merge(adapters(CASES), "linear", backend="torch")
    texts = [record.getMessage() for record in caplog.records]
    assert "backend torch on cpu: asked for" in texts
    assert any(text.startswith("2 modules by linear, in ") for text in texts)
    size = 4 * 2 * 5 * (17 + 19) / 1e6
    assert f"2 modules merged, {size:.1f} MB of factors; 2 of 2 are done" in texts


def test_a_found_scale_is_seen_to_go_through_twice(caplog):
    caplog.set_level(logging.DEBUG, "domerge_fast")
    dm.merge(adapters(CASES), "do")
    texts = [record.getMessage() for record in caplog.records]
    assert any("2 modules looked at" in text for text in texts)
    assert any(text.endswith("by evidence (docs/kernels.md)") for text in texts)


def test_groups_are_not_logged_at_level_info(caplog):
    caplog.set_level(logging.INFO, "domerge_fast")
    dm.merge(adapters(CASES), "linear")
    assert len(caplog.records) == 2


def test_nothing_is_printed_unless_it_is_asked_for():
    code = "import logging, domerge_fast; logging.getLogger('domerge_fast.job').error('no')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
