"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from .._version import __version__
from ..engine import transfer

__all__ = ["describe", "free_bytes"]


def describe(device: torch.device) -> dict[str, object]:
    """Processor, cores, threads and versions; the GPU and torch's CUDA where one is used."""
    found: dict[str, object] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "domerge_fast": __version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def free_bytes(device: torch.device) -> int:
    """Memory that a measurement may take: the device's, or the host's without swapping."""
    if device.type == "cuda":
        return transfer.free_bytes(device)
    table = Path("/proc/meminfo")
    if table.exists():
        rows = dict(line.split(":") for line in table.read_text().splitlines())
        return 1024 * int(rows["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = (x.partition(": ")[2] for x in lines if x.startswith("model name"))
    return next(names, platform.processor())
