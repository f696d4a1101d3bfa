"""`do` on adapters read in batches, continued with more of them: against the optimum of all, and
against a merge of all at once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.close import assert_close
from support.files import unchanged
from support.make import write_adapter
from support.merges import dense
from test_streamed import SETS, TOL, library, objective
from torch import Tensor

import domerge_fast as dm
from domerge_fast import AdapterError, DomergeError, OptionError, OutputError, Streamed
from domerge_fast.algebra.side import Side
from domerge_fast.cli import main as cli
from domerge_fast.methods.streamed.descent import Descent, Rule
from domerge_fast.methods.streamed.sums import Kept
from domerge_fast.sessions.disk import STATE, TENSORS

OLD = 200


def side(x: Sequence[Tensor]) -> Side:
    return Side(tuple(x), (1.0,) * len(x))


def descended(found: Descent, x: Sequence[Tensor], first: int) -> Descent:
    """Through, reading the adapters from `first` on as long as it is not opened."""
    found.measure(side(x[first:]))
    found.settle()
    while not found.done:
        first = 0 if found.opened else first
        found.step(side(x[first:]), range(first, len(x)))
        found.settle()
        if found.done and first and not found.is_within:
            found.open()
    return found


def moved(found: Descent, x: Sequence[Tensor], first: int) -> list[Tensor]:
    rows = found.moved(side(x[first:]), range(first, len(x)))
    return [2.0**found.power * own for own in rows]


def shuffled(count: int, name: str) -> list[Tensor]:
    x = library(count, 3, 32, *SETS[name])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    return [x[i] for i in order]


@pytest.mark.parametrize(("more", "opened"), [(2, False), (30, True)])
@pytest.mark.parametrize("name", ["30 % shared", "norms spread 36 times"])
def test_going_on_ends_within_tol_of_the_optimum_of_all(name, more, opened):
    x = shuffled(OLD + more, name)
    best = descended(Descent(32, Rule(1.0, 50, 1e-7)), x, 0)
    least = objective(moved(best, x, 0), x, 1.0)
    first = descended(Descent(32, Rule(1.0, 50, TOL)), x[:OLD], 0)
    kept = Kept.of(32, first.kept.tensors, torch.device("cpu"))
    found = descended(Descent(32, Rule(1.0, 50, TOL), kept), x, OLD)
    assert found.opened == opened
    x_hat = moved(found, x, 0 if opened else OLD)
    reached = objective([*moved(first, x[:OLD], 0), *x_hat][-len(x) :], x, 1.0)
    assert -1e-5 < reached / least - 1 < TOL
    _, before, after, *_ = found.row
    assert before == pytest.approx(objective(x, x, 1.0), rel=1e-5)
    assert after == pytest.approx(reached, rel=1e-5)
    assert reached - least < 4.0**found.power * found.gap + 1e-4 * least
    if opened:
        assert found.passes <= descended(Descent(32, Rule(1.0, 50, TOL)), x, 0).passes


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_adapters_of_another_size_go_on_too(size):
    """Those before vanish beside the new one, or it beside them."""
    x = shuffled(30, "30 % shared")
    x[-1] = size * x[-1]
    first = descended(Descent(32, Rule(1.0, 50, TOL)), x[:-2], 0)
    found = descended(Descent(32, Rule(1.0, 50, TOL), first.kept), x, len(x) - 2)
    whole = descended(Descent(32, Rule(1.0, 50, TOL)), x, 0)
    assert found.opened
    for one, other in zip(moved(found, x, 0), moved(whole, x, 0), strict=True):
        assert_close(one, other, 0.04)


# Folders


def adapters(folder: Path, count: int) -> list[Path]:
    """Some lack a module; another one is only in the last of them."""
    sides = {
        "layers.0.q_proj": (library(count, 2, 12, 0.3, 4.0), library(count, 2, 10, 0.0, 1.0)),
        "layers.0.up_proj": (library(count, 2, 8, 0.0, 1.0), library(count, 2, 14, 0.5, 1.0)),
        "layers.1.q_proj": (library(count, 2, 12, 0.0, 1.0), library(count, 2, 10, 0.0, 1.0)),
    }
    paths = []
    for k in range(count):
        own = {name: (a[k], b[k].T.contiguous()) for name, (a, b) in sides.items()}
        if k % 3 == 1:
            del own["layers.0.up_proj"]
        if k != count - 1:
            del own["layers.1.q_proj"]
        paths.append(write_adapter(folder / f"{k:02}", own))
    return paths


def in_goes(folder: Path, paths: Sequence[Path], goes: Sequence[int], **given: Any) -> Streamed:
    growing = Streamed.start(folder, **given)
    begin = 0
    for count in goes:
        growing = Streamed.open(folder)
        growing.add_all(paths[begin : begin + count], [1.0 + k % 2 for k in range(count)])
        begin += count
    return growing


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"decouple": False, "renormalize": False},
        {"renormalize": True, "sides": "A"},
        {"orthogonalize": False},
    ],
    ids=str,
)
def test_in_several_goes_it_is_the_merge_of_all_at_once(given, tmp_path):
    paths = adapters(tmp_path, 24)
    goes = (20, 2, 2)
    growing = in_goes(tmp_path / "state", paths, goes, tol=1e-5, **given)
    weights = [1.0 + k % 2 for count in goes for k in range(count)]
    options: dict[str, Any] = {"weights": weights, "dtype": "float32", "report": "norms"}
    whole = dm.merge(paths, "do", descent="streamed", tol=1e-5, **options, **given)
    found = growing.merged(dtype="float32")
    # With so few adapters the own blocks are found to some 1e-3 of f (docs/algorithm.md).
    near = 1e-5 if given == {"orthogonalize": False} else 0.04
    assert found.report.scale == pytest.approx(whole.report.scale, rel=near)
    assert found.names == whole.names
    for name in whole.names:
        assert_close(dense(found, name), dense(whole, name), near, name=name)
        mine, theirs = found.report[name], whole.report[name]
        assert mine.magnitudes == pytest.approx(theirs.magnitudes, rel=near)
        assert (mine.a is None) == (theirs.a is None)
        if mine.b:
            left = theirs.b.objective_after  # of one adapter nothing but rounding
            assert mine.b.objective_after == pytest.approx(left, rel=3e-3, abs=1e-5)
    mine, theirs = found.report.interference, whole.report.interference
    assert mine.norms == pytest.approx(theirs.norms, rel=1e-5)
    for row, other in zip(mine.spread, theirs.spread, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert [x.adapters for x in growing.additions] == [20, 2, 2]
    again = [x.again for x in growing.additions]
    assert again == [0, 0, 0] if given == {"orthogonalize": False} else again[1] > 0


def test_few_new_adapters_leave_those_before_unread(tmp_path, monkeypatch):
    paths = adapters(tmp_path, 122)[:-1]
    growing = in_goes(tmp_path / "state", paths, (120,), tol=0.01)
    seen = []
    measured = Descent.measure
    monkeypatch.setattr(
        Descent, "measure", lambda x, own: (seen.append(len(own.ranks)), measured(x, own))[1]
    )
    addition = growing.add_all(paths[120:])
    assert addition.again == 0
    assert 0 < addition.left <= 0.01
    assert sum(seen) == 2 * 2  # both modules' sides, of one adapter
    whole = dm.merge(
        paths,
        "do",
        descent="streamed",
        tol=1e-3,
        weights=[*[1.0 + k % 2 for k in range(120)], 1.0],
    )
    for name in whole.names:
        assert_close(dense(growing.merged(), name), dense(whole, name), 0.1, name=name)


def test_it_is_written_as_merges_are_and_bytes_repeat(tmp_path):
    paths = adapters(tmp_path, 12)
    for name in ("one", "other"):
        growing = in_goes(tmp_path / f"state-{name}", paths, (8, 4))
        growing.save(tmp_path / name, rank=4)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    for file in (STATE, TENSORS):
        one, other = (tmp_path / f"state-{name}" / file for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
    report = Streamed.open(tmp_path / "state-one").save(tmp_path / "third", rank=4).report
    assert any("added in 2 goes" in note for note in report.notes)
    assert report.recipe.options["descent"] == "streamed"
    assert len(report.recipe.adapters) == 12
    assert all(x.files for x in report.recipe.adapters)
    repeated = dm.run(dm.Recipe.read(tmp_path / "one", tmp_path), paths)
    merged = dm.load(tmp_path / "one")
    for module in repeated.names:
        a, b = merged.factors(module)
        assert len(a) == 4
        assert_close(b.double() @ a.double(), dense(repeated, module), 0.1, name=module)


def test_the_command_does_the_same(tmp_path, capsys):
    paths = [*map(str, adapters(tmp_path, 9))]
    state, out = str(tmp_path / "state"), str(tmp_path / "out")
    assert cli.main(["streamed", "start", state, "--tol", "0.002"]) == 0
    assert cli.main(["streamed", "add", state, *paths[:6]]) == 0
    capsys.readouterr()
    assert cli.main(["streamed", "add", state, *paths[6:], "--weight", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == 3
    assert cli.main(["streamed", "save", state, "-o", out, "--rank", "3", "--scale", "0.5"]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    report = Streamed.open(state).merged(rank=3, scale=0.5).report
    assert report.recipe.options["tol"] == 0.002
    assert report.recipe.weights == (*[1.0] * 6, *[2.0] * 3)
    assert report.scale == 0.5
    assert dm.load(out).modules["layers.0.q_proj"].rank == 3
    assert cli.main(["streamed", "add", state, paths[0], "--weight", "0"]) == cli.USAGE_ERROR
    assert len(capsys.readouterr().err.splitlines()) == 1


# Refusals


def state_of(tmp_path: Path) -> tuple[Streamed, list[Path]]:
    paths = adapters(tmp_path, 6)
    return in_goes(tmp_path / "state", paths, (4,)), paths


def refused(kind: type[DomergeError], match: str, growing: Streamed, new: Path) -> None:
    """Adding and saving, in one line each, and all is as it was."""
    for act in (
        lambda: growing.add_all([new]),
        lambda: growing.save(growing.folder.parent / "out"),
    ):
        with unchanged(growing.folder.parent), pytest.raises(kind, match=match) as info:
            act()
        assert "\n" not in str(info.value)


def test_an_adapter_that_has_changed_or_is_gone_is_refused(tmp_path):
    growing, paths = state_of(tmp_path)
    path = paths[1] / "adapter_model.safetensors"
    usual = path.read_bytes()
    path.write_bytes(usual[:-1] + bytes([usual[-1] ^ 1]))
    refused(AdapterError, "01.*is not what was added any more; restore it", growing, paths[4])
    path.write_bytes(usual)
    shutil.rmtree(paths[2])
    refused(DomergeError, "02", growing, paths[4])


def test_damaged_sums_are_refused(tmp_path):
    growing, paths = state_of(tmp_path)
    path = growing.folder / TENSORS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused(OptionError, r"is not what session\.json was written with", growing, paths[4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": 3}, "damaged"),
        ({"modules": {}}, "do not go together"),
        ({"additions": [{"adapters": 1}]}, "damaged"),
        ({"recipe": {"method": "do", "gamma": "x"}}, "damaged"),
        ({"kind": "sequential"}, "holds no streamed merge, but a session of kind 'sequential'"),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(change, message, tmp_path):
    growing, _ = state_of(tmp_path)
    path = growing.folder / STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(OptionError, match=message) as info:
        Streamed.open(growing.folder)
    assert "\n" not in str(info.value)


def test_numbers_that_do_not_fit_the_sums_are_refused(tmp_path):
    growing, paths = state_of(tmp_path)
    path = growing.folder / STATE
    plain = json.loads(path.read_text())
    plain["modules"]["layers.0.up_proj"] += 1
    path.write_text(json.dumps(plain))
    with unchanged(tmp_path), pytest.raises(OptionError, match="called otherwise"):
        Streamed.open(growing.folder).add_all([paths[4]])


def test_what_cannot_be_added_is_refused(tmp_path):
    growing, paths = state_of(tmp_path)
    with unchanged(tmp_path):
        with pytest.raises(OptionError, match="there are none"):
            growing.add_all([])
        with pytest.raises(OptionError, match="0 adds nothing"):
            growing.add_all([paths[4]], [0.0])
        with pytest.raises(AdapterError, match="is in memory; save it"):
            growing.add_all([dm.load(paths[4])])
        with pytest.raises(OptionError, match="one adapter, not a list"):
            growing.add_all(paths[4])
        with pytest.raises(OutputError, match="exists already"):
            Streamed.start(growing.folder)
        with pytest.raises(OptionError, match="save has no such option"):
            growing.save(tmp_path / "out", steps=3)
    with pytest.raises(OptionError, match="nothing was added"):
        Streamed.start(tmp_path / "fresh").merged()
    for given, what in (
        ({"penalty": "frobenius"}, "penalty"),
        ({"gamma": 0.0}, "gamma 0"),
        ({"directions": "ties"}, "directions"),
        ({"rank": 3}, "no option of a start"),
        ({"descent": "whole"}, "no option of a start"),
    ):
        with pytest.raises(OptionError, match=what):
            Streamed.start(tmp_path / "not", **given)
    assert not (tmp_path / "not").exists()


def test_a_factor_that_is_not_finite_is_refused(tmp_path):
    growing, _ = state_of(tmp_path)
    broken = write_adapter(
        tmp_path / "broken",
        {"layers.0.q_proj": (torch.full((2, 12), math.nan), torch.ones(10, 2))},
    )
    with unchanged(tmp_path), pytest.raises(AdapterError, match=r"broken.*NaN in lora_A"):
        growing.add_all([broken])
