"""What is said of descents that may have ended more than `tol` above their optimum.

Where one ends is an estimate (backends/descent.py). On 128 sets with norms up to 36 times apart no
descent ended above a `tol` of 1e-3; below, and with norms further apart, some did
(docs/algorithm.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from ..algebra.host import Rows
from ..backends.descent import NEGLIGIBLE
from ..methods.base import Chosen
from ..methods.side_report import SideReports
from ..results.report import StackReport

__all__ = ["notes"]

TESTED_TOL = 1e-3
FAR = 100.0
"""Times that norms of updates are apart: with less no descent ended above TESTED_TOL."""


def notes(method: Chosen, reports: Sequence[StackReport]) -> tuple[str, ...]:
    """A sentence, where any module has descended."""
    sides = [(x, _steps(side)) for x in reports for side in (x.a, x.b) if side]
    steps = torch.cat([own for _, own in sides]).tolist() if sides else []
    if not any(steps):
        return ()
    ends = accumulate(len(own) for _, own in sides)
    moved = {id(x): x for (x, own), end in zip(sides, ends) if any(steps[end - len(own) : end])}
    reasons = ", ".join(_reasons(method.options, max(steps), [*moved.values()]))
    if not reasons:
        return ()
    what = f"{method.method.name}'s descents may have ended above tol, which is estimated"
    return (f"{what}: {reasons}",)


def _reasons(options: Any, taken: float, moved: Sequence[StackReport]) -> Iterator[str]:
    """options: those of `do`. taken: the most steps."""
    apart = max(map(_apart, moved))
    if taken >= options.steps:
        yield f"some took all {options.steps} steps"
    if options.penalty != "squared":
        yield f"the penalty is {options.penalty!r}"
    elif options.tol < TESTED_TOL:
        yield f"tol is below {TESTED_TOL:g}"
    if apart > FAR:
        yield f"norms of updates are up to {apart:.0f} times apart"


def _steps(side: SideReports) -> torch.Tensor:
    """Of every module."""
    return Rows.of(side.rows).tensor.select(1, 0)


def _apart(report: StackReport) -> float:
    """The largest ratio of two adapters' norms in a module, but for those that count as zero."""
    if not report.norms or not report.norms[0]:
        return 1.0
    norms = Rows.of(report.norms).tensor
    most = norms.amax(1, keepdim=True)
    return float((most / torch.where(norms > NEGLIGIBLE * most, norms, most)).nan_to_num(1.0).max())
