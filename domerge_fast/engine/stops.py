"""What is said of descents that may have ended more than `tol` above their optimum.

Where one ends is an estimate (backends/descent.py). On 612 sets with norms up to 36 times apart no
descent with a gamma of 1 or more ended above a `tol` of 1e-3 or more; with less of either, and with
norms further apart, some did (docs/algorithm.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..algebra.host import Rows
from ..methods.base import Chosen
from ..methods.side_report import SideReports
from ..results.report import StackReport

__all__ = ["notes"]

TESTED_TOL, TESTED_GAMMA = 1e-3, 1.0
FAR = 100.0
"""Times that norms on a side are apart: with less no descent by TESTED_GAMMA ended above
TESTED_TOL."""


def notes(method: Chosen, reports: Sequence[StackReport], apart: float) -> tuple[str, ...]:
    """A sentence, where any module has descended. apart: `InterferenceSums.apart`."""
    steps = [_steps(side) for x in reports for side in (x.a, x.b) if side]
    taken = float(torch.cat(steps).max()) if steps else 0.0
    reasons = ", ".join(_reasons(method.options, taken, apart)) if taken else ""
    if not reasons:
        return ()
    what = f"{method.method.name}'s descents may have ended above tol, which is estimated"
    return (f"{what}: {reasons}",)


def _reasons(options: Any, taken: float, apart: float) -> Iterator[str]:
    """options: those of `do`. taken: the most steps."""
    if taken >= options.steps:
        yield f"some took all {options.steps} steps"
    if options.penalty != "squared":
        yield f"the penalty is {options.penalty!r}"
    elif options.tol < TESTED_TOL:
        yield f"tol is below {TESTED_TOL:g}"
    if options.gamma < TESTED_GAMMA:
        yield f"gamma is below {TESTED_GAMMA:g}"
    if apart > FAR:
        yield f"norms of adapters' A or B are up to {apart:.0f} times apart"


def _steps(side: SideReports) -> torch.Tensor:
    """Of every module."""
    return Rows.of(side.rows).tensor.select(1, 0)
