"""Whole merges, files to files: the copy floor and what domerge_fast does, taking turns."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import stages
import torch
from safetensors.torch import save_file
from stages import Stages

import domerge_fast as dm
from domerge_fast.bench import measure
from domerge_fast.results.report import Report

FLOOR = "copy floor"
SVD = "svd"
"""After a backend's name: its `svd` to the adapters' rank. A backend's name alone is `do`."""

RESET_PEAK = "5"
"""What /proc/self/clear_refs takes to forget the peak (man 5 proc)."""

PATIENCE = 60.0
"""Seconds after which a call is not repeated; one that takes longer is run once, unwarmed."""

Call = Callable[[Path], object]


WEIGHTS = "adapter_model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FloorFile:
    """An adapter's factors, read into memory of their own as a merge reads them: never mapped."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        self.file = files.enter_context(path.open("rb", buffering=0))
        length = int.from_bytes(self.file.read(8), "little")
        self.header = json.loads(self.file.read(length))
        self.header.pop("__metadata__", None)
        self.start = 8 + length

    def read(self, key: str) -> torch.Tensor:
        entry = self.header[key]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        done, begin = 0, self.start + entry["data_offsets"][0]
        while done < tensor.nbytes:
            done += os.preadv(self.file.fileno(), [memoryview(memory)[done:]], begin + done)
        return tensor


def copy_floor(paths: Sequence[Path], output: Path) -> None:
    """Read all factors, stack them, write the stack with the safetensors library, and wait until
    it is on the disk, as a merge does."""
    stacked = {}
    with contextlib.ExitStack() as opened:
        files = [FloorFile(path / WEIGHTS, opened) for path in paths]
        for key in sorted(set().union(*(file.header for file in files))):
            parts = [file.read(key) for file in files if key in file.header]
            stacked[key] = torch.cat(parts, dim=0 if "lora_A" in key else 1)
    output.mkdir()
    save_file(stacked, output / WEIGHTS, metadata={"format": "pt"})
    for path in (output / WEIGHTS, output, output.parent):
        sync(path)


def sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def merge(
    paths: Sequence[Path], output: Path, method: str, backend: str, device: torch.device
) -> dm.Merged:
    return dm.merge(
        paths, method=method, backend=backend, device=str(device), output=output, scale=1.0
    )


@dataclass
class Watched:
    """`do` on a backend; keeps the report, the stages, the peak memory and the seconds of all cores
    of its last merge."""

    paths: Sequence[Path]
    backend: str
    device: torch.device
    report: Report | None = None
    stages: Stages = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    core_seconds: float = 0.0

    def __call__(self, output: Path) -> None:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        idle, start = peak_bytes(), time.process_time()
        merged, self.stages = stages.measure(
            lambda: merge(self.paths, output, "do", self.backend, self.device)
        )
        self.core_seconds = time.process_time() - start
        self.report = merged.report
        self.peak_bytes = {"idle": idle, "do": peak_bytes()}


def peak_bytes() -> int:
    """Most resident bytes of this process since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def calls(paths: Sequence[Path], first: Watched, others: bool) -> dict[str, Call]:
    """The floor, the first backend, and the other backends and `svd` if wanted, by name."""
    found: dict[str, Call] = {FLOOR: lambda out: copy_floor(paths, out), first.backend: first}
    if others:
        device, best = first.device, first.backend
        for name in measure.usable(device):
            if name != best:
                found[name] = lambda out, name=name: merge(paths, out, "do", name, device)
        found[f"{best} {SVD}"] = lambda out: merge(paths, out, SVD, best, device)
    return found


def take_turns(
    calls: Mapping[str, Call], rounds: int, scratch: Path, patience: float = PATIENCE
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` times after one of warm-up, as far as patience goes."""

    def seconds(call: Call) -> float:
        output = scratch / "out"
        start = time.perf_counter()
        call(output)
        elapsed = time.perf_counter() - start
        shutil.rmtree(output)
        return elapsed

    first = {name: seconds(call) for name, call in calls.items()}
    times = {name: [t] if t > patience else [] for name, t in first.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(times[name]) < patience:
                times[name].append(seconds(call))
    return times


def peak_memory(
    paths: Sequence[Path], methods: Sequence[str], scratch: Path, device: torch.device
) -> dict[str, int]:
    """Peak resident bytes of a process that only imports, and of one for each method's merge."""
    # Not getrusage: its maximum is inherited from the process that starts this one.
    report = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    script = "import torch, domerge_fast as dm, domerge_fast.api\n{}\n" + report
    arguments = json.dumps([str(p) for p in paths])
    bodies = {"idle": "0"}
    for method in methods:
        output = str(scratch / f"memory-{method}")
        bodies[method] = (
            f"dm.merge({arguments}, {method!r}, scale=1.0, device='{device}', output={output!r})"
        )
    peaks = {}
    for label, body in bodies.items():
        run = subprocess.run(
            [sys.executable, "-c", script.format(body)], capture_output=True, text=True, check=True
        )
        peaks[label] = int(run.stdout) * 1024
        shutil.rmtree(scratch / f"memory-{label}", ignore_errors=True)
    return peaks
