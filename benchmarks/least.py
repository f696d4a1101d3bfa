"""The least time that a machine's copy and GEMM rates allow for the merge of a workload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from domerge_fast.algebra.side import Side
from domerge_fast.bench import bounds
from domerge_fast.bench.bounds import NOTHING, Rates, Work
from domerge_fast.bench.workloads import Workload
from domerge_fast.methods.side_report import SideReport
from domerge_fast.results.report import Report


def least(workload: Workload, report: Report, rates: Rates) -> dict[str, Any]:
    """Seconds, what takes them, and what they follow from; the steps are those of the report."""
    work = do_work(workload, report)
    seconds, limit = rates.seconds(work)
    return {
        "seconds": seconds,
        "limit": limit,
        "bytes": work.bytes,
        "flops": work.flops,
        "copy": rates.copy,
        "gemm": dict(rates.gemm),
    }


def do_work(workload: Workload, report: Report) -> Work:
    """The flops of a `do` merge; factors are read once and results written once."""
    ranks: dict[str, list[int]] = {}
    for member in workload.members:
        for shape in member.modules:
            ranks.setdefault(shape.name, []).append(member.rank)
    total = NOTHING
    for shape in workload.modules:
        done = report.modules[shape.name]
        a = problem(ranks[shape.name], shape.n, workload.dtype)
        b = problem(ranks[shape.name], shape.m, workload.dtype)
        total += _side(a, done.a) + _side(b, done.b)
        total += bounds.apply([coefficients(b, _on_factors(done.b))], [b], workload.dtype)
        total += bounds.block_gram([b])
        total += bounds.apply_decouple([coefficients(a, _on_factors(done.a))], [a], workload.dtype)
    return Work(2 * workload.factor_bytes, total.flops_in)


def problem(ranks: Sequence[int], d: int, dtype: torch.dtype) -> Side:
    """A side of these shapes, without numbers."""
    blocks = tuple(torch.empty(r, d, dtype=dtype, device="meta") for r in ranks)
    return Side(blocks, (1.0,) * len(blocks))


def coefficients(p: Side, on_factors: bool) -> torch.Tensor | None:
    """C [R, R] without numbers; None where the descent moves the factors themselves."""
    return None if on_factors else torch.empty(p.rank, p.rank, device="meta")


def _side(p: Side, done: SideReport | None) -> Work:
    """The descent of one side, and the Gram it starts from."""
    if done is None:
        return NOTHING
    if _on_factors(done):
        return bounds.orthogonalize_factors([p], [done.steps])
    return bounds.gram([p]) + bounds.orthogonalize([p.rank], [done.steps])


def _on_factors(done: SideReport | None) -> bool:
    return done is not None and done.scaled is not None
