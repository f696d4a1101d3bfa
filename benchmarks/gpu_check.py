"""Builds for this machine's GPU, tests, checks with compute-sanitizer and measures: one command.

    make gpu-check PY=python3

Needs torch and what the tests need in that Python, and nvcc; no network. What is built lies under
build/gpu. Every stage is a process with a time limit; one that fails is recorded, and the next
ones still run. A table and a JSON are kept under benchmarks/results/GPU, anew after every stage;
the table is printed at the end.
Exit code 0: every stage passed; 1: one did not; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "gpu"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
KEPT_LINES = 40
"""Lines of a failed stage's output that are kept."""
GRACE = 5.0
"""Seconds that a stage which ran out of time has to end by itself."""


@dataclass(frozen=True)
class Stage:
    """A process, the most seconds it may take, and the JSON it writes (None: none).

    needs: a program that must be on PATH; without it the stage is skipped.
    """

    name: str
    command: Sequence[str]
    limit: float
    report: Path | None = None
    needs: str | None = None
    folder: Path = BUILD
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. note: why it did not pass. log: the end of its output then."""

    name: str
    state: str
    seconds: float = 0.0
    note: str = ""
    log: Sequence[str] = ()
    report: dict | None = None


def run(stage: Stage, remaining: float) -> Outcome:
    """Run a stage for at most its own limit or the remaining seconds."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Outcome(stage.name, SKIPPED, note=f"{stage.needs} is not on PATH")
    limit = min(stage.limit, remaining)
    if limit <= 0:
        return Outcome(stage.name, FAILED, note="no time was left for it")
    if stage.report is not None:
        stage.report.unlink(missing_ok=True)
    start = time.monotonic()
    process = subprocess.Popen(
        stage.command,
        cwd=stage.folder,
        env={**os.environ, **stage.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        note = "" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        output = _end(process)
        note = f"stopped after {limit:.0f} s"
    except KeyboardInterrupt:
        _end(process)
        raise
    elapsed = time.monotonic() - start
    lines = output.rstrip().splitlines()[-KEPT_LINES:]
    report, problem = _read(stage.report)
    note = note or problem
    if note:
        last = f": {lines[-1].strip()}" if lines else ""
        return Outcome(stage.name, FAILED, elapsed, note + last, lines, report)
    return Outcome(stage.name, PASSED, elapsed, report=report)


def _end(process: subprocess.Popen[str]) -> str:
    """End a stage and what it started; its output."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        output, _ = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output


def _read(path: Path | None) -> tuple[dict | None, str]:
    """A stage's report, and what is wrong with it."""
    if path is None:
        return None, ""
    if not path.exists():
        return None, f"did not write {path.name}"
    return json.loads(path.read_text()), ""


def run_all(
    stages: Iterable[Stage],
    seconds: float,
    keep: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """All stages in order, within so many seconds together; `keep` gets those so far after each."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for stage in stages:
        print(f"{stage.name} …", flush=True)
        outcomes.append(run(stage, end - time.monotonic()))
        print(f"  {outcomes[-1].state} after {outcomes[-1].seconds:.0f} s", flush=True)
        keep(outcomes)
    return outcomes


def stages(architecture: str) -> list[Stage]:
    """Everything there is to do for a GPU of this architecture ("90")."""
    python, library, reports = sys.executable, BUILD / "lib", BUILD / "reports"
    installed = {"PYTHONPATH": str(library), "PYTHONUNBUFFERED": "1"}
    plain = {**installed, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def bench(name: str, workload: str, backends: Sequence[str], *more: str) -> Stage:
        report = reports / f"{name.replace(' ', '-')}.json"
        command = [python, "-m", "domerge_fast.cli.main", "bench", "--workload", workload]
        command += ["--device", "cuda", "--save-json", str(report), *more]
        command += [word for backend in backends for word in ("--backend", backend)]
        return Stage(name, command, 150, report, environment=installed)

    def script(name: str, limit: float, *command: str) -> Stage:
        report = reports / f"{name.replace(' ', '-')}.json"
        path = str(HERE / command[0])
        words = [python, path, *command[1:], "--device", "cuda", "--json", str(report)]
        return Stage(name, words, limit, report, environment=installed)

    def sanitize(tool: str, backend: str) -> Stage:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command = [*sanitizer, python, str(HERE / "exercise.py"), backend]
        return Stage(f"{tool} {backend}", command, 80, needs="compute-sanitizer", environment=plain)

    build = [python, "setup.py", "-q", "egg_info", "--egg-base", str(BUILD)]
    build += ["build", "--build-base", str(BUILD / "temp"), "--build-lib", str(library)]
    flags = {"DOMERGE_CUDA": "1", "DOMERGE_CUDA_ARCHS": architecture}

    def tests(name: str, limit: float, chosen: str) -> Stage:
        command = [python, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen]
        command += ["-p", "no:cacheprovider"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        files = ("test_gpu.py", "test_ops.py", "test_library.py", "test_bench.py")
        files += ("test_entries.py", "test_entries_exact.py", "test_entries_gpu.py")
        command += [str(ROOT / "tests" / file) for file in files]
        return Stage(name, command, limit, environment=installed)

    data = ["--data", str(BUILD / "data")]
    # What says most comes first: whether the CUDA kernels are right and how fast they are, then
    # whether they race. Triton compiles a kernel for every size and dtype that is tried: its tests
    # are a few of each, its sanitizing is last.
    few = "triton and (usual or odd or whole or merges or groups or graph or stream)"
    return [
        Stage("build", build, 200, folder=ROOT, environment=flags),
        bench("bench llama3-8b-8 cuda", "llama3-8b-8", ["cuda"]),
        tests("tests", 100, "not triton"),
        sanitize("racecheck", "cuda"),
        bench("bench moe-30b-4 part", "moe-30b-4", ["cuda"], "--modules", "256"),
        sanitize("memcheck", "cuda"),
        bench("bench llama3-8b-8 others", "llama3-8b-8", ["triton", "torch"]),
        script("files to files", 150, "run.py", "--no-rivals", *data),
        bench("bench llama3-8b-64", "llama3-8b-64", ["cuda"]),
        script("rivals", 90, "rivals.py", "--budget", "12"),
        tests("tests triton", 150, few),
        sanitize("memcheck", "triton"),
        bench("bench moe-30b-4", "moe-30b-4", ["cuda", "triton"]),
    ]


def figure(report: dict | None) -> str:
    """The one figure of a stage that the table has room for."""
    if report is None:
        return ""
    if "rows" in report:
        merges = [row for row in report["rows"] if row["op"] == "merge"]
        parts = [
            f"{_label(row)} {1000 * (t := statistics.median(row['seconds'])):.2f} ms "
            f"({100 * row['bound'] / t:.0f} % of the bound)"
            for row in merges
        ]
        return "merge: " + ", ".join(parts)
    if "extrapolated" in report:
        found = {name: e["seconds"] for name, e in report["extrapolated"].items()}
        return "extrapolated: " + ", ".join(f"{name} {t:.3g} s" for name, t in found.items())
    medians = {name: statistics.median(times) for name, times in report["seconds"].items()}
    return ", ".join(f"{name} {t:.2f} s" for name, t in medians.items())


def _label(row: dict) -> str:
    return row["backend"] + (" graph" if row["graph"] else "")


def markdown(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """All stages, then every row of every bench."""
    lines = [f"# {machine['gpu']}", "", ", ".join(f"{k} {v}" for k, v in machine.items()), ""]
    lines += ["| stage | result | s | figure or reason |", "|---|---|---|---|"]
    for o in outcomes:
        text = (o.note or figure(o.report)).replace("|", "/")
        lines.append(f"| {o.name} | {o.state} | {o.seconds:.0f} | {text} |")
    for outcome in outcomes:
        if outcome.report is not None and "rows" in outcome.report:
            lines += ["", f"## {outcome.name}", "", *_rows(outcome.report)]
    return "\n".join(lines) + "\n"


def _rows(report: dict) -> list[str]:
    rates = report["rates"]
    gemm = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates["gemm"].items())
    lines = [
        f"{report['adapters']} adapters, {report['modules']} of {report['modules_in_all']} "
        f"modules, {report['factor_bytes'] / 1e9:.2f} GB of {report['dtype']} factors. Measured "
        f"in the same run: copy {rates['copy'] / 1e9:.0f} GB/s, GEMM {gemm} TFLOP/s.",
        "",
        "| op | backend | µs (median) | spread | GB/s | TFLOP/s | bound µs | by | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        times = [1e6 * t for t in row["seconds"]]
        t = statistics.median(times)
        lines.append(
            f"| {row['op']} | {_label(row)} | {t:.0f} | {min(times):.0f} to {max(times):.0f} "
            f"| {row['bytes'] / t / 1e3:.0f} | {row['flops'] / t / 1e6:.2f} "
            f"| {1e6 * row['bound']:.0f} | {row['limit']} | {1e8 * row['bound'] / t:.0f} % |"
        )
    return lines


def compact(outcomes: Sequence[Outcome]) -> str:
    """The table that is printed last."""
    rows = [(o.name, o.state, f"{o.seconds:.0f} s", o.note or figure(o.report)) for o in outcomes]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]).rstrip()
        for row in rows
    )


def write(folder: Path, machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """gpu-check.json and gpu-check.md."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": dict(machine), "stages": [asdict(o) for o in outcomes]}
    (folder / "gpu-check.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "gpu-check.md").write_text(markdown(machine, outcomes))


def no_gpu() -> str | None:
    """Why there is nothing to check here, in one line."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name a Python that has: make gpu-check PY=python3"
    import torch

    if torch.version.cuda is None:
        return f"no GPU: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU: torch sees no CUDA device or driver"
    return None


def describe() -> tuple[dict[str, str], str]:
    """The machine, and its GPU's architecture as DOMERGE_CUDA_ARCHS wants it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": _triton(),
        "Python": platform.python_version(),
    }
    return machine, f"{major}{minor}"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none"
    import triton

    return triton.__version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the table and the JSON are kept")
    parser.add_argument("--seconds", type=float, default=570, help="for all stages together")
    only = "the build, and only stages whose name has one of these words in it"
    parser.add_argument("--only", nargs="+", metavar="WORD", help=only)
    args = parser.parse_args(arguments)
    reason = no_gpu()
    if reason is not None:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    machine, architecture = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    folder = args.out or HERE / "results" / slug
    shutil.rmtree(BUILD / "lib", ignore_errors=True)  # a build that fails must leave none behind
    (BUILD / "reports").mkdir(parents=True, exist_ok=True)
    chosen = [
        s
        for s in stages(architecture)
        if not args.only or s.name == "build" or any(word in s.name for word in args.only)
    ]
    outcomes = run_all(chosen, args.seconds, lambda so_far: write(folder, machine, so_far))
    print(f"\n{machine['gpu']}; kept in {folder}\n\n{compact(outcomes)}")
    return 1 if any(o.state == FAILED for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
