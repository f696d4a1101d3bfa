"""What makes two runs one job: of all that a result depends on, by what people call it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .. import _C
from ..costs import cut
from ..job import Job, versions
from ..storage.lazy import dtype_name

__all__ = ["identity"]


def identity(job: Job, unit_bytes: int) -> dict[str, Any]:
    """As JSON. Which process writes what, and how many there are, is not in it."""
    files = {*job.files, *job.target.files, *job.target.copied}
    if job.target.base:
        files |= {*job.target.base.inputs}
    asked = dict(job.recipe.plain())
    del asked["adapters"]
    device = job.budget.device.type
    asked["device"] = device
    units = [names for part in job.parts for names, _ in cut(part.plan, unit_bytes)]
    layouts = [(x.name, x.m, x.inputs, x.largest_rank) for x in job.target.layouts.values()]
    known = {
        "adapters": [x.name for x in job.recipe.adapters],
        "files of the adapters or the base": _sum(
            sorted((str(file.path), *file.known_by) for file in files)
        ),
        "options": asked,
        "versions of domerge_fast or torch": versions(),
        "instruction set or kind of GPU": _instructions(device),
        "units": _sum([units, layouts, dtype_name(job.target.dtype)]),
    }
    found: dict[str, Any] = json.loads(json.dumps(known))
    return found


def _instructions(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_C.isa()}, {torch.backends.cpu.get_cpu_capability()}"


def _sum(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode(errors="surrogateescape")).hexdigest()
