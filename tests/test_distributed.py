"""Merges by several processes: the same bytes as by one, whatever becomes of the processes."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attack import judge
from attack.forks import wait
from attack.inputs import adapter, base_model, lora_file
from attack.runs import contents
from support import deaths, ranks
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast import distributed
from domerge_fast.distributed import group, shared
from domerge_fast.methods import TABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks with torch imported")

UNIT_BYTES = 1
"""Every module is a unit."""
FORMS = {
    "rank": {"method": "tsvm", "rank": 3},
    "energy": {"method": "svd", "energy": 0.9},
    "found scale and svc": {"method": "tsvm", "post": ["svc", "norm_match"]},
    "steps before": {"method": "linear", "pre": ["canonicalize", "equalize"]},
    "thresholds of the model": {"method": "ties", "scope": "model", "rank": 4},
    "inner thresholds": {"method": "do", "directions": "ties", "scope": "model"},
    "in a basis": {"method": "knots", "inner": "ties", "scope": "model"},
    "rules": {"rules": [{"modules": "*q_proj", "method": "svd", "rank": 2}]},
    "deltas": {"method": "ties", "form": "deltas"},
    "model": {"method": "do", "form": "model"},
    "mlx": {"method": "do", "format": "mlx"},
    "kohya": {"method": "do", "format": "kohya"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    adapter(folder / "a", 4, 1)
    adapter(folder / "b", 4, 2)
    base_model(folder / "base")
    for k, name in enumerate("xy"):
        lora_file(folder / name, 4, k)
    return folder


def asked(inputs: Path, name: str) -> dict[str, object]:
    """What is asked of one of FORMS, or of a method."""
    given = dict(FORMS.get(name, {"method": name}))
    pair = "xy" if name == "kohya" else "ab"
    given["adapters"] = [str(inputs / x) for x in pair]
    if given.get("form") == "model":
        given["base"] = str(inputs / "base")
    return given


@pytest.mark.parametrize("names", [[*TABLE], [*FORMS]], ids=["methods", "forms"])
@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_any_number_of_processes_writes_the_same_bytes(names, count, inputs, tmp_path):
    jobs = [name for name in names if name in FORMS or TABLE[name].why_not() is None]
    alone = tmp_path / "alone"
    reports = {n: ranks.told(dm.merge(**asked(inputs, n), output=alone / n)) for n in jobs}
    together = tmp_path / "together"
    ranks.merged(count, [job(inputs, together / name, name) for name in jobs])
    for name in jobs:
        assert contents(together / name) == contents(alone / name), name
        said = pickle.loads((together / f"{name}.report").read_bytes())
        assert differing(said, reports[name]) == [], name
    assert judge.hidden(together) == []


def differing(one: object, other: object, where: str = "") -> list[str]:
    """Where two reports differ by more than sums in another order do."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(k, one[k], other[k]) for k in one]
    elif isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = [(k, x, y) for k, (x, y) in enumerate(zip(one, other))]
    else:
        same = one == other or one == pytest.approx(other, rel=1e-12)
        return [] if same else [f"{where}: {one!r}, {other!r}"]
    return [x for k, a, b in pairs for x in differing(a, b, f"{where}.{k}")]


def job(inputs: Path, output: Path, name: str = "do", **given: object) -> dict[str, object]:
    return {**asked(inputs, name), "output": str(output), "unit_bytes": UNIT_BYTES, **given}


def killed_at(stage: str, given: dict[str, object], port: int) -> None:
    """The job by two processes, one of which dies there; the other is ended, as by torchrun."""
    rank, prepare = deaths.STAGES[stage]
    pids = ranks.start(port, 2, [given], before=lambda k: prepare() if k == rank else deaths.idle())
    codes = [wait(pids[rank], ranks.SECONDS)]
    os.kill(pids[1 - rank], signal.SIGTERM)
    codes.append(wait(pids[1 - rank], ranks.SECONDS))
    assert codes[0] == -signal.SIGKILL


@pytest.mark.parametrize("stage", deaths.STAGES)
@pytest.mark.parametrize("name", ["do", "kohya"])
def test_a_job_goes_on_after_a_kill_at_every_stage(stage, name, inputs, tmp_path):
    given = job(inputs, tmp_path / "of" / "out", name)
    if name == "kohya" and stage.startswith("a tensor"):
        pytest.skip("modules are written in the end, by one process")
    dm.merge(**asked(inputs, name), output=tmp_path / "alone")
    with ranks.store() as port:
        killed_at(stage, given, port)
        in_place = stage == "the output has its place" or stage.endswith("cleared away")
        assert os.path.exists(given["output"]) == in_place
        if stage == "the rest is cleared away":  # nothing is known of the job any more
            return
        assert ranks.end(ranks.start(port, 2, [given], attempt=1)) == [0, 0]
    assert contents(tmp_path / "of" / "out") == contents(tmp_path / "alone")
    assert judge.hidden(tmp_path / "of") == []


def test_units_that_are_done_are_not_done_again(inputs, tmp_path):
    given = job(inputs, tmp_path / "out")
    with ranks.store() as port:
        killed_at("all is written", given, port)
        (hidden,) = judge.hidden(tmp_path)
        done = {x.name: x.stat().st_mtime_ns for x in (tmp_path / hidden / "job").iterdir()}
        before = lambda rank: deaths.at(deaths.folder, "_swap", deaths.killed)  # noqa: E731
        ranks.end(ranks.start(port, 1, [given], attempt=1, before=before))
        again = {x.name: x.stat().st_mtime_ns for x in (tmp_path / hidden / "job").iterdir()}
    entries = [name for name in done if "-" in name]
    assert len(entries) == 4 + 4 + 4  # λ, the merge, and the sums of the files
    assert {name: again[name] for name in entries} == {name: done[name] for name in entries}


