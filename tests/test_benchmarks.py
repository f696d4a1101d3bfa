"""The scripts under benchmarks/: the suite with its rivals, and the one for a GPU machine."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import domerge_fast as dm
from domerge_fast.adapters.plan import Plan
from domerge_fast.backends import cpu
from domerge_fast.bench import bounds, cases, measure
from domerge_fast.bench.checks import Verdict
from domerge_fast.bench.workloads import WORKLOADS, Member, Shape, Workload
from domerge_fast.methods.do import DoOptions

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import checks  # noqa: E402
import descent  # noqa: E402
import files  # noqa: E402
import gpu_check  # noqa: E402
import gpu_model  # noqa: E402
import least  # noqa: E402
import mergekit_cli  # noqa: E402
import pages  # noqa: E402
import publish  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import stages  # noqa: E402
import tables  # noqa: E402
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
    kept = []
    outcomes = gpu_check.run_all(stages, 6, lambda so_far: kept.append([o.name for o in so_far]))
    names = [stage.name for stage in stages]
    assert kept == [names[:k] for k in range(1, 6)]
    states = [PASSED if o.name == "good" else FAILED for o in outcomes]
    states[1] = SKIPPED
    assert [o.state for o in outcomes] == states
    assert outcomes[1].note == "no-such-program is not on PATH"
    assert outcomes[3].note.startswith("stopped after ")
    assert outcomes[4].note == "no time was left for it"
    assert re.search(r"broken …\n  failed after \d s", capsys.readouterr().out)


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
    assert len({stage.report for stage in found if stage.report}) == 7


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


# What the CUDA kernels can reach


def test_the_prediction_in_the_docs_is_of_the_recorded_machine_code():
    """python benchmarks/gpu_model.py makes it anew."""
    assert f"<!-- gpu model -->\n{gpu_model.table()}\n<!--" in gpu_model.PAGE.read_text()


def test_products_count_with_two_parts_and_what_tiles_pad():
    row = {"all": 100, "HMMA": 64, "LDSM": 20}
    kernels = {f"TensorApply<BFloat16, {size}>": {"matrix": [row]} for size in (64, 128)}
    whole = gpu_model.apply(kernels, (64, 64), 256)
    assert whole.units * 989e12 == pytest.approx(2 * 2 * 128 * 128 * 256)
    parts, split = 10 * 4 * 128 * 128 / 512, gpu_model.split(128)
    copies = 15 * 2 * 128 * 256 / 512 + parts
    assert whole.instructions == 2 * 8 * 4 * 100 + copies + split.instructions
    assert whole.bytes == split.bytes == 2 * 4 * 128 * 128
    assert gpu_model.apply(kernels, (60, 60), 250).units == whole.units
    assert gpu_model.apply(kernels, (100, 100), 256).units * 989e12 == pytest.approx(
        2 * 2 * 256 * 224 * 256
    )


def test_parts_of_c_come_for_every_tile_where_they_do_not_all_stay():
    """Of 512 columns four tiles of 128, and of R = 129 two of rows."""
    kernels = {"TensorApply<BFloat16, 128>": {"matrix": [{"all": 0, "HMMA": 0, "LDSM": 0}]}}

    def of_parts(rank: int) -> float:
        rest = gpu_model.split(rank).instructions + 15 * 2 * rank * 512 / 512 * -(-rank // 128)
        rest += (8 * 1.5 * 64 * 2 * 8) if rank > 128 else 0
        return gpu_model.apply(kernels, (rank,), 512).instructions - rest

    assert of_parts(128) == pytest.approx(10 * 4 * 128 * 128 / 512)
    assert of_parts(129) == pytest.approx(8 * 10 * 4 * 128 * 160 / 512)


def test_descents_beyond_shared_memory_count_what_passes_through_scratch():
    """Three steps, and what comes before, between and after them."""
    kernels = {f"Descent<{size}>": {"matrix": [{"all": 1, "HMMA": 1}]} for size in (128, 192, 256)}
    moved = {r: gpu_model.orthogonalize(kernels, (r,), 4096).bytes for r in (128, 150, 256)}
    assert moved == {128: 0, 150: (3 * 31 + 5) * 4 * 192**2, 256: 3 * 43 * 4 * 256**2}


def test_grams_of_parts_count_three_products_of_every_square_up_to_the_diagonal():
    """Squares of 32 x 32, two of which a warp makes at once, and of 32 columns."""
    both = [{"all": 400, "HMMA": 192}] * 2
    kernels = {"Gram<Float32, 128>": {"matrix": [*both, *({**x, "HMMA": 96} for x in both)]}}
    for rank, squares, tiles in ((128, 10, 1), (200, 2 * 10 + 16, 3)):
        cost = gpu_model.gram(kernels, (rank,), 80, "float32")
        assert cost.units * 494e12 == pytest.approx(3 * 2 * 32 * 32 * 96 * squares)
        rest = gpu_model.added(64) * (3 * tiles)
        rest += gpu_model.copies(128 * 80 * (1 if tiles == 1 else 4), 4)
        steps = 4 + 2 if tiles == 1 else 2 * (4 + 2) + 8
        assert cost.instructions == pytest.approx(3 * 400 * steps + rest.instructions)


def test_block_grams_count_tiles_and_their_columns():
    """Of 72 rows two tiles on the diagonal and one beside it, of which two have both operands."""
    row = [{"all": 400, "DMMA": 128}] * 2 + [{"all": 200, "DMMA": 80}] * 2
    row += [{"all": 90, "DMMA": 16}] * 6
    kernels = {"BlockGram<BFloat16>": {"matrix": row}}
    cost = gpu_model.block_gram(kernels, (72,), 100)
    assert cost.units * 67e12 == pytest.approx(2 * 4 * (128 + 2 * 80) * 1024)
    assert cost.instructions == 2 * 4 * (400 + 2 * 200) + 15 * 2 * 4 * 64 * 128 / 512
    small = gpu_model.block_gram(kernels, (5, 8), 256)
    assert small.units * 67e12 == pytest.approx(2 * 4 * 16 * 1024)


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
    merged = dm.merge(adapters, "do", scale=1)
    for name in ("a.q", "a.k"):
        expected = rivals.literal(rivals.factors(adapters, name, CPU), torch.float64)
        error = (merged.delta(name) - expected).norm() / expected.norm()
        assert float(error) < 1e-4


def truncated_mean(factors, rank: int) -> torch.Tensor:
    delta = torch.stack([b.double() @ a.double() for a, b in factors]).mean(0)
    u, s, vh = torch.linalg.svd(delta)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("name", ["PEFT cat", "PEFT svd", "PEFT svd, thin", rivals.QR_SVD])
def test_rivals_merge_what_our_svd_does(name):
    rank = 8 if name == "PEFT cat" else 3
    factors = rivals.factors(MIXED.adapters(CPU), "a.q", CPU)
    call = rivals.RIVALS[name].prepare(factors, rank)
    expected = truncated_mean(factors, rank)
    for _ in range(2):  # the second time is what is measured
        a, b = call()
        error = (b.double() @ a.double() - expected).norm() / expected.norm()
        assert float(error) < 1e-5


def estimate(seconds, budget=math.inf, room=math.inf) -> rivals.Estimate:
    return rivals.estimate(
        MIXED.adapters(CPU), seconds, lambda s: s.m * s.n, lambda s: s.m, budget, room
    )


def test_a_shape_beyond_the_budget_is_scaled_from_the_one_before():
    run = []

    def seconds(name: str) -> float:
        run.append(name)
        return 2.0

    found = estimate(seconds, budget=1.0)
    assert run == ["a.k"]
    assert found.seconds == pytest.approx(2.0 + 2 * 2.0 * 600 / 54)
    assert (found.measured, found.scaled) == (1, 2)
    assert estimate(seconds) == rivals.Estimate(2.0 + 2 * 2.0, 3, 0)


def test_a_shape_beyond_the_memory_is_scaled_or_none_is_run():
    assert estimate(lambda name: 2.0, room=10).scaled == 2
    assert estimate(lambda name: pytest.fail(name), room=5) == rivals.Estimate(0.0, 0, 0, 6)


def test_every_rival_of_a_set_is_run_for_real():
    found = rivals.run(MIXED.adapters(CPU), MIXED.rank, CPU, 60.0, tuple(rivals.RIVALS))
    for estimate in found.values():
        assert 0 < estimate.seconds < 60
        assert (estimate.measured, estimate.scaled) == (3, 0)


# The runner


def test_calls_take_turns_and_a_slow_one_is_run_once(tmp_path):
    order = []

    def call(name: str, seconds: float):
        def write(output: Path) -> None:
            order.append(name)
            output.mkdir()
            time.sleep(seconds)

        return write

    calls = {"quick": call("q", 0.0), "slow": call("s", 0.2)}
    times = files.take_turns(calls, 3, tmp_path, patience=0.1)
    assert order == ["q", "s", "q", "q", "q"]
    assert {name: len(t) for name, t in times.items()} == {"quick": 3, "slow": 1}
    assert times["slow"][0] >= 0.2


def test_the_stages_of_a_merge_add_up_to_it(tmp_path):
    adapters = MIXED.write(tmp_path)
    start = time.perf_counter()
    merged, found = stages.measure(lambda: dm.merge(adapters, "do", output=tmp_path / "out"))
    whole = time.perf_counter() - start
    assert merged.names == ("a.k", "a.q", "b.q")
    assert sum(found["main"].values()) == pytest.approx(whole, rel=0.1, abs=0.01)
    assert found["main"][stages.REST] > 0
    assert {"orthogonalize", "apply", "apply_decouple", "open"} < set(found["main"])
    assert found["read"]["read"] > 0
    assert found["write"]["write"] > 0


def test_the_least_time_counts_every_op_of_a_merge():
    merged = dm.merge(MIXED.adapters(CPU), "do")
    plan = Plan.make(MIXED.adapters(CPU), [1.0, 1.0])
    given = [cases.stack(plan, name, CPU) for name in plan.names]
    recorded = cases.record(given, torch.float32, "torch", DoOptions())
    expected = measure.merge_work(given, torch.float32, recorded)
    found = least.do_work(MIXED, merged.report)
    assert found.bytes == expected.bytes
    assert dict(found.flops_in) == pytest.approx(dict(expected.flops_in))


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Runs run.py on llama-tiny in this process."""
    monkeypatch.setattr(bounds, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(bounds, "GEMM_SIZE", {"cpu": 64})
    words = ["llama-tiny", "--rounds", "2", "--no-mergekit", "--data", str(tmp_path / "data")]
    words += ["--output", str(tmp_path), "--json", str(tmp_path / "result.json")]
    return lambda *more: run.main([*words, *more])


@pytest.mark.slow
def test_a_workload_is_measured_with_its_rivals(quick, tmp_path, capsys):
    quick()
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["seconds"]) == {files.FLOOR, "cpu", "torch", "cpu svd"}
    assert {len(times) for times in result["seconds"].values()} == {2}
    assert set(result["extrapolated"]) == set(run.ALL_RIVALS)
    assert all(e["measured"] == 14 for e in result["extrapolated"].values())
    assert {key: error < checks.TOLERANCE for key, error in result["errors"].items()} == {
        f"{backend} {method}": True for backend in ("cpu", "torch") for method in ("do", "svd")
    }
    peaks = result["peak_bytes"]
    assert peaks["idle"] < peaks["do"] < peaks["idle"] + 2**30
    assert result["least"]["seconds"] > 0
    printed = capsys.readouterr().out
    assert tables.workload(result) in printed
    assert not list(tmp_path.glob("tmp*"))  # nothing written is left


