"""What the documents say of methods and options, against those there are."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.close import distance
from support.make import write_adapter
from support.merges import adapters, at_one, dense
from support.shapes import CASES
from test_composition import INNER, smallest_kept, total

import domerge_fast as dm
from domerge_fast import AdapterError, OptionError, OutputError
from domerge_fast.backends import registry
from domerge_fast.cli import main as cli
from domerge_fast.cli.commands import COMMANDS
from domerge_fast.engine.scaling import DAMPING
from domerge_fast.formats import FORMATS
from domerge_fast.formats.format import FORMS
from domerge_fast.lists import FormatInfo
from domerge_fast.methods import TABLE, auto
from domerge_fast.methods.base import Method, ScaleRule
from domerge_fast.methods.decoupled import ABOVE
from domerge_fast.methods.spectral import svc
from domerge_fast.methods.steps import POST, PRE
from domerge_fast.runtimes import RUNTIMES

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods.md"
CASE = CASES["odd d"]


def options(row: Method) -> set[str]:
    return {f.name for f in dataclasses.fields(row.options)}


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head starts with `first`, without head and rule."""
    table = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def method_rows() -> dict[str, list[str]]:
    spaces, entries = METHODS.read_text(encoding="utf-8").split("## Entry by entry")
    entries = entries.split("## When")[0]
    return {c[0].strip("`"): c for text in (spaces, entries) for c in rows(text, "method")}


def words(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


WRITTEN = re.compile(r"<!-- (\w+) -->.*?<!-- end \1 -->|^```.*?^```$|\(https?:[^)]*\)", re.S | re.M)
"""What a program writes into a page, code, and addresses."""
COMMAND = re.compile(r"^    (?:domerge-fast|torchrun|make|pip) .*$", re.M)
FIGURE = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])|\d+ %")


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md", "docs/quickstart.md"])
def test_figures_are_written_by_programs_or_constants_of_the_code(page):
    python = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    constants = [auto.FAR, auto.POWER, DAMPING, ScaleRule().constant, svc.SCALE.constant, ABOVE]
    known = {*python, *(f"{x:g}" for x in constants)}
    text = COMMAND.sub("", WRITTEN.sub("", (ROOT / page).read_text(encoding="utf-8")))
    text = text.replace("arXiv 2505.15875", "")
    assert {x for x in FIGURE.findall(text) if x not in known} == set()
    assert page != "docs/choosing.md" or known - {*python} <= {*FIGURE.findall(text)}


def test_the_list_of_methods_is_whole():
    assert set(method_rows()) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_method_s_options_and_source_are_those_it_has(name):
    _, *cells, source = method_rows()[name]
    listed = next((words(c) for c in reversed(cells) if not c or c.startswith("`")), set())
    assert listed == options(TABLE[name])
    stated = TABLE[name].source.removeprefix("arXiv ")
    assert stated in source
    if TABLE[name].source.startswith("arXiv"):
        assert f"https://arxiv.org/abs/{stated}" in source


def test_steps_and_forms_are_those_there_are():
    text = METHODS.read_text(encoding="utf-8")
    assert [cells[0].strip("`") for cells in rows(text, "`pre`")] == list(PRE)
    assert [cells[0].strip("`") for cells in rows(text, "`post`")] == ["svc", *POST]
    assert [cells[0].strip('"') for cells in rows(text, "`form`")] == list(FORMS)


def test_the_list_of_formats_is_whole():
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    rows_of = {cells[0].strip("`"): cells[1:] for cells in rows(text, "format")}
    assert [*rows_of] == list(FORMATS)
    for name, (read, written, _) in rows_of.items():
        assert bool(read) == (FORMATS[name].read is not None), name
        assert bool(written) == (FORMATS[name].write is not None), name


