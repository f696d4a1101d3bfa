"""The command line: the API's options by the API's names, and one line for every error."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
from safetensors.torch import load_file
from support.close import assert_close
from support.make import random_factors, write_adapter
from support.timing import least

import domerge_fast as dm
from domerge_fast.backends import registry
from domerge_fast.bench import bounds
from domerge_fast.cli import flags as known_flags
from domerge_fast.cli import main as cli
from domerge_fast.cli import streams
from domerge_fast.methods import TABLE

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.up_proj": (12, 6), "layers.1.q_proj": (6, 8)}


@pytest.fixture(autouse=True)
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters "a" and "b" in the current folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 4 - i, seed=i), lora_alpha=6)
    return ["a", "b"]


def weights_of(folder: str) -> bytes:
    return Path(folder, "adapter_model.safetensors").read_bytes()


def check_weights(found: str, expected: str) -> None:
    """Of a merge in another process, where libraries may round otherwise."""
    one, other = (load_file(f"{name}/adapter_model.safetensors") for name in (found, expected))
    assert one.keys() == other.keys()
    for key in other:
        assert_close(one[key], other[key], 1e-5, name=key)


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
    "--method do --gamma 0.5 --sides A --steps 3 --tol 1e-4": {
        "method": "do",
        "gamma": 0.5,
        "sides": "A",
        "steps": 3,
        "tol": 1e-4,
    },
    "--method do --no-decouple --penalty frobenius": {
        "method": "do",
        "decouple": False,
        "penalty": "frobenius",
    },
    "--method do --no-orthogonalize --renormalize": {
        "method": "do",
        "orthogonalize": False,
        "renormalize": True,
    },
    "--method iso_c --scale auto": {"method": "iso_c", "scale": "auto"},
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
        "merge a b --weights 1 -5e-1 -o OUT",
        "merge --weights 1 -5.e-1 -o OUT a b",
        "merge a b -o OUT --weights 1. -.05E+1",
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


def unwrapped(shown: str) -> list[str]:
    """The lines of a table, with those that go on joined to what they go on from."""
    return re.sub(r"\n {2,}(?=\S)", " ", shown).splitlines()


@pytest.mark.parametrize(
    "command",
    [
        "-v merge no -o out",
        "merge no -o out -v",
        "inspect --verbose no",
        "-v sequential add no no",
        "sequential -v add no no",
        "sequential add no no --verbose",
        "sequential save no -o out -v",
        "sequential start a/adapter_config.json/b -v",
    ],
)
def test_a_traceback_is_shown_wherever_it_is_asked_for(command, pair, capsys):
    assert cli.main(command.split()) == cli.USAGE_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "understood" not in lines[-1]


def test_flags_of_an_action_are_suggested_from_its_own(capsys):
    assert cli.main(["sequential", "add", "state", "a", "--wieght", "2"]) == cli.USAGE_ERROR
    line = capsys.readouterr().err
    assert "did you mean '--weight'" in line
    assert line.endswith("see 'domerge-fast sequential add --help'\n")


@pytest.mark.parametrize("command", ["merge {a} -o {out}", "inspect {a}", "sequential start s"])
def test_a_current_folder_that_is_gone_is_refused(command, pair, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    words = command.format(a=tmp_path / "a", out=tmp_path / "out").split()
    assert cli.main(words) == cli.USAGE_ERROR
    line = capsys.readouterr().err
    assert line.startswith("domerge-fast: error: the current folder cannot be used (")
    assert line.endswith("; change to another (cd)\n")
    assert not (tmp_path / "out").exists()


def test_names_that_were_bridged_are_said_by_inspect_and_when_one_is_added(tmp_path, capsys):
    for folder, name in (("plain", "layers.0.up"), ("causal", "model.layers.0.up")):
        factors = random_factors({name: (6, 8)}, 2)
        write_adapter(tmp_path / folder, factors, base_model_name_or_path="base")
    both = [str(tmp_path / folder) for folder in ("plain", "causal")]
    assert cli.main(["inspect", *both]) == 0
    assert "note: adapter 2 (causal): 'model.layers' is 'layers'" in capsys.readouterr().out
    assert cli.main(["inspect", *both, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1
    assert cli.main(["sequential", "start", str(tmp_path / "state")]) == 0
    assert cli.main(["sequential", "add", str(tmp_path / "state"), *both]) == 0
    assert "note: adapter 2 (causal): 'model.layers' is 'layers'" in capsys.readouterr().out


def test_an_option_that_a_note_tells_is_not_broken():
    note = "written with rank 12: serve it with vLLM's --max-lora-rank 16"
    for lines in (streams.wrap(12 * " " + note + note), streams.table([("note" * 5, note)])):
        assert sum("--max-lora-rank" in line for line in lines) >= 1
        assert not any(line.endswith("-") for line in lines)


def test_control_characters_of_an_output_s_name_are_not_printed(pair, tmp_path, capsys):
    assert cli.main(["merge", *map(str, pair), "-o", str(tmp_path / "a\nb\x1b[31m")]) == 0
    shown = capsys.readouterr().out
    assert "a\\nb\\x1b[31m" in shown
    assert "\x1b" not in shown


def test_merge_ends_with_a_summary(pair, capsys):
    assert cli.main(["merge", *pair, "-o", "out", "--method", "do", "--energy", "0.5"]) == 0
    shown = capsys.readouterr().out
    lines = unwrapped(shown)
    found = dict(re.split(r"  +", line, maxsplit=1) for line in lines[:-1])
    report = dm.merge(pair, "do", energy=0.5).report
    ranks = sorted({module.rank for module in report.modules.values()})
    assert found["method"] == "do"
    assert found["scale"] == f"{report.scale:g}, found from the adapters"
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


@pytest.mark.parametrize(
    ("command", "bar"),
    [(["merge", "-o", "out"], "0 of 6"), (["inspect"], "0 of 3")],
    ids=["merge", "inspect"],
)
def test_a_terminal_sees_modules_and_time_left(command, bar, pair, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(tqdm, "tqdm", functools.partial(tqdm.tqdm, mininterval=0))
    assert cli.main([*command, *pair]) == 0
    first, *_, last, _, _ = capsys.readouterr().err.split("\r")[1:]
    assert first.endswith(bar)
    assert re.search(r"[\d.]+ modules/s, 00:00 left$", last)


def test_a_bar_is_as_long_as_what_is_gone_through(monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    dm.merge(["a", "b"], "iso_c", progress=True)
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6)]


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
    head, *lines = unwrapped(capsys.readouterr().out)
    assert head.split()[0] == "method"
    for line, (name, row) in zip(lines, found.items(), strict=True):
        shown_name, returns, text = re.split(r"  +", line)
        assert (shown_name, returns) == (name, row["returns"])
        assert text.startswith(f"{row['summary']} ({row['source']}); {row['cost']}")
        assert text.endswith(row["needs"])


def test_doctor_shows_versions_and_every_backend(capsys, monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["domerge-fast"] == dm.__version__
    assert found["torch"] == torch.__version__
    for name, status in dm.list_backends().items():
        assert found[f"backend {name}"].startswith("ok" if status.available else "off: ")
    assert ("instruction set" in found) == dm.list_backends()["cpu"].available
    assert cli.main(["doctor"]) == 0
    lines = unwrapped(capsys.readouterr().out)
    assert [re.split(r"  +", line)[0] for line in lines] == list(found)


def test_doctor_says_why_a_backend_is_off_and_what_the_environment_chose(capsys, monkeypatch):
    broken = dataclasses.replace(registry.TABLE["cpu"], why_not=lambda: "it does not import")
    monkeypatch.setitem(registry.TABLE.own, "cpu", broken)
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend cpu"].startswith("off: it does not import")
    assert found["DOMERGE_BACKEND is set"] == "reference"
    assert "instruction set" not in found


WRONG = {
    "": "the following arguments are required: COMMAND; see 'domerge-fast --help'",
    "merg a b -o out": "option 'command': 'merg' is not known; did you mean 'merge'? use one of:",
    "merge a b": "-o/--output; see 'domerge-fast merge --help'",
    "merge -o out": "required: ADAPTER; see 'domerge-fast merge --help'",
    "merge a b -o out --gama 2": "'--gama' is not understood, did you mean '--gamma'?",
    "merge a b -o out --weights 1 x": "--weights: invalid float value: 'x'",
    "merge a b -o out --weights 1 -inf": "option 'weights': -inf is not a finite number; give one",
    "merge a b -o out --scale -nan": "option 'scale': nan is not a finite number; give one",
    "merge a b -o out --method do --gamma -1e-3": "'gamma': -0.001 is too small; use at least 0",
    "sequential add s a --weight -Infinity": "/s' holds no sequential merge",
    "merge a b -o out --steps 2.5": "--steps: invalid int value: '2.5'",
    "merge --weights 1 1 a b -o out": "--weights: invalid float value: 'a'",
    "merge a b -o out --svd-rank 4": "'--svd-rank' is not understood, it is '--rank' here; see",
    "merge a b -o out --svd_rank=4": "'--svd_rank' is not understood, it is '--rank' here; see",
    "merge a b -o out --lambda 2": "'--lambda' is not understood, it is '--scale' here; see",
    "merge a b -o out --method dare_linear": "'dare_linear' is not known; it is 'dare' here; use",
    "merge a b -o out --int8-mask": "'--int8-mask' is not understood, nothing here needs it; see",
    "inspect a b --svd-rank 4": "'--svd-rank' is not understood; see",
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
    assert any("domerge_fast/formats/peft/read.py" in line for line in lines)
    assert lines[-1].startswith("domerge-fast: error: adapter 'none': no such folder")


def test_help_and_version_are_printed(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, row in cli.COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{row.summary[:40]}", shown, re.MULTILINE)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"domerge-fast {dm.__version__}\n"


@pytest.mark.parametrize("line", ["--help", *(f"{name} --help" for name in cli.COMMANDS)])
def test_help_is_quick_and_imports_nothing_heavy(line):
    code = (
        "import sys, time; from domerge_fast.cli import main as cli;"
        "code = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'tqdm'} & set(sys.modules);"
        "print(time.process_time());"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )

    def seconds() -> float:
        done = python("-c", code, *line.split())
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: domerge-fast {line.removesuffix('--help')}")
        return float(done.stdout.splitlines()[-1])

    assert least(seconds, 0.5) <= 0.5


def test_wrong_options_are_told_without_torch():
    code = (
        "import sys; from domerge_fast.cli import main as cli;"
        "code = cli.main(['merge', 'a', '-o', 'out', '--gama', '2']);"
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert "did you mean '--gamma'?" in done.stderr


def test_formats_lists_what_is_read_and_written(capsys):
    assert cli.main(["formats", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {name: dataclasses.asdict(row) for name, row in dm.list_formats().items()}
    assert found["peft"]["reads"]
    assert cli.main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["format", *found]


def test_what_is_stored_of_methods_is_what_the_tables_say():
    """If not: python -m domerge_fast.cli.flags"""
    stored = json.loads(known_flags.STORED.read_text("utf-8"))
    assert stored == json.loads(json.dumps(dataclasses.asdict(known_flags.of_tables())))


@pytest.mark.parametrize(
    "line",
    [
        "merge a b -o out",
        "merge a b -o out --quiet",
        "inspect a b",
        "sequential start s",
        "sequential add t a b",
        "sequential save t -o out",
        "methods",
        "doctor",
        "bench a --modules 1 --backend cpu",
        "completion bash",
    ],
)
def test_every_command_prints_one_json_object(line, capsys, monkeypatch):
    monkeypatch.setattr(bounds, "GEMM_SIZE", {"cpu": 64})
    for setting_up in ("start t", "add t a"):
        assert cli.main(["sequential", *setting_up.split()]) == 0
    capsys.readouterr()
    assert cli.main([*line.split(), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert isinstance(found, dict)
    assert found


def test_merge_tells_its_report_as_json(capsys):
    assert cli.main(["merge", "a", "b", "-o", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = dm.merge(["a", "b"]).report
    assert found["output"] == "out"
    assert list(found["modules"]) == list(report.modules)
    assert found["scale"] == report.scale


def completed(*words: str) -> list[str]:
    """What bash offers after these words, of which the last is not complete."""
    script = python("-m", "domerge_fast", "completion", "bash").stdout
    line = " ".join(map(shlex.quote, words))
    code = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _domerge_fast\n"
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{code}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("domerge-fast me", ["merge", "methods"]),
        ("domerge-fast merge a --outl", ["--outliers"]),
        ("domerge-fast merge --method iso", ["iso_c", "iso_cts"]),
        ("domerge-fast merge --form d", ["deltas"]),
        ("domerge-fast sequential s", ["start", "save"]),
        ("domerge-fast sequential add --we", ["--weight"]),
        ("domerge-fast completion f", ["fish"]),
    ],
)
def test_bash_completes_commands_options_and_words(line, offered):
    assert completed(*line.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_the_same_words(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("sequential", "iso_cts", "max-device-memory"):
        assert word in script


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = python("-m", "domerge_fast.cli.main", "--help", stdout=writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_real_process_merges(pair):
    done = python(
        "-m", "domerge_fast.cli.main", "merge", *pair, "-o", "out", "--weights", "1", "-2"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("written to out\n")
    dm.merge(pair, weights=[1.0, -2.0], output="expected")
    check_weights("out", "expected")


def test_a_real_process_fails_in_one_line(pair, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = python(
        "-m", "domerge_fast.cli.main", "merge", *pair, "-o", "b/README.md/out", "--rank", "0"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("domerge-fast: error: option 'rank': 0 is too small; use at least 1\n")
    assert sorted(tmp_path.rglob("*")) == before


def shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with the redirections of `line`."""
    path = os.pathsep.join([str(Path(dm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = ["bash", "-c", f'exec "$@" {line}', "bash", sys.executable, "-m", "domerge_fast"]
    return subprocess.run(
        [*command, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_closed_streams_change_nothing(pair):
    """Nor may a file that is written come to stand where something prints to."""
    done = shell("<&- >&- 2>&-", "merge", *pair, "-o", "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    dm.merge(pair, output="expected")
    check_weights("out", "expected")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_one_closed_stream_silences_nothing_else(name, pair, capsys, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    assert cli.main(["merge", *pair, "-o", "out"]) == 0
    assert getattr(sys, name) is None
    assert ("written to out" in capsys.readouterr().out) == (name == "stderr")
    assert cli.main(["merge", "a", "none", "-o", "no"]) == 2
    assert ("no such folder" in capsys.readouterr().err) == (name == "stdout")


FULL = "standard output cannot be written (No space left on device)\n"


def test_a_full_stdout_is_told_with_what_was_done(pair):
    done = shell(">/dev/full", "merge", *pair, "-o", "out")
    assert done.returncode == 1
    written = repr(str(Path("out").absolute()))
    assert done.stderr == f"domerge-fast: error: {written} was written, but {FULL}"
    assert weights_of("out")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("line", ["--help", "--version", "merge --help", "methods", "inspect a"])
def test_whatever_prints_tells_that_it_could_not(line, unbuffered, capsys, monkeypatch):
    device = open("/dev/full", "wb", buffering=0 if unbuffered else -1)  # noqa: SIM115
    full = io.TextIOWrapper(device, encoding="utf-8", write_through=unbuffered)
    monkeypatch.setattr(sys, "stdout", full)
    assert cli.main(line.split()) == 1
    assert capsys.readouterr().err == f"domerge-fast: error: {FULL}"
    full.close()


def test_the_exit_code_tells_what_a_full_stderr_cannot(pair, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["merge", *pair, "-o", "out"]) == 0
        assert cli.main(["merge", "a", "none", "-o", "no"]) == 2


@pytest.mark.parametrize("line", ["inspect a b", "merge --help", "methods", "doctor"])
def test_what_stdout_cannot_encode_is_replaced(line, capsys, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().err == ""
    assert printed.getvalue().isascii()
    assert printed.getvalue()


def test_streams_and_signals_are_as_they_were(capsys):
    def state() -> tuple[object, ...]:
        handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
        return sys.stdout, sys.stderr, sys.stdout.errors, *handlers, warnings.filters[:]

    before = state()
    for line in ("inspect a b", "inspect a none", "--help"):
        cli.main(line.split())
        assert state() == before


def patch_progress(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A merge gets this signal when its first module is done."""
    kill = lambda *_: os.kill(os.getpid(), number)  # noqa: E731
    monkeypatch.setattr(cli.shared, "shows_progress", lambda _: kill)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_polite_kill_leaves_nothing(name, pair, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    number = getattr(signal, name)
    monkeypatch.setattr(
        cli.shared, "shows_progress", lambda _: lambda *_: os.kill(os.getpid(), number)
    )
    # Whoever runs the tests in the background may have told them to ignore Ctrl-C.
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    handler = signal.signal(number, usual)
    try:
        assert cli.main(["merge", *pair, "-o", "out"]) == 130
    finally:
        signal.signal(number, handler)
    interrupted = "domerge-fast: interrupted; nothing was written\n"
    assert capsys.readouterr() == ("", interrupted)
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_before_the_command_is_one_line(pair, capsys, monkeypatch):
    usable, calls = cli.streams.usable, []

    def interrupted():
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return usable()

    monkeypatch.setattr(cli.streams, "usable", interrupted)
    assert cli.main(["merge", *pair, "-o", "out"]) == 130
    assert capsys.readouterr() == ("", "domerge-fast: interrupted; nothing was written\n")


def test_a_signal_that_is_ignored_stays_ignored(pair, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(
        cli.shared, "shows_progress", lambda _: lambda *_: os.kill(os.getpid(), signal.SIGHUP)
    )
    try:
        assert cli.main(["merge", *pair, "-o", "out", "-q"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("two\nlines"), "unexpected RuntimeError: two lines; -v shows the traceback"),
        (OSError(5, "Input/output error"), "unexpected OSError: [Errno 5] Input/output error; -v"),
        (MemoryError(), "out of memory; "),
        (ImportError("x" * 999), "unexpected ImportError: xxx"),
    ],
)
def test_whatever_else_goes_wrong_is_one_line(error, words, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dm.api, "run", fail)
    assert cli.main(["merge", "a", "b", "-o", "out"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"domerge-fast: error: {words}")
    assert printed.count("\n") == 1
    assert len(printed) < 300
    assert cli.main(["merge", "a", "b", "-o", "out", "-v"]) == 1
    assert "Traceback (most recent call last):" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["merge a b -o out", "inspect a b", "doctor", "sequential add s a"]
)
def test_an_instruction_set_that_is_not_here_is_refused(command, capsys, monkeypatch):
    from domerge_fast import _C

    assert cli.main(["sequential", "start", "s"]) == 0
    monkeypatch.setenv("DOMERGE_CPU_ISA", "mmx")
    assert cli.main(command.split()) == 2
    names = ", ".join(_C.isas())
    problem = "option 'DOMERGE_CPU_ISA': 'mmx' cannot run here"
    error = f"domerge-fast: error: {problem}; use one of: {names}; or unset it\n"
    assert capsys.readouterr().err == error
    assert not Path("out").exists()


def test_it_is_refused_before_an_adapter_is_read(monkeypatch):
    monkeypatch.setenv("DOMERGE_CPU_ISA", "mmx")
    with pytest.raises(dm.OptionError, match="DOMERGE_CPU_ISA"):
        dm.merge(["none"])


NO_NUMPY = """
import sys
sys.modules["numpy"] = None  # importing it fails
from domerge_fast.cli import main as cli
for line in sys.argv[1:]:
    if line.startswith("bench"):
        from domerge_fast.bench import bounds
        bounds.GEMM_SIZE = {"cpu": 64}  # in bfloat16 a large one takes minutes on some machines
    assert cli.main(line.split()) == 0, line
"""


def test_no_command_warns_where_numpy_is_not_installed():
    done = python(
        "-c",
        NO_NUMPY,
        "merge a b -o out",
        "merge a b -o cut --method ties --rank 2",
        "merge a b -o inner --method knots --inner dare --post norm_match --energy 0.9",
        "merge a b -o deltas --form deltas",
        "inspect a b",
        "methods",
        "doctor",
        "sequential start s",
        "sequential add s a b",
        "sequential save s -o saved",
        "bench a --modules 1 --backend cpu",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_runs_as_the_command():
    done = python("-m", "domerge_fast", "--version")
    assert (done.returncode, done.stdout) == (0, f"domerge-fast {dm.__version__}\n")


def wide_adapters(count: int) -> list[str]:
    names = [f"{'a-name-that-is-long-' * 6}{i}" for i in range(count)]
    for i, name in enumerate(names):
        write_adapter(Path(name), random_factors(SHAPES, 2, seed=i))
    return names


@pytest.mark.parametrize("line", ["merge -o out", "inspect", "methods", "doctor"])
def test_tables_fit_80_columns(line, capsys):
    adapters = wide_adapters(30) if line.split()[0] in ("merge", "inspect") else []
    command, *rest = line.split()
    assert cli.main([command, *adapters, *rest]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines


def test_a_table_takes_the_width_of_the_terminal(capsys, monkeypatch):
    names = wide_adapters(3)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (70, 100, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["inspect", *names]) == 0
        widest = max(map(len, capsys.readouterr().out.splitlines()))
        assert columns // 2 < widest <= columns
    assert cli.main(["inspect", *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == names