@pytest.mark.parametrize("method", ["do", "svd"])
def test_no_figure_of_a_backend_that_is_wrong(method, quick, tmp_path, monkeypatch):
    op = "apply_decouple" if method == "do" else "truncate"
    right = getattr(cpu, op)

    def wrong(*arguments, **options):
        """A relative error of 2 in what the op returns."""
        found, other = right(*arguments, **options)
        if op == "truncate":
            return [(3 * a, b) for a, b in found], other
        return [3 * a for a in found], other

    monkeypatch.setattr(cpu, op, wrong)
    with pytest.raises(SystemExit, match=f"cpu disagrees .*: {op} is off by 2.0e.00"):
        quick("--no-rivals")
    if method == "svd":  # a merge cuts in R x R, without this op
        return
    # An error that only a whole merge shows is seen too.
    monkeypatch.setattr(checks.Checks, "check", lambda *given: Verdict({}, None))
    with pytest.raises(SystemExit, match=r"cpu disagrees .* ΔW of do is off by 2.0e.00"):
        quick("--no-rivals")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quick", "--publish"], "--publish keeps results of whole workloads"),
        (["nothing"], "'nothing' is none of llama-tiny"),
        (["scaling", "llama-tiny", "--json", "x"], "--json takes the figures of one"),
    ],
)
def test_words_that_the_runner_refuses(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_without_mergekit_the_runner_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="pip install mergekit, or --no-mergekit"):
        run.main(["--quick", "--mergekit", str(tmp_path)])


