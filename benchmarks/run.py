"""Times a whole merge, files to files, side by side with its rivals; writes a table and a JSON.

    python benchmarks/run.py                       # llama3-8b-8: about 10 minutes on two cores
    python benchmarks/run.py --workload llama-tiny # seconds

The copy floor reads the same inputs and writes as many output bytes with the safetensors library
in the same process. Floor and backends take turns; medians with their spread are shown. The
literal method and PEFT's "svd" run on one module of each shape, once, and are extrapolated to all
modules. Nothing is reported unless the merge first agrees with the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rivals
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import domerge_fast as dm
from domerge_fast.bench import machine, measure
from domerge_fast.bench.workloads import WORKLOADS, Workload
from domerge_fast.plan import GROUP_BYTES

HERE = Path(__file__).parent
FLOOR = "copy floor"
TOLERANCE = 2**-7  # of bfloat16 factors: two roundings of 2^-9 each, on both


def copy_floor(paths: list[Path], output: Path) -> None:
    """Read all factors, stack them, and write the stack, with the safetensors library."""
    files = [safe_open(path / "adapter_model.safetensors", framework="pt") for path in paths]
    keys = [set(file.keys()) for file in files]
    stacked = {}
    for key in sorted(set().union(*keys)):
        parts = [file.get_tensor(key) for file, has in zip(files, keys) if key in has]
        stacked[key] = torch.cat(parts, dim=0 if "lora_A" in key else 1)
    output.mkdir()
    save_file(stacked, output / "adapter_model.safetensors", metadata={"format": "pt"})


def merge(paths: list[Path], output: Path, backend: str, device: torch.device) -> None:
    dm.merge(paths, method="do", backend=backend, device=str(device), output=output)


def side_by_side(
    paths: list[Path], rounds: int, scratch: Path, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of the floor and of every backend, taking turns, after one round of warm-up."""
    calls: dict[str, Callable[[Path], None]] = {FLOOR: lambda out: copy_floor(paths, out)}
    for name in measure.usable(device):
        calls[name] = lambda out, name=name: merge(paths, out, name, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            output = scratch / "out"
            start = time.perf_counter()
            call(output)
            elapsed = time.perf_counter() - start
            shutil.rmtree(output)
            if turn:
                times[name].append(elapsed)
    return times


def gate(adapters: list[dm.Adapter], device: torch.device) -> float:
    """The largest relative error of ΔW against the literal method in float64, or an exit."""
    smallest = rivals.one_of_each_shape(adapters)[0][0]
    expected = rivals.literal(adapters, smallest, torch.float64, torch.device("cpu"))
    only = [
        dm.from_tensors({smallest: a.factors(smallest)}, a.modules[smallest].scaling)
        for a in rivals.owners(adapters, smallest)
    ]
    worst = 0.0
    for name in measure.usable(device):
        delta = dm.merge(only, backend=name, device=str(device)).delta(smallest).cpu().double()
        error = float((delta - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            sys.exit(f"{name} disagrees with the reference by {error:.1e}: nothing to report")
        worst = max(worst, error)
    return worst


def peak_memory(paths: list[Path], scratch: Path, device: torch.device) -> dict[str, int]:
    """Peak resident bytes of a process that only merges, and of one that only imports."""
    # Not getrusage: its maximum is inherited from the process that starts this one.
    report = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    arguments = json.dumps([str(p) for p in paths])
    merging = f"dm.merge({arguments}, device='{device}', output={str(scratch / 'memory')!r})"
    script = "import torch, domerge_fast as dm, domerge_fast.api\n{}\n" + report
    peaks = {}
    for label, body in (("idle", "0"), ("merge", merging)):
        run = subprocess.run(
            [sys.executable, "-c", script.format(body)], capture_output=True, text=True, check=True
        )
        peaks[label] = int(run.stdout) * 1024
    return peaks


def compare(
    workload: Workload,
    rounds: int,
    with_rivals: bool,
    data: Path,
    output: Path,
    device: torch.device,
) -> dict:
    paths = workload.write(data)
    adapters = [dm.load(path) for path in paths]
    error = gate(adapters, device)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        scratch = Path(folder)
        result = {
            "workload": workload.name,
            "factor_bytes": workload.factor_bytes,
            "modules": len(workload.modules),
            "adapters": len(workload.members),
            "rank": workload.rank,
            "error": error,
            "machine": machine.describe(device),
            "group_bytes": GROUP_BYTES,
            "output": str(output),
            "seconds": side_by_side(paths, rounds, scratch, device),
            "peak_bytes": peak_memory(paths, scratch, device),
        }
    if with_rivals:
        wanted = {"literal": "literal float32", "PEFT svd": "PEFT svd"}
        found = rivals.run(adapters, workload.rank, device, math.inf, tuple(wanted.values()))
        result["extrapolated"] = {name: found[key].seconds for name, key in wanted.items()}
    return result


def table(result: dict) -> str:
    """The result as Markdown; the ratios are against the copy floor and the first backend."""
    median = {name: statistics.median(t) for name, t in result["seconds"].items()}
    spread = {name: f"{min(t):.2f} to {max(t):.2f}" for name, t in result["seconds"].items()}
    for name, total in result.get("extrapolated", {}).items():
        median[f"{name} (extrapolated)"] = total
    first = next(name for name in median if name != FLOOR)
    floor, best = median[FLOOR], median[first]
    lines = [
        f"| | seconds (median) | spread | x copy floor | x {first} backend |",
        "|---|---|---|---|---|",
    ]
    for name, value in median.items():
        lines.append(
            f"| {name} | {value:.2f} | {spread.get(name, 'one run')} | {value / floor:.2f} "
            f"| {value / best:.2f} |"
        )
    m, peaks = result["machine"], result["peak_bytes"]
    where = m.get("gpu", f"{m['cpu']}, {m['threads']} threads")
    over = (peaks["merge"] - peaks["idle"]) / 2**20
    rounds = len(result["seconds"][FLOOR])
    lines += [
        "",
        f"`{result['workload']}`: {result['adapters']} adapters of rank {result['rank']}, "
        f"{result['modules']} modules, {result['factor_bytes'] / 1e9:.2f} GB of factors; "
        f"{rounds} rounds; {where}, torch {m['torch']}, "
        f"Python {m['python']}. Largest relative error of ΔW against the float64 reference: "
        f"{result['error']:.1e} (bfloat16 factors). Peak memory of the streamed merge: "
        f"{over:.0f} MiB above an idle process, in groups of {result['group_bytes'] >> 20} MiB. "
        f"Inputs in the page cache, outputs to {result['output']}.",
    ]
    return "\n".join(lines)


def publish(result: dict) -> None:
    """Keep the JSON and put the table between the workload's markers in README.md."""
    folder = HERE / "results" / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    name = result["workload"]
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    readme = HERE / "README.md"
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, _, rest = readme.read_text().partition(start)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{start}\n{table(result)}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="llama3-8b-8", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-rivals", action="store_true", help="only the floor and the backends")
    parser.add_argument("--publish", action="store_true", help="write results/ and README.md")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where adapters are made")
    shared = Path("/dev/shm")
    home = shared if shared.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--output", type=Path, default=home, help="where the merges are written")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    result = compare(
        WORKLOADS[args.workload],
        args.rounds,
        not args.no_rivals,
        args.data,
        args.output,
        args.device,
    )
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.publish:
        publish(result)


if __name__ == "__main__":
    main()
