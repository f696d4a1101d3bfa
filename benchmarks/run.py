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
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from workloads import WORKLOADS, Workload

import domerge_fast as dm
from domerge_fast.backends import reference
from domerge_fast.plan import GROUP_BYTES

HERE = Path(__file__).parent
TOLERANCE = 2**-7  # of bfloat16 factors: two roundings of 2^-9 each, on both


def seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def copy_floor(paths: list[Path], output: Path) -> None:
    """Read all factors, stack them, and write the stack, with the safetensors library."""
    files = [safe_open(path / "adapter_model.safetensors", framework="pt") for path in paths]
    stacked = {}
    for key in sorted(files[0].keys()):
        parts = [file.get_tensor(key) for file in files]
        stacked[key] = torch.cat(parts, dim=0 if "lora_A" in key else 1)
    output.mkdir()
    save_file(stacked, output / "adapter_model.safetensors", metadata={"format": "pt"})


def merge(paths: list[Path], output: Path, backend: str) -> None:
    dm.merge(paths, method="do", backend=backend, output=output)


def side_by_side(paths: list[Path], rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Seconds of the floor and of every backend, taking turns, after one round of warm-up."""
    rivals: dict[str, Callable[[Path], None]] = {"copy floor": lambda out: copy_floor(paths, out)}
    for name, status in dm.backends().items():
        if status.available and name != "reference":
            rivals[name] = lambda out, name=name: merge(paths, out, name)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, call in rivals.items():
            output = scratch / "out"
            elapsed = seconds(call, output)
            shutil.rmtree(output)
            if turn:
                times[name].append(elapsed)
    return times


def one_of_each_shape(workload: Workload) -> list[tuple[str, int]]:
    """A module of every shape, with the number of modules that share it."""
    counts = Counter((m, n) for _, m, n in workload.modules)
    first = {(m, n): name for name, m, n in reversed(workload.modules)}
    return [(first[shape], count) for shape, count in counts.items()]


def literal(adapters: list[dm.Adapter], module: str, dtype: torch.dtype) -> torch.Tensor:
    """ΔW [m, n] by the method as the paper states it, dense, with the same descent."""
    pairs = [adapter.factors(module) for adapter in adapters]
    scaling = [adapter.modules[module].scaling for adapter in adapters]
    omega = [1 / len(adapters)] * len(adapters)
    return reference.do_merging(
        [a for a, _ in pairs],
        [s * b.to(dtype) for s, (_, b) in zip(scaling, pairs)],
        omega,
        dtype=dtype,
    )


def peft_svd(adapters: list[dm.Adapter], module: str, rank: int) -> float:
    """Seconds of PEFT's add_weighted_adapter(combination_type="svd") on one module."""
    from peft import LoraConfig, PeftModel, get_peft_model

    spec = adapters[0].modules[module]
    model: PeftModel | None = None
    config = LoraConfig(r=spec.rank, lora_alpha=int(spec.scaling * spec.rank), target_modules=["0"])
    for i, adapter in enumerate(adapters):
        if model is None:
            base = torch.nn.Sequential(torch.nn.Linear(spec.n, spec.m, bias=False))
            model = get_peft_model(base, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0]
        a, b = adapter.factors(module)
        layer.lora_A[str(i)].weight.data.copy_(a)
        layer.lora_B[str(i)].weight.data.copy_(b)
    names = [str(i) for i in range(len(adapters))]
    weights = [1 / len(names)] * len(names)
    return seconds(
        lambda: model.add_weighted_adapter(
            names, weights, "merged", combination_type="svd", svd_rank=rank
        )
    )


def gate(adapters: list[dm.Adapter], shapes: list[tuple[str, int]]) -> float:
    """The largest relative error of ΔW against the literal method in float64, or an exit."""
    smallest = min(shapes, key=lambda item: adapters[0].modules[item[0]].m)[0]
    expected = literal(adapters, smallest, torch.float64)
    worst = 0.0
    for name, status in dm.backends().items():
        if status.available and name != "reference":
            only = [
                dm.from_tensors({smallest: a.factors(smallest)}, a.modules[smallest].scaling)
                for a in adapters
            ]
            delta = dm.merge(only, backend=name).delta(smallest).double()
            error = float((delta - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                sys.exit(f"{name} disagrees with the reference by {error:.1e}: nothing to report")
            worst = max(worst, error)
    return worst


def peak_memory(paths: list[Path], scratch: Path) -> dict[str, int]:
    """Peak resident bytes of a process that only merges, and of one that only imports."""
    # Not getrusage: its maximum is inherited from the process that starts this one.
    report = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    arguments = json.dumps([str(p) for p in paths])
    merging = f"dm.merge({arguments}, output={str(scratch / 'memory')!r})"
    script = "import torch, domerge_fast as dm, domerge_fast.api\n{}\n" + report
    peaks = {}
    for label, body in (("idle", "0"), ("merge", merging)):
        run = subprocess.run(
            [sys.executable, "-c", script.format(body)], capture_output=True, text=True, check=True
        )
        peaks[label] = int(run.stdout) * 1024
    return peaks


def machine() -> dict[str, object]:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "domerge_fast": dm.__version__,
    }


def measure(workload: Workload, rounds: int, rivals: bool, data: Path, output: Path) -> dict:
    paths = workload.write(data)
    adapters = [dm.load(path) for path in paths]
    shapes = one_of_each_shape(workload)
    error = gate(adapters, shapes)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        scratch = Path(folder)
        result = {
            "workload": workload.name,
            "factor_bytes": workload.factor_bytes,
            "modules": len(workload.modules),
            "adapters": workload.adapters,
            "rank": workload.rank,
            "error": error,
            "machine": machine(),
            "group_bytes": GROUP_BYTES,
            "output": str(output),
            "seconds": side_by_side(paths, rounds, scratch),
            "peak_bytes": peak_memory(paths, scratch),
        }
    if rivals:
        result["extrapolated"] = {
            "literal": sum(
                k * seconds(literal, adapters, name, torch.float32) for name, k in shapes
            ),
            "PEFT svd": sum(k * peft_svd(adapters, name, workload.rank) for name, k in shapes),
        }
    return result


def table(result: dict) -> str:
    """The result as Markdown; the ratios are against the copy floor and the cpu backend."""
    median = {name: statistics.median(t) for name, t in result["seconds"].items()}
    spread = {name: f"{min(t):.2f} to {max(t):.2f}" for name, t in result["seconds"].items()}
    for name, total in result.get("extrapolated", {}).items():
        median[f"{name} (extrapolated)"] = total
    floor, best = median["copy floor"], median.get("cpu", median["torch"])
    lines = [
        "| | seconds (median) | spread | x copy floor | x cpu backend |",
        "|---|---|---|---|---|",
    ]
    for name, value in median.items():
        lines.append(
            f"| {name} | {value:.2f} | {spread.get(name, 'one run')} | {value / floor:.2f} "
            f"| {value / best:.2f} |"
        )
    m, peaks = result["machine"], result["peak_bytes"]
    over = (peaks["merge"] - peaks["idle"]) / 2**20
    rounds = len(result["seconds"]["copy floor"])
    lines += [
        "",
        f"`{result['workload']}`: {result['adapters']} adapters of rank {result['rank']}, "
        f"{result['modules']} modules, {result['factor_bytes'] / 1e9:.2f} GB of factors; "
        f"{rounds} rounds; {m['cpu']}, {m['threads']} threads, torch {m['torch']}, "
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
    args = parser.parse_args()
    result = measure(
        WORKLOADS[args.workload], args.rounds, not args.no_rivals, args.data, args.output
    )
    print(table(result))
    if args.publish:
        publish(result)


if __name__ == "__main__":
    main()
