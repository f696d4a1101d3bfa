"""What other packages add: found where it is named or listed, and in nobody's way."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.make import random_factors, write_adapter
from test_documentation import ROOMS, block, shown

import domerge_fast as dm
from domerge_fast import OptionError, ops, registry
from domerge_fast.formats import FORMATS
from domerge_fast.methods import TABLE
from domerge_fast.methods.base import Method
from domerge_fast.registry import Registry

HERE = Path(dm.__file__).parents[1]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{0}"
version = "1"

[tool.setuptools]
packages = ["{0}"]

"""
SPOILED = """
[project.entry-points.domerge_fast]
"method.do" = "spoiled:METHOD"
"method.gone" = "spoiled.gone:METHOD"
"method.wrong" = "spoiled:NUMBER"
"format.gone" = "spoiled.gone:FORMAT"
"command.gone" = "spoiled.gone:COMMAND"
"metod.mine" = "spoiled:METHOD"
"""


def absolute(text: str, room: str) -> str:
    """A module of a room with imports as another package writes them."""
    parts = ["domerge_fast", *room.split(".")]

    def full(found: re.Match[str]) -> str:
        above = parts[: len(parts) + 1 - len(found[2])]
        return f"{found[1]}from {'.'.join([*above, *filter(None, [found[3]])])} import"

    return re.sub(r"^( *)from (\.+)(\S*) import", full, text, flags=re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two installed packages: what CONTRIBUTING shows, and one that is broken."""
    folder = tmp_path_factory.mktemp("packages")
    for name, points in (("addon", shown("toml")[0]), ("spoiled", SPOILED)):
        (folder / name / name).mkdir(parents=True)
        (folder / name / "pyproject.toml").write_text(PROJECT.format(name) + points)
    for name, room in ROOMS.items():
        text = absolute(block(name), room)
        (folder / "addon" / "addon" / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "addon" / "addon" / "__init__.py").touch()
    (folder / "spoiled" / "spoiled" / "__init__.py").write_text("NUMBER = METHOD = 3\n")
    (folder / "spoiled" / "spoiled" / "gone.py").write_text("raise RuntimeError('no licence')\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    install += ["--disable-pip-version-check", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*install, str(folder / "addon"), str(folder / "spoiled")], check=True)
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the packages, in a folder."""
    paths = {"PYTHONPATH": os.pathsep.join([str(HERE), str(site)])}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, check=False
    )


SCRIPT = """
import json, sys
import domerge_fast as dm

given = {"share": 0.3, "pre": ["halve"], "post": ["double"], "backend": "wide", "format": "factors"}
merged = dm.merge(["one", "two"], "strong", output="api", **given)

def refusal(method):
    try:
        dm.merge(["one", "two"], method)
    except dm.OptionError as error:
        return str(error)

print(json.dumps({
    "backend": merged.report.recipe.backend,
    "rows": [list(dm.list_methods()), list(dm.list_formats()), list(dm.list_backends())],
    "refusals": [refusal(method) for method in ("gone", "wrong", "strung")],
    "do": dm.merge(["one", "two"], "do").report.recipe.method,
}))
"""