def test_adapters_that_were_made_for_a_run_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_measure", lambda *given: {})
    place = run.Place(tmp_path, tmp_path, CPU)
    part = run.Setting("llama3-8b-8", 1.0, modules=2)
    assert len(part.take().modules) == 2
    run.compare(part, 1, place, None)
    assert not list(tmp_path.iterdir())
    part.take().write(tmp_path)
    run.compare(part, 1, place, None)
    assert [path.name for path in tmp_path.iterdir()] == ["llama3-8b-8-2-modules"]


def test_every_workload_has_its_setting():
    assert set(run.SETTINGS) == set(WORKLOADS)
    assert {setting.workload for setting in run.FULL} == set(WORKLOADS) - {"llama-tiny"}


@pytest.mark.slow
def test_growth_is_measured(monkeypatch):
    monkeypatch.setattr(scaling, "SERIES", {"modules": ((1, 2), lambda x: (4, 4, x, 64))})
    monkeypatch.setattr(scaling, "WIDTH", 64)
    result = scaling.run(2)
    assert set(result["series"]["modules"]) == {"1", "2"}
    assert set(result["series"][scaling.THREADS]) == {
        str(k) for k in range(1, torch.get_num_threads() + 1)
    }
    points = [p for points in result["series"].values() for p in points.values()]
    assert all(len(p["seconds"]) == 2 and p["steps"] >= 1 for p in points)
    assert "| modules | 2 |" in tables.one("scaling", result)