@pytest.mark.parametrize(
    ("document", "least"), [("docs/methods.md", 3), ("README.md", 3), ("docs/files.md", 1)]
)
def test_the_commands_shown_are_understood(document, least, tmp_path, monkeypatch, capsys):
    """Run on adapters of a small module; a base model is left to other tests."""
    monkeypatch.chdir(tmp_path)
    for name, a, b in zip(("a", "b", "adapters/p"), CASE.a, CASE.b, strict=True):
        write_adapter(tmp_path / name, {"x": (a, b)})
    lines = re.findall(
        r"^    domerge-fast (merge .*?)(?:  +#.*)?$", (ROOT / document).read_text(), re.M
    )
    shown = [line for line in lines if "--base" not in line]
    assert len(shown) >= least
    for k, line in enumerate(shown):
        arguments = line.replace("adapters/*", "a b").split()
        arguments[arguments.index("-o") + 1] = f"out{k}"
        assert cli.main([*arguments, "--backend", "torch"]) == 0, line


# CONTRIBUTING

ROOMS = {
    "strong": "methods.spectral",
    "vote": "methods.entrywise",
    "factors": "formats",
    "small": "runtimes",
    "wide": "backends",
    "steps": "methods.steps",
    "modules": "cli",
}
"""Where the blocks go that the document shows, in its order."""