@pytest.fixture(scope="module")
def found(site, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("merges")
    for seed, name in enumerate(("one", "two")):
        write_adapter(folder / name, random_factors({"x": (24, 40)}, 4, seed=seed))
    ran = run(site, folder, "-c", SCRIPT)
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(folder=folder, **json.loads(ran.stdout))


def test_rows_of_an_installed_package_are_listed_after_ours(found):
    methods, formats, backends = found.rows
    assert methods == [*TABLE, "strong", "vote"]
    assert formats == [*FORMATS.own, "factors"]
    assert backends[-1] == "wide"


def test_they_merge_from_the_command_as_from_the_api(found, site):
    assert found.backend == "wide"
    words = "-m domerge_fast merge one two -o cli --method strong --share 0.3 --pre halve --post "
    words += "double --backend wide --format factors"
    ran = run(site, found.folder, *words.split())
    assert ran.returncode == 0, ran.stderr
    api, cli = (
        torch.load(found.folder / out / "factors.pt")["factors"]["x"] for out in ("api", "cli")
    )
    assert all(map(torch.equal, api, cli))
    assert 0 < len(api[0]) < 8


def test_so_do_their_commands(found, site):
    ran = run(site, found.folder, "-m", "domerge_fast", "modules", "one", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"modules": ["x"]}
    ran = run(site, found.folder, "-m", "domerge_fast", "gone")
    assert ran.returncode == 2
    assert "'gone' cannot be used here; the command 'gone' of package 'spoiled'" in ran.stderr


def test_what_is_broken_is_refused_in_one_line_where_it_is_asked_for(found):
    gone, wrong, strung = found.refusals
    start = "option 'method': 'gone' cannot be used here; the method 'gone' of package 'spoiled' "
    assert gone == start + ("does not import (RuntimeError: no licence); mend or uninstall it")
    assert "'wrong' of package 'spoiled' is a int, no Method; mend or uninstall it" in wrong
    assert "'strung' is not known; did you mean 'strong'?" in strung
    assert found.do == "do"


def test_doctor_tells_all_that_is_broken(found, site):
    ran = run(site, found.folder, "-m", "domerge_fast", "doctor", "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    broken = {label: text for label, text in told.items() if "package 'spoiled'" in text}
    labels = ["method.do", "method.gone", "method.wrong", "format.gone", "command.gone"]
    assert {*broken} == {*labels, "metod.mine"}
    assert "has the name of one of ours" in broken["method.do"]
    assert "kinds are: method, format, " in broken["metod.mine"]
    assert all(text.startswith("off: ") for text in broken.values())


def points(**values: str) -> dict[str, dict[str, list[importlib.metadata.EntryPoint]]]:
    found: dict[str, list[Any]] = {}
    for name, value in values.items():
        point = importlib.metadata.EntryPoint(f"method.{name}", value, registry.GROUP)
        found.setdefault(name.rstrip("_"), []).append(point)
    return {"method": found}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"other": "domerge_fast.methods.do:METHOD"}, "is called 'do' in its row"),
        ({"twice": "a:B", "twice_": "c:D"}, "two have one name; uninstall one"),
        ({"none": "domerge_fast.methods.do:NOTHING"}, "does not import (AttributeError"),
    ],
)
def test_a_row_of_another_package_that_is_none(values, words, monkeypatch):
    monkeypatch.setattr(registry, "_entry_points", lambda: points(**values))
    rows = Registry("method", Method, [TABLE["linear"]])
    (name,) = rows.refused
    assert list(rows) == ["linear"]
    assert words in str(rows.why_not(name))
    with pytest.raises(OptionError, match=f"'{name}' cannot be used here; the method '{name}' of"):
        rows.choose("method", name)


def test_nothing_is_looked_for_where_a_name_is_ours(monkeypatch):
    monkeypatch.setattr(registry, "_entry_points", lambda: pytest.fail("looked"))
    rows = Registry("method", Method, TABLE.own.values())
    assert rows.choose("method", "do") is TABLE["do"]
    assert "linear" in rows
    assert rows.why_not("do") is None


def test_a_name_that_is_no_text_is_unknown():
    with pytest.raises(OptionError, match=r"option 'method': \['do'\] is not known"):
        TABLE.choose("method", ["do"])


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_an_op_is_refused_where_the_environment_asks_for_what_there_is_not(backend, monkeypatch):
    monkeypatch.setenv("DOMERGE_CPU_ISA", "mmx")
    with pytest.raises(OptionError, match="'DOMERGE_CPU_ISA': 'mmx' cannot run here; use one of"):
        ops.largest([torch.ones(2, 3)], backend=backend)
