"""What a merge reports of its adapters, and that nothing it writes depends on that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.make import random_factors
from support.merges import at_one
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter
from domerge_fast.cli.main import main
from domerge_fast.engine import interference
from domerge_fast.formats import from_tensors
from domerge_fast.recipe import REPORTS

SHAPES = {"x": (40, 56), "y": (9, 7), "z": (30, 30)}
SIZES = (
    (1.0, 1.0),
    (1e-3, 1e-4),
    (1e-12, 1.0),
    (1.0, 1e9),
    (1e-20, 1e20),
    (1e-24, 1e-12),
    (2.0**-23, 2.0**15),
)


def adapters(size_a: float = 1.0, size_b: float = 1.0, zero: str = "") -> list[Adapter]:
    """Three of which the last has other sizes, or zeros in a side."""
    found = []
    for i in range(3):
        factors = random_factors(SHAPES, 4, seed=i)
        if i == 2:
            factors = {n: (size_a * a, size_b * b) for n, (a, b) in factors.items()}
            factors = {n: zeroed(a, b, zero) for n, (a, b) in factors.items()}
        found.append(from_tensors(factors, 2.0, name=str(i)))
    return found


def zeroed(a: Tensor, b: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if what == "row":
        a[1] = 0
    if what == "b":
        b[:] = 0
    return a, b


def outcome(loaded: list[Adapter], method: str, **options: Any) -> Any:
    """The bytes of a merge, or the line that refuses it."""
    try:
        merged = dm.merge(loaded, method, **options)
    except dm.DomergeError as error:
        return str(error)
    return {
        n: [x.contiguous().view(torch.uint8).tolist() for x in merged.factors(n)] for n in SHAPES
    }


@pytest.mark.parametrize("method", ["linear", "do", "tsvm", "robust", "ties"])
@pytest.mark.parametrize("scale", [1.0, "auto"])
@pytest.mark.parametrize("sizes", SIZES)
def test_no_byte_depends_on_the_report(method, scale, sizes):
    first, *rest = (outcome(adapters(*sizes), method, scale=scale, report=x) for x in REPORTS)
    assert all(found == first for found in rest)


@pytest.mark.parametrize("zero", ["row", "b"])
@pytest.mark.parametrize("sizes", SIZES[:4])
def test_no_byte_depends_on_it_where_there_are_zeros(zero, sizes):
    loaded = adapters(*sizes, zero)
    first, *rest = (outcome(loaded, "linear", scale=1.0, report=x) for x in REPORTS)
    assert all(found == first for found in rest)


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_what_is_not_finite_is_refused(report, bad, side):
    loaded = adapters()
    loaded[1].factors("z")["AB".index(side)][3, 2] = bad
    what = "NaN" if math.isnan(bad) else "an infinite value"
    with pytest.raises(dm.AdapterError, match=rf"^adapter '1', module 'z': {what} in lora_{side}"):
        at_one(loaded, "linear", report=report)


def norms(loaded: list[Adapter], name: str) -> dict[str, float]:
    pairs = [(x.name, x.factors(name)) for x in loaded]
    return {key: 2.0 * float((b.double() @ a.double()).norm()) for key, (a, b) in pairs}


@pytest.mark.parametrize("method", ["linear", "tsvm"])
def test_norms_alone(method):
    loaded = adapters(1e-20, 1e22)
    report = at_one(loaded, method, report="norms").report
    full = at_one(loaded, method).report.interference
    for name in SHAPES:
        assert report[name].magnitudes == pytest.approx(norms(loaded, name), rel=1e-5)
    found = report.interference
    assert found is not None
    assert full is not None
    assert found.tables is None
    assert found.norms == pytest.approx(full.norms, rel=1e-6)
    for one, other in zip(found.spread, full.spread, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_nothing():
    report = at_one(adapters(), "linear", report="none").report
    assert report.interference is None
    assert report["x"].magnitudes == {"0": None, "1": None, "2": None}
    assert dict(report.summary())["modules"] == "3"


def test_what_the_method_knows_anyway_is_told():
    magnitudes = at_one(adapters(), "do", report="none").report["x"].magnitudes
    assert magnitudes == at_one(adapters(), "do").report["x"].magnitudes


def test_norms_of_more_adapters_than_are_compared(monkeypatch):
    monkeypatch.setattr(interference, "MOST_COMPARED", 2)
    loaded = adapters()
    report = at_one(loaded, "linear").report
    assert report.recipe.report == "full"
    assert report.interference == at_one(loaded, "linear", report="norms").report.interference


def test_an_unknown_report_is_refused():
    with pytest.raises(dm.OptionError, match=r"'norm' is not known; did you mean 'norms'"):
        dm.Recipe.make(report="norm")


def written(path: Path, report: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, Any]:
    """The card, and the JSON of the command line."""
    for i, adapter in enumerate(adapters()):
        dm.merge([adapter], "linear", output=path / f"{i}", overwrite=True)
    sources = [str(path / f"{i}") for i in range(3)]
    flags = ["--method", "linear", "--report", report, "--json"]
    assert main(["merge", *sources, "-o", str(path / report), *flags]) == 0
    return (path / report / "README.md").read_text(), json.loads(capsys.readouterr().out)


def test_the_card_and_the_command_line(tmp_path, capsys):
    for report, title in (("full", "Interference before merging"), ("norms", "Adapters")):
        card, plain = written(tmp_path, report, capsys)
        assert f"\n## {title}\n" in card
        assert "norm of ΔW" in card
        assert ("Overlap" in card) == (report == "full")
        assert (plain["interference"]["rows"] is None) == (report == "norms")
        assert plain["recipe"]["report"] == report
    card, plain = written(tmp_path, "none", capsys)
    assert "norm of ΔW" not in card
    assert plain["interference"] is None
    assert dm.Recipe.read(tmp_path / "none", tmp_path).report == "none"
