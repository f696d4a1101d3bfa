"""The command line: the API's options by the API's names, and one line for every error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast import cli
from domerge_fast.backends import registry
from domerge_fast.methods import TABLE

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.up_proj": (12, 6), "layers.1.q_proj": (6, 8)}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters "a" and "b" in the current folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 4 - i, seed=i), lora_alpha=6)
    return ["a", "b"]


def weights_of(folder: str) -> bytes:
    return Path(folder, "adapter_model.safetensors").read_bytes()


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(dm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **{"stdout": subprocess.PIPE, **options},
    )


MERGES = {
    "": {},
    "--method linear --weights 1 -0.5": {"method": "linear", "weights": [1.0, -0.5]},
    "--weights -2 0.25 --scale -1.5": {"weights": [-2.0, 0.25], "scale": -1.5},
    "--gamma 0.5 --sides A --steps 3 --tol 1e-4": {
        "gamma": 0.5,
        "sides": "A",
        "steps": 3,
        "tol": 1e-4,
    },
    "--no-decouple --penalty frobenius": {"decouple": False, "penalty": "frobenius"},
    "--no-orthogonalize --renormalize": {"orthogonalize": False, "renormalize": True},
    "--method svd --rank 2 --dtype bfloat16": {"method": "svd", "rank": 2, "dtype": "bfloat16"},
    "--energy 0.7 --backend torch --device cpu": {
        "energy": 0.7,
        "backend": "torch",
        "device": "cpu",
    },
    "--base-model mine": {"base_model": "mine"},
}


@pytest.mark.parametrize("line", MERGES)
def test_merge_does_what_the_api_does(line, pair, capsys):
    assert cli.main(["merge", *pair, "-o", "out", *line.split()]) == 0
    assert capsys.readouterr().err == ""
    expected = dm.merge(pair, output="expected", **MERGES[line])
    assert weights_of("out") == weights_of("expected")
    written, wanted = (Path(f, "adapter_config.json").read_text() for f in ("out", "expected"))
    assert written == wanted
    recipe = json.loads(Path("out/README.md").read_text().split("```")[1].removeprefix("json"))
    for name, value in MERGES[line].items():
        assert recipe.get(name, value) == value
    assert expected.names == tuple(SHAPES)


@pytest.mark.parametrize(
    "line",
    [
        "merge a b --weights 1 -0.5 -o OUT",
        "merge -o OUT a b --weights 1 -0.5",
        "merge -o OUT --weights 1 -0.5 -- a b",
        "merge --weights 1 -0.5 -o OUT a b",
        "merge --weights 1 -.5 --output OUT a b",
        "merge -q --weights 1.0 -0.5 --output=OUT a b",
    ],
)
def test_weights_and_adapters_may_come_in_any_order(line, capsys):
    dm.merge(["a", "b"], weights=[1.0, -0.5], output="expected")
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().err == ""
    assert weights_of("OUT") == weights_of("expected")


def test_overwrite_is_asked_for(pair, capsys):
    assert cli.main(["merge", *pair, "-o", "out"]) == 0
    before = weights_of("out")
    assert cli.main(["merge", *pair, "-o", "out", "--scale", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert weights_of("out") == before
    assert cli.main(["merge", *pair, "-o", "out", "--scale", "2", "--overwrite"]) == 0
    assert weights_of("out") != before


def flags(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([command, "--help"]) == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_names_are_those_of_the_api(capsys):
    given = inspect.signature(dm.merge).parameters.keys() - {
        "adapters",
        "progress",
        "method_options",
    }
    shown = flags("merge", capsys)
    for name in given:
        assert re.search(rf"--{name.replace('_', '-')}\b", shown), name
    defaults: dict[str, dict[str, object]] = {}
    for method in TABLE.values():
        assert method.name in shown
        for field in dataclasses.fields(method.options):
            defaults.setdefault(field.name, {})[method.name] = field.default
            assert re.search(rf"--{field.name.replace('_', '-')}\b", shown), field.name
            assert f"{field.metadata['help']} (default: " in shown
            assert all(choice in shown for choice in field.metadata["choices"])
    for values in defaults.values():
        alike = len(set(values.values())) == 1
        each = ", ".join(f"{default} {method}" for method, default in values.items())
        assert f"(default: {next(iter(values.values())) if alike else each})" in shown
    shown = flags("inspect", capsys)
    for name in inspect.signature(dm.inspect).parameters.keys() - {"adapters", "progress"}:
        assert re.search(rf"--{name.replace('_', '-')}\b", shown), name


def test_merge_ends_with_a_summary(pair, capsys):
    assert cli.main(["merge", *pair, "-o", "out", "--energy", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(re.split(r"  +", line, maxsplit=1) for line in lines[:-1])
    report = dm.merge(pair, energy=0.5).report
    ranks = sorted({module.rank for module in report.modules.values()})
    assert found["method"] == "do"
    assert found["adapters"] == "2"
    assert found["modules"] == "3"
    assert found["rank"] in (f"{ranks[0]}", f"{ranks[0]} to {ranks[-1]}")
    assert found["energy kept"] == f"{100 * report.energy_kept:.2f} %"
    assert "of the cross-adapter energy left" in found["orthogonalized A sides"]
    assert float(found["seconds"]) >= 0
    assert lines[-1] == "written to out"


def test_quiet_says_nothing(pair, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["merge", *pair, "-o", "out", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path("out/README.md").exists()


@pytest.mark.parametrize("command", [["merge", "-o", "out"], ["inspect"]], ids=lambda c: c[0])
def test_a_terminal_sees_modules_and_time_left(command, pair, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*command, *pair]) == 0
    shown = capsys.readouterr().err
    assert "0/3 [00:00<" in shown
    assert "modules/s" in shown


def test_inspect_prints_the_tables_of_the_api(pair, capsys):
    assert cli.main(["inspect", *pair, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = dm.inspect(pair)
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert found["adapters"] == pair
    assert cli.main(["inspect", *pair]) == 0
    shown = capsys.readouterr().out
    for table in (expected.rows, expected.columns, expected.cosine):
        assert re.search(rf"^1 +{table[0][0]:.3f} +{table[0][1]:.3f}$", shown, re.MULTILINE)
        assert re.search(rf"^2 +{table[1][0]:.3f} +{table[1][1]:.3f}$", shown, re.MULTILINE)
    for k in (0, 1):
        numbers = " +".join(f"{v:.4g}" for v in (expected.norms[k], *expected.spread[k]))
        assert re.search(rf"^{k + 1} +{pair[k]} +{numbers}$", shown, re.MULTILINE)


def test_methods_lists_each_with_one_line(capsys):
    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(TABLE)
    for name, row in found.items():
        method = TABLE[name]
        assert (row["summary"], row["cost"]) == (method.summary, method.cost)
        assert row["cost"]
        assert row["source"]
        assert row["returns"] in ("exact", "rank", "dense", "inner")
    assert cli.main(["methods"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "method"
    for line, (name, row) in zip(lines, found.items(), strict=True):
        assert re.split(r"  +", line)[:4] == [name, row["summary"], row["returns"], row["cost"]]


def test_doctor_shows_versions_and_every_backend(capsys, monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["domerge-fast"] == dm.__version__
    assert found["torch"] == torch.__version__
    for name, status in dm.backends().items():
        assert found[f"backend {name}"].startswith("ok" if status.available else "off: ")
    assert ("instruction set" in found) == dm.backends()["cpu"].available
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines] == list(found)


def test_doctor_says_why_a_backend_is_off_and_what_the_environment_chose(capsys, monkeypatch):
    broken = dataclasses.replace(registry.TABLE["cpu"], why_not=lambda: "it does not import")
    monkeypatch.setattr(registry, "TABLE", MappingProxyType({**registry.TABLE, "cpu": broken}))
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend cpu"].startswith("off: it does not import")
    assert found["DOMERGE_BACKEND is set"] == "reference"
    assert "instruction set" not in found


WRONG = {
    "": "the following arguments are required: COMMAND; see 'domerge-fast --help'",
    "merg a b -o out": "invalid choice: 'merg' (choose from 'merge', 'inspect', 'sequential',",
    "merge a b": "-o/--output; see 'domerge-fast merge --help'",
    "merge -o out": "required: ADAPTER; see 'domerge-fast merge --help'",
    "merge a b -o out --gama 2": "'--gama' is not understood, did you mean '--gamma'?",
    "merge a b -o out --weights 1 x": "--weights: invalid float value: 'x'",
    "merge a b -o out --steps 2.5": "--steps: invalid int value: '2.5'",
    "merge --weights 1 1 a b -o out": "--weights: invalid float value: 'a'",
    "inspect a b --jsno": "'--jsno' is not understood, did you mean '--json'?",
    "doctor now": "'now' is not understood; see 'domerge-fast doctor --help'",
    "merge a none -o out": "adapter 'none': no such folder; check the path",
    "merge a b -o out --method linaer": "'linaer' is not known; did you mean 'linear'?",
    "merge a b -o out --method linear --gamma 2": "method 'linear' has no such option",
    "merge a b -o a": "is one of the adapters to merge; give another folder",
    "inspect a none": "adapter 'none': no such folder; check the path",
    "inspect a b --device tpu": "option 'device': torch cannot use 'tpu' here; use 'cpu'",
}


@pytest.mark.parametrize("line", WRONG)
def test_an_error_is_one_line_and_exit_code_2(line, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("domerge-fast: error: ")
    assert printed.err.endswith("\n")
    assert len(printed.err.splitlines()) == 1
    assert WRONG[line] in printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_shows_where_an_error_comes_from(flag, capsys):
    assert cli.main(["merge", "a", "none", "-o", "out", flag]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("domerge_fast/adapters/peft.py" in line for line in lines)
    assert lines[-1].startswith("domerge-fast: error: adapter 'none': no such folder")


def test_help_and_version_are_printed(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (summary, *_) in cli.COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{summary}", shown, re.MULTILINE)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"domerge-fast {dm.__version__}\n"


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; from domerge_fast import cli; code = cli.main(['--help']);"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'tqdm'} & set(sys.modules);"
        "sys.exit(code or str(heavy) * bool(heavy) or time.process_time() > 0.5)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "merge adapters into one" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = python("-m", "domerge_fast.cli", "--help", stdout=writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_real_process_merges(pair):
    done = python("-m", "domerge_fast.cli", "merge", *pair, "-o", "out", "--weights", "1", "-2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("written to out\n")
    dm.merge(pair, weights=[1.0, -2.0], output="expected")
    assert weights_of("out") == weights_of("expected")


def test_a_real_process_fails_in_one_line(pair, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = python("-m", "domerge_fast.cli", "merge", *pair, "-o", "b/README.md/out", "--rank", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("domerge-fast: error: option 'rank': 0 is too small; use at least 1\n")
    assert sorted(tmp_path.rglob("*")) == before
