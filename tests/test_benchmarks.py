"""The scripts under benchmarks/: rivals, and the one command for a machine with a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import domerge_fast as dm
from domerge_fast.bench.workloads import WORKLOADS, Member, Shape, Workload

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import gpu_check  # noqa: E402
import rivals  # noqa: E402
from gpu_check import FAILED, PASSED, SKIPPED, Outcome, Stage  # noqa: E402

CPU = torch.device("cpu")


def python(code: str, name: str = "stage", limit: float = 60, **given) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit, folder=FOLDER, **given)


# The stages of gpu_check


def test_a_stage_passes_with_its_report(tmp_path):
    path = tmp_path / "r.json"
    code = f"import os; open({str(path)!r}, 'w').write('{{\"x\": ' + os.environ['X'] + '}}')"
    outcome = gpu_check.run(python(code, report=path, environment={"X": "7"}), 60)
    assert (outcome.state, outcome.report, outcome.note) == (PASSED, {"x": 7}, "")


def test_a_failing_stage_says_why_and_keeps_the_end_of_its_output():
    code = "print('\\n'.join(map(str, range(99)))); raise SystemExit('it broke')"
    outcome = gpu_check.run(python(code), 60)
    assert (outcome.state, outcome.note) == (FAILED, "exit code 1: it broke")
    assert len(outcome.log) == gpu_check.KEPT_LINES
    assert outcome.log[-2:] == ["98", "it broke"]


def test_a_stage_without_its_report_fails_even_if_an_old_one_lies_there(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")
    outcome = gpu_check.run(python("pass", report=path), 60)
    assert (outcome.state, outcome.note) == (FAILED, "did not write r.json")


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_stage_that_takes_too_long_is_stopped_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    pids = tmp_path / "pids"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    outcome = gpu_check.run(python(code, limit=2), 60)
    assert time.monotonic() - start < 20
    assert (outcome.state, outcome.note) == (FAILED, "stopped after 2 s: waiting")
    deadline = time.monotonic() + 5
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_later_stages_run_after_a_failure_until_the_time_is_up(capsys):
    stages = [
        python("raise SystemExit(3)", "broken"),
        python("pass", "missing tool", needs="no-such-program"),
        python("pass", "good"),
        python("import time; time.sleep(60)", "slow"),
        python("pass", "late"),
    ]
    outcomes = gpu_check.run_all(stages, 6)
    states = [PASSED if o.name == "good" else FAILED for o in outcomes]
    states[1] = SKIPPED
    assert [o.state for o in outcomes] == states
    assert outcomes[1].note == "no-such-program is not on PATH"
    assert outcomes[3].note.startswith("stopped after ")
    assert outcomes[4].note == "no time was left for it"
    assert "broken …\n  failed after 0 s" in capsys.readouterr().out


def bench_report() -> dict:
    row = {"op": "merge", "backend": "cuda", "graph": True, "seconds": [0.004, 0.002, 0.003]}
    row |= {"bytes": 3e9, "flops": 6e10, "bound": 0.0015, "limit": "bytes"}
    rates = {"copy": 2e12, "gemm": {"float32": 5e13}}
    sizes = {"adapters": 8, "modules": 3, "modules_in_all": 7, "factor_bytes": 10**9}
    return {"rows": [row], "rates": rates, "dtype": "bfloat16", **sizes}


def outcomes() -> list[Outcome]:
    files = {"seconds": {"copy floor": [1.0, 2.0, 3.0], "cuda": [0.5]}}
    others = {"extrapolated": {"PEFT cat": {"seconds": 12.345, "measured": 1, "scaled": 0}}}
    return [
        Outcome("build", FAILED, 3.2, "exit code 1: a | b", ["a | b"]),
        Outcome("bench", PASSED, 10.0, report=bench_report()),
        Outcome("files", PASSED, 5.0, report=files),
        Outcome("rivals", PASSED, 6.0, report=others),
    ]


def test_tables_show_every_stage_and_every_row(tmp_path):
    machine = {"gpu": "Some GPU", "torch": "2.x"}
    gpu_check.write(tmp_path / "new", machine, outcomes())
    text = (tmp_path / "new" / "gpu-check.md").read_text()
    assert "| build | failed | 3 | exit code 1: a / b |" in text
    assert "| bench | passed | 10 | merge: cuda graph 3.00 ms (50 % of the bound) |" in text
    assert "| files | passed | 5 | copy floor 2.00 s, cuda 0.50 s |" in text
    assert "| rivals | passed | 6 | extrapolated: PEFT cat 12.3 s |" in text
    row = "| merge | cuda graph | 3000 | 2000 to 4000 | 1000 | 20.00 | 1500 | bytes | 50 % |"
    assert row in text
    kept = json.loads((tmp_path / "new" / "gpu-check.json").read_text())
    assert kept["machine"] == machine
    assert [stage["name"] for stage in kept["stages"]] == ["build", "bench", "files", "rivals"]
    assert kept["stages"][1]["report"] == bench_report()
    lines = gpu_check.compact(outcomes()).splitlines()
    assert lines[0] == "build   failed  3 s   exit code 1: a | b"
    assert lines[1] == "bench   passed  10 s  merge: cuda graph 3.00 ms (50 % of the bound)"


def test_stages_name_scripts_and_workloads_that_exist():
    found = gpu_check.stages("90")
    assert len({stage.name for stage in found}) == len(found)
    assert found[0].environment == {"DOMERGE_CUDA": "1", "DOMERGE_CUDA_ARCHS": "90"}
    for stage in found:
        words = list(stage.command)
        assert all(Path(w).exists() for w in words if w.endswith(".py") and w != "setup.py")
        if "--workload" in words:
            assert words[words.index("--workload") + 1] in WORKLOADS
    assert len({stage.report for stage in found if stage.report}) == 6


@pytest.mark.parametrize("passed", [True, False])
def test_the_exit_code_and_the_last_thing_printed(passed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "describe", lambda: ({"gpu": "NVIDIA X 1"}, "90"))
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    code = "pass" if passed else "raise SystemExit(1)"
    monkeypatch.setattr(gpu_check, "stages", lambda arch: [python(code, "only")])
    assert gpu_check.main([]) == (0 if passed else 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:2] == ["only", PASSED if passed else FAILED]
    assert sorted(p.name for p in (tmp_path / "results" / "nvidia-x-1").iterdir()) == [
        "gpu-check.json",
        "gpu-check.md",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu_check.py"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check: no GPU: torch ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_exercise_finds_a_backend_right_and_a_wrong_one_wrong():
    path = os.pathsep.join([str(Path(dm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import exercise; {{}}exercise.main()"
    spoil = "from domerge_fast.backends import cpu; cpu.block_gram = cpu.gram; "
    for extra, expected in (("", 0), (spoil, 1)):
        command = [sys.executable, "-c", code.format(extra), "cpu", "--device", "cpu"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
    assert "block_gram is off by inf" in done.stderr


# Rivals

MIXED = Workload(
    "mixed",
    "",
    (
        Member(2, (Shape("a.q", 20, 30), Shape("b.q", 20, 30), Shape("a.k", 6, 9))),
        Member(3, (Shape("a.q", 20, 30), Shape("b.q", 20, 30))),
    ),
    torch.float32,
)


def test_one_module_of_each_shape_the_smallest_first():
    assert rivals.one_of_each_shape(MIXED.adapters(CPU)) == [("a.k", 1), ("a.q", 2)]


def test_the_literal_method_is_what_merge_does():
    adapters = MIXED.adapters(CPU)
    merged = dm.merge(adapters)
    for name in ("a.q", "a.k"):
        expected = rivals.literal(adapters, name, torch.float64, CPU)
        error = (merged.delta(name) - expected).norm() / expected.norm()
        assert float(error) < 1e-4


def test_a_shape_beyond_the_budget_is_scaled_from_the_one_before():
    run = []

    def seconds(name: str) -> float:
        run.append(name)
        return 2.0

    adapters = MIXED.adapters(CPU)
    found = rivals.estimate(adapters, seconds, lambda m, n: m * n, budget=1.0)
    assert run == ["a.k"]
    assert found.seconds == pytest.approx(2.0 + 2 * 2.0 * 600 / 54)
    assert (found.measured, found.scaled) == (1, 2)
    found = rivals.estimate(adapters, seconds, lambda m, n: m * n, budget=100.0)
    assert found == rivals.Estimate(2.0 + 2 * 2.0, 3, 0)


def test_rivals_are_run_for_real():
    adapters = MIXED.adapters(CPU)
    found = rivals.run(adapters, MIXED.rank, CPU, budget=60.0)
    assert set(found) == {"literal float32", "literal float64", "PEFT svd", "PEFT cat"}
    for estimate in found.values():
        assert 0 < estimate.seconds < 60
        assert (estimate.measured, estimate.scaled) == (3, 0)