@pytest.mark.parametrize("name", ["do", "ties", "kohya"])
def test_others_do_the_work_of_a_process_that_hangs(name, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "PATIENCE", (0.3, 0.3))
    monkeypatch.setattr(group, "LEAVE_SECONDS", 0.1)
    given = job(inputs, tmp_path / "of" / "out", name)
    dm.merge(**asked(inputs, name), output=tmp_path / "alone")

    def before(rank: int) -> None:
        if rank == 1:
            deaths.at(deaths.Journal, "put", deaths.stopped)
        else:
            deaths.idle(for_good=False)

    with ranks.store() as port:
        pids = ranks.start(port, 2, [given], before=before)
        assert wait(pids[0], ranks.SECONDS) == 0
        assert contents(tmp_path / "of" / "out") == contents(tmp_path / "alone")
        os.kill(pids[1], signal.SIGCONT)
        assert wait(pids[1], ranks.SECONDS) == 0
    assert contents(tmp_path / "of" / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_told_and_the_job_goes_on_when_there_is_room(rank, inputs, tmp_path, capfd):
    given = job(inputs, tmp_path / "out")

    def before(k: int) -> None:
        if k == rank:
            deaths.at(os, "fdatasync", deaths.full)
        else:
            deaths.idle()

    with ranks.store() as port:
        assert ranks.end(ranks.start(port, 2, [given], before=before)) == [2, 2]
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2
        assert all("No space left on device" in line and "is kept" in line for line in said)
        assert not os.path.exists(given["output"])
        assert ranks.end(ranks.start(port, 2, [given], attempt=1)) == [0, 0]
    dm.merge(**asked(inputs, "do"), output=tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": 2.0}, "had other options"),
        ({"unit_bytes": 10**9}, "had other units"),
        ({}, "had other files of the adapters"),
    ],
)
def test_another_job_does_not_go_on_with_what_one_has_left(change, said, inputs, tmp_path, capfd):
    folders = [adapter(tmp_path / "in" / x, 4, k) for k, x in enumerate("ab")]
    given = job(inputs, tmp_path / "of" / "out", adapters=[str(x) for x in folders])
    with ranks.store() as port:
        killed_at("some units are done", given, port)
        (left,) = judge.hidden(tmp_path / "of")
        if not change:
            adapter(folders[0], 4, 7)
        codes = ranks.end(ranks.start(port, 2, [{**given, **change}], attempt=1))
        lines = capfd.readouterr().err.splitlines()
        assert codes == [2, 2]
        assert len(lines) == 2
        assert all(said in line and left in line for line in lines)
        assert judge.hidden(tmp_path / "of") == [left]
        shutil.rmtree(tmp_path / "of" / left)
        assert ranks.end(ranks.start(port, 2, [{**given, **change}], attempt=2)) == [0, 0]
    dm.merge(
        **asked(inputs, "do") | {"adapters": folders, "scale": change.get("scale")},
        output=tmp_path / "alone",
    )
    assert contents(tmp_path / "of" / "out") == contents(tmp_path / "alone")


def test_what_cannot_be_merged_is_refused_by_all_and_nothing_is_left(inputs, tmp_path, capfd):
    factors = random_factors({"x.q_proj": (8, 6), "y.q_proj": (8, 6)}, 2)
    write_adapter(tmp_path / "in" / "a", factors)
    factors["y.q_proj"][0][0, 0] = float("nan")
    write_adapter(tmp_path / "in" / "b", factors)
    given = job(inputs, tmp_path / "of" / "out", adapters=[str(tmp_path / "in" / x) for x in "ab"])
    (tmp_path / "of").mkdir()
    with ranks.store() as port:
        assert ranks.end(ranks.start(port, 2, [given])) == [2, 2]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("'y.q_proj': NaN in lora_A" in line for line in lines)
    assert judge.hidden(tmp_path / "of") == []
    assert not os.path.exists(given["output"])


def test_an_adapter_in_memory_is_refused(inputs, tmp_path, capfd):
    tensors = dm.from_tensors({"x": random_factors({"x": (8, 6)}, 2)["x"]}, name="here")
    given = job(inputs, tmp_path / "out", adapters=[tensors, tensors])
    with ranks.store() as port:
        assert ranks.end(ranks.start(port, 2, [given])) == [2, 2]
    assert "'here': is in the memory of one process" in capfd.readouterr().err


def test_without_other_processes_there_is_no_job(inputs, tmp_path):
    with pytest.raises(dm.DomergeError, match="start the job by torchrun"):
        distributed.merge(**job(inputs, tmp_path / "out"))


@pytest.mark.slow
def test_torchrun_starts_the_command_again_when_a_process_dies(inputs, tmp_path):
    """With the processes that torchrun itself starts."""
    given = asked(inputs, "do")
    dm.merge(**given, output=tmp_path / "alone")
    die = "import os, runpy, sys; from support import deaths\n"
    die += "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
    die += "    deaths.STAGES['a unit is written'][1]()\n"
    die += "sys.argv = ['domerge-fast', *sys.argv[1:]]; runpy.run_module('domerge_fast')\n"
    script = tmp_path / "command.py"
    script.write_text(die)
    here = [str(Path(dm.__file__).parents[1]), str(Path(__file__).parent)]
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", str(script)]
    words += ["merge", *given["adapters"], "-o", str(tmp_path / "of" / "out"), "--method", "do"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert contents(tmp_path / "of" / "out") == contents(tmp_path / "alone")
    assert judge.hidden(tmp_path / "of") == []
