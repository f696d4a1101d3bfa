"""What a merge will read, write and take, before it is run."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .adapters.differences import NO_CHANGES
from .adapters.plan import Plan
from .formats.peft.write import largest
from .job import Job
from .parts import Part

__all__ = ["Estimate", "estimate"]

SAMPLE_BYTES = 32 << 20
"""Of factors that are merged to see how long it takes."""


@dataclass(frozen=True)
class Estimate:
    """modules: the merged rank of each, at most. adapters: by name, the least, median and largest
    rank. read, written: bytes; factors are read twice where λ is found. memory: bytes for the
    groups of modules that are worked on at once; Python, torch and the kernels' scratch (256 MiB at
    most) come on top. sampled: bytes of factors that were merged, and dropped, to find `seconds`,
    in which writing to the disk is not counted."""

    modules: dict[str, int]
    adapters: dict[str, tuple[int, float, int]]
    read: int
    written: int
    memory: int
    sampled: int
    seconds: float

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> list[tuple[str, str]]:
        """Labels and figures, for people."""
        ranks = sorted(self.modules.values())
        lines = [("modules", str(len(ranks))), ("merged rank", _span(ranks[0], ranks[-1]))]
        for k, (name, (least, _, most)) in enumerate(self.adapters.items(), 1):
            lines.append((f"adapter {k}", f"{name}, rank {_span(least, most)}"))
        how = f"by merging {_size(self.sampled)} of factors now; writing to the disk comes on top"
        return [
            *lines,
            ("to read", _size(self.read)),
            ("to write", _size(self.written)),
            ("memory", f"{_size(self.memory)} beside torch and up to 256 MiB of scratch"),
            ("seconds", f"about {self.seconds:.2g} ({how})"),
            ("", "nothing was written"),
        ]


def _span(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def estimate(job: Job) -> Estimate:
    """Merges a sample of every part's modules and drops it; nothing is written."""
    of_samples = [_timed(job, part) for part in job.parts]
    ranks = {a.name: sorted(m.rank for m in a.modules.values()) for a in job.plan.adapters}
    layouts = job.target.layouts.values()
    return Estimate(
        modules={layout.name: layout.largest_rank for layout in layouts},
        adapters={n: (r[0], statistics.median(r), r[-1]) for n, r in ranks.items() if r},
        read=sum(part.passes * _factor_bytes(part.plan) for part in job.parts) + _whole(job),
        written=_written(job),
        memory=max(part.memory(job.budget) for part in job.parts),
        sampled=sum(nbytes for nbytes, _ in of_samples),
        seconds=math.fsum(seconds for _, seconds in of_samples),
    )


def _factor_bytes(plan: Plan) -> int:
    return max(plan.read_bytes(), sum(map(plan.factor_bytes, plan.names)))


def _whole(job: Job) -> int:
    """Bytes of the tensors that are copied."""
    base = job.target.base.tensors.values() if job.target.base and job.format.needs_base else ()
    return sum(x.nbytes for x in (*job.target.carried.values(), *base))


def _written(job: Job) -> int:
    if job.format.needs_base:
        return _whole(job)
    size = job.target.dtype.itemsize
    if job.format.dense:
        dense = sum(job.plan.dense_bytes(name) // 4 * size for name in job.plan.names)
        return dense + _whole(job)
    layouts = job.target.layouts
    thin = {name: layout for name, layout in layouts.items() if not layout.dense}
    target = dataclasses.replace(job.target, layouts=thin)
    changes = target.changes if job.format.holds.changes else NO_CHANGES
    if changes.names:
        target = dataclasses.replace(target, changes=NO_CHANGES)
    tensors = [x for _, x in largest(target, target.rank)]
    tensors += [(target.dtype, (x.m, *x.inputs)) for x in layouts.values() if x.dense]
    tensors += [(x.dtype, x.shape) for x in changes.tensors(target.dtype).values()]
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors)


def _timed(job: Job, part: Part) -> tuple[int, float]:
    """Bytes of the part's sample, and the seconds that the whole part will take."""
    names = list(_first(part.plan))
    _run(job, part, names[:1])  # what is slower only once
    began = time.perf_counter()
    _run(job, part, names)
    nbytes = sum(map(part.plan.factor_bytes, names))
    share = nbytes / sum(map(part.plan.factor_bytes, part.plan.names))
    return nbytes, (time.perf_counter() - began) / share


def _first(plan: Plan) -> Iterator[str]:
    filled = 0
    for name in plan.names:
        if filled < SAMPLE_BYTES:
            yield name
        filled += plan.factor_bytes(name)


def _run(job: Job, part: Part, names: list[str]) -> None:
    part = dataclasses.replace(part, plan=part.plan.only(names))
    with torch.no_grad():
        part.run(job.budget, job.sums(), _drop, True, lambda done, total: None)


def _drop(batches: object) -> None:
    return None