def written(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    """The block as a file of the package."""
    file = folder / f"{name}.py"
    file.write_text(block(name), encoding="utf-8")
    full = f"domerge_fast.{ROOMS[name]}.{name}"
    spec = importlib.util.spec_from_file_location(full, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, full, module)
    spec.loader.exec_module(module)
    return module


def block(name: str) -> str:
    return dict(zip(ROOMS, shown("python"), strict=True))[name]


def shown(language: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(each) for each in found]


@pytest.fixture
def method(monkeypatch, tmp_path) -> Callable[[str], Method]:
    """A method of the document, with its entry in the table."""

    def added(name: str) -> Method:
        row = written(name, monkeypatch, tmp_path).METHOD
        monkeypatch.setitem(TABLE.own, row.name, row)
        return row

    return added


def test_the_method_in_r_by_r_coordinates(method):
    row = method("strong")
    assert dm.list_methods()[row.name].summary == row.summary
    merged = at_one(adapters({"x": CASE}), row.name, share=0.5, weights=CASE.weights)
    u, s, vh = torch.linalg.svd(INNER["linear"](CASE.deltas(), CASE.weights))
    k = int((s >= 0.5 * s[0]).sum())
    assert 0 < k < sum(CASE.ranks)
    assert distance(dense(merged, "x"), u[:, :k] @ s[:k].diag() @ vh[:k]) < 1e-5
    assert merged.report["x"].rank == k


def test_the_method_that_is_a_rule_for_entries(method):
    row = method("vote")
    given = {"density": 0.3, "weights": CASE.weights, "form": "deltas", "backend": "torch"}
    merged = at_one(adapters({"x": CASE}), row.name, **given)
    deltas = CASE.deltas()
    kept = [torch.where(v.abs() >= smallest_kept([v], 0.3), v, 0.0) for v in deltas]
    sign = torch.where(total([v.sign() for v in kept]) >= 0, 1.0, -1.0)
    agreeing = [(v.sign() == sign).double() for v in kept]
    parts = zip(CASE.weights, kept, agreeing, strict=True)
    expected = total([w * v * yes for w, v, yes in parts]) / total(agreeing).clamp_min(1)
    assert distance(merged.delta("x").double(), expected) < 1e-6


def folders_of_case(folder: Path) -> list[str]:
    for name, a, b in zip("pqr", CASE.a, CASE.b, strict=True):
        write_adapter(folder / name, {"x": (a, b)})
    return [str(folder / name) for name in "pqr"]


def test_a_new_method_has_its_flags_and_works_inside_others(method, tmp_path):
    row = method("strong")
    folders, out = folders_of_case(tmp_path), str(tmp_path / "out")
    arguments = ["--method", "core", "--inner", row.name, "--share", "0.5"]
    assert cli.main(["merge", *folders, "-o", out, *arguments]) == 0
    written = dm.load(out).factors("x")
    expected = dm.merge(folders, "core", inner=row.name, share=0.5).factors("x")
    assert all(map(torch.equal, written, expected))


def test_a_new_format_is_read_and_written(monkeypatch, tmp_path):
    row = written("factors", monkeypatch, tmp_path).FORMAT
    monkeypatch.setitem(FORMATS.own, row.name, row)
    assert dm.list_formats()[row.name] == FormatInfo(row.summary, "adapter", True, True, None)
    folders, out = folders_of_case(tmp_path), str(tmp_path / "out")
    assert cli.main(["merge", *folders, "-o", out, "--method", "linear", "--format", row.name]) == 0
    assert sorted(os.listdir(out)) == ["README.md", "factors.pt"]
    expected = dm.merge(folders, "linear")
    assert all(map(torch.equal, dm.load(out).factors("x"), expected.factors("x")))
    again = dm.merge([out], "linear", output=tmp_path / "again", format=row.name)
    assert all(map(torch.equal, again.factors("x"), expected.factors("x")))
    for force in (False, True):
        with pytest.raises(OutputError, match="one of the adapters to merge"):
            dm.merge([out], "linear", output=out, overwrite=True, force=force)
    twice = str(tmp_path / "twice")
    dm.merge([out, out], "linear", output=twice)  # in the format that they have
    dm.merge([out], "linear", output=twice, overwrite=True)
    assert sorted(os.listdir(twice)) == ["README.md", "factors.pt"]
    assert dm.load(twice).factors("x")[0].shape == expected.factors("x")[0].shape
    Path(twice, "factors.pt").unlink()
    for damaged in ([1], {"factors": [1]}, {"factors": {"x": (CASE.a[0],)}}):
        torch.save(damaged, Path(twice, "factors.pt"))
        with pytest.raises(AdapterError):
            dm.load(twice)


def test_a_new_runtime_is_asked_for_and_checked(monkeypatch, tmp_path):
    row = written("small", monkeypatch, tmp_path).RUNTIME
    monkeypatch.setitem(RUNTIMES.own, row.name, row)
    folders, out = folders_of_case(tmp_path), str(tmp_path / "out")
    flags = ["merge", *folders, *folders, "-o", out, "--method", "linear", "--for", row.name]
    assert cli.main(flags) == 2
    assert not os.path.exists(out)
    assert cli.main([*flags, "--rank", "8"]) == 0
    assert dm.check(out, row.name).ok
    assert dm.list_runtimes()[row.name].demands["largest rank"] == "8, 16"


def test_a_new_backend_runs_the_ops(monkeypatch, tmp_path):
    module = written("wide", monkeypatch, tmp_path)
    monkeypatch.setitem(registry.TABLE.own, module.BACKEND.name, module.BACKEND)
    assert dm.list_backends()["wide"].available
    assert [
        op for op in registry.OPS if not callable(getattr(registry.load("wide"), op, None))
    ] == []
    taken = []
    usual = module.gram
    monkeypatch.setattr(
        module, "gram", lambda *args, **given: taken.append(1) or usual(*args, **given)
    )
    merged = dm.merge(adapters({"x": CASE}), "tsvm", backend="wide")
    assert merged.report.recipe.backend == "wide"
    assert taken
    expected = dm.merge(adapters({"x": CASE}), "tsvm", backend="torch")
    assert distance(dense(merged, "x"), dense(expected, "x")) < 1e-5
    with pytest.raises(OptionError, match="'wide' runs on cpu, not on cuda"):
        registry.choose("wide", "cuda")


def test_new_steps_come_before_and_after_every_method(monkeypatch, tmp_path):
    module = written("steps", monkeypatch, tmp_path)
    monkeypatch.setitem(PRE.own, module.BEFORE.name, module.BEFORE)
    monkeypatch.setitem(POST.own, module.AFTER.name, module.AFTER)
    given = adapters({"x": CASE})
    plain = dense(at_one(given, "linear"), "x")
    halved = dense(at_one(given, "linear", pre=["halve"]), "x")
    assert distance(2 * halved, plain) < 1e-6
    both = dense(at_one(given, "linear", pre=["halve"], post=["double"]), "x")
    assert distance(both, plain) < 1e-6


def test_a_new_command_has_its_help_and_runs(monkeypatch, tmp_path, capsys):
    row = written("modules", monkeypatch, tmp_path).COMMAND
    monkeypatch.setitem(COMMANDS.own, row.name, row)
    folder = folders_of_case(tmp_path)[0]
    assert cli.main(["modules", folder]) == 0
    assert capsys.readouterr().out == "x\n"
    assert cli.main(["modules", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"modules": ["x"]}
    assert cli.main(["--help"]) == 0
    assert "list the modules of an adapter" in capsys.readouterr().out