@pytest.mark.slow
def test_orthogonalize_is_measured_beside_sgemm(monkeypatch):
    monkeypatch.setattr(descent, "RANKS", (16,))
    monkeypatch.setattr(descent, "SGEMM", 64)
    result = descent.run(2)
    row = result["ranks"]["16"]
    assert row["flops"] == pytest.approx(16**3 * (7 * row["steps"] - 4) * row["problems"])
    assert len(row["seconds"]) == len(row["sgemm"]) == 2
    assert "| 16 | 256 |" in tables.one("orthogonalize", result)


# mergekit


def test_mergekit_is_reckoned_from_a_layer_beyond_its_start(tmp_path, monkeypatch):
    steps = {"task_arithmetic": 3.0, "ties": 4.0, mergekit_cli.EXTRACT: 5.0}
    monkeypatch.setattr(
        mergekit_cli,
        "_steps",
        lambda w, *given: dict.fromkeys(steps, 2.0) if w.name == "llama-tiny" else steps,
    )
    monkeypatch.setattr(mergekit_cli, "_version", lambda scripts: "1")
    found = mergekit_cli.run(WORKLOADS["llama3-8b-8"], tmp_path, tmp_path)
    assert found["layers"] == 32
    assert found["seconds"] == {
        "task_arithmetic": 2 + 32 * 1 + 2 + 32 * 3,
        "ties": 2 + 32 * 2 + 2 + 32 * 3,
    }


