"""What is said of descents that may have ended more than `tol` above their optimum.

Where one ends is an estimate (backends/descent.py). On 128 sets with norms up to 36 times apart no
descent ended above a `tol` of 1e-3; below, and with norms further apart, some did
(docs/algorithm.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..algebra.host import Rows
from ..backends.descent import NEGLIGIBLE
from ..methods.base import Chosen
from ..results.report import StackReport

__all__ = ["notes"]

TESTED_TOL = 1e-3
FAR = 100.0
"""Times that norms of updates are apart: with less no descent ended above TESTED_TOL."""


def notes(method: Chosen, reports: Sequence[StackReport]) -> tuple[str, ...]:
    """A sentence, where any module has descended."""
    moved = [x for x in reports if any(rows[:, 0].any() for rows in _sides(x))]
    reasons = ", ".join(_reasons(method.options, moved)) if moved else ""
    if not reasons:
        return ()
    what = f"{method.method.name}'s descents may have ended above tol, which is estimated"
    return (f"{what}: {reasons}",)


def _reasons(options: Any, moved: Sequence[StackReport]) -> Iterator[str]:
    """options: those of `do`."""
    taken = max(float(rows[:, 0].max()) for x in moved for rows in _sides(x))
    apart = max(_apart(x) for x in moved)
    if taken >= options.steps:
        yield f"some took all {options.steps} steps"
    if options.penalty != "squared":
        yield f"the penalty is {options.penalty!r}"
    elif options.tol < TESTED_TOL:
        yield f"tol is below {TESTED_TOL:g}"
    if apart > FAR:
        yield f"norms of updates are up to {apart:.0f} times apart"


def _sides(report: StackReport) -> list[torch.Tensor]:
    """The numbers of each side that descended: a row for every module."""
    return [Rows.of(x.rows).tensor for x in (report.a, report.b) if x]


def _apart(report: StackReport) -> float:
    """The largest ratio of two adapters' norms in a module, but for those that count as zero."""
    if not report.norms or not report.norms[0]:
        return 1.0
    norms = Rows.of(report.norms).tensor
    most = norms.amax(1, keepdim=True)
    return float((most / torch.where(norms > NEGLIGIBLE * most, norms, most)).nan_to_num(1.0).max())