def test_a_mergekit_that_fails_stops_the_run(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such recipe')"]
    with pytest.raises(SystemExit, match="failed: no such recipe"):
        mergekit_cli._seconds(command)


# What is published


def test_the_tables_of_both_pages_are_those_of_the_results_that_are_kept():
    results = publish.load()
    assert tables.HEADLINE in results
    texts = publish.sections(results)
    for page in publish.PAGES:
        text = page.read_text()
        assert pages.fill(text, texts) == text
    headline, benchmarks = (page.read_text() for page in reversed(publish.PAGES))
    assert texts["headline"] in headline
    assert all(texts[name] in benchmarks for name in texts if name != "headline")


def test_the_plots_that_the_page_shows_are_kept_and_small():
    shown = re.findall(r"\((results/[^)]+\.svg)\)", publish.PAGES[0].read_text())
    assert len(shown) == 3
    for path in shown:
        assert 0 < (FOLDER / path).stat().st_size < 100_000


def published() -> dict:
    """A result with figures that are easy to follow through a table."""
    return {
        "workload": "llama3-8b-8",
        "modules": 14,
        "modules_in_all": 224,
        "adapters": 8,
        "rank": 16,
        "factor_bytes": 10**9,
        "errors": {"cpu do": 1e-3},
        "machine": {"cpu": "A CPU", "threads": 2, "torch": "2.x", "python": "3.x"},
        "group_bytes": 64 << 20,
        "seconds": {files.FLOOR: [1.0, 2.0, 3.0], "cpu": [4.0, 4.0, 5.0], "cpu svd": [8.0]},
        "peak_bytes": {"idle": 2**20, "do": 3 * 2**20},
        "stages": {"main": {"gram": 3.0, stages.REST: 1.0}, "write": {"write": 2.0}},
        "least": {"seconds": 0.5, "limit": "flops", "bytes": 2e9, "flops": 1e12}
        | {"copy": 1e10, "gemm": {"float32": 2e12}},
        "extrapolated": {
            rivals.LITERAL: {"seconds": 1200.0, "measured": 4, "scaled": 10, "needs": 0.0},
            rivals.PEFT_SVD: {"seconds": 0.0, "measured": 0, "scaled": 0, "needs": 2.0**36},
        },
        "mergekit": {"version": "9", "layers": 32, "seconds": {"task_arithmetic": 400.0}},
    }


def test_a_table_shows_every_contender_and_says_what_is_extrapolated():
    lines = tables.workload(published()).splitlines()
    assert "| least for `do` | 0.5 |  | flops at this machine's rate | 0.25 | 0.12 |" in lines
    how = "the same and the copy floor's work, on 2 threads"
    assert f"| least for `do` and its files | 1.5 |  | {how} | 0.75 | 0.38 |" in lines
    assert "| copy floor | 2 | 1 to 3 | files, 3 runs | 1.00 | 0.50 |" in lines
    assert "| `do`, cpu | 4 | 4 to 5 | files, 3 runs | 2.00 | 1.00 |" in lines
    assert "| `svd` to rank 16, cpu | 8 |  | files, one run | 4.00 | 2.00 |" in lines
    how = "in memory, extrapolated from one of each shape; shapes of 10 modules scaled"
    assert f"| literal float32 | 1200 |  | {how} | 600 | 300 |" in lines
    assert "| PEFT svd |  |  | would take 64 GiB of memory |  |  |" in lines
    how = "files, extrapolated from 1 of 32 layers"
    assert f"| mergekit 9 task_arithmetic, extract-lora | 400 |  | {how} | 200 | 100 |" in lines
    assert "14 of 224 (so the whole takes 16 times that) modules" in lines[-1]
    assert "2 MiB (`do`)" in lines[-1]


def test_the_headline_states_ratios_and_the_machine():
    result = published()
    del result["extrapolated"][rivals.PEFT_SVD]
    text = " ".join(tables.headline(result).split())
    assert "took 4 s and 2 MiB of memory; reading and writing the same bytes took 2 s" in text
    assert "the method as printed, with dense matrices: 300; mergekit's task arithmetic" in text
    assert "A CPU, 2 threads, torch 2.x" in text


def test_what_is_kept_is_what_the_page_gets(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- stages -->\nold\n<!-- end stages -->\nb\n")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "PAGES", (page,))
    publish.keep("llama3-8b-8", published())
    publish.main()
    table = tables.stages({"llama3-8b-8": published()})
    assert "| llama3-8b-8 | 3 | 1 | 2 |" in table
    text = f"a\n<!-- stages -->\n{table}\n<!-- end stages -->\nb\n"
    assert page.read_text() == text
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"llama3-8b-8.json", "rivals.svg", "stages.svg"}
