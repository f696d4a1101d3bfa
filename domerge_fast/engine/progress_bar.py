"""Shows how far a merge, or a search, is: what is done, and the time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

__all__ = ["shown", "untold"]

FIRST = "{percentage:3.0f}% {bar} {n_fmt} of {total_fmt}"
BAR = f"{FIRST}, {{rate_noinv_fmt}}, {{remaining}} left"
"""What tqdm shows before anything is done, and from then on."""

ROOM = 3
"""Columns that the bar leaves free: for "^C", which a terminal shows where Ctrl-C is pressed, and
for the cursor."""


def untold(done: int, total: int) -> None:
    """Nobody is told how far it is."""


@contextlib.contextmanager
def shown(
    progress: bool | Callable[[int, int], None], total: int, unit: str = "modules"
) -> Iterator[Callable[[int, int], None]]:
    """A function of (units done, units in all): a bar on stderr, the caller's, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield untold
        return
    from tqdm import tqdm

    look = {"bar_format": FIRST, "dynamic_ncols": True, "leave": False, "delay": 1e-9}
    bar = tqdm(total=total, unit=f" {unit}", **look)
    size, bar.delay = bar.dynamic_ncols, 0  # nothing was shown yet, at another width

    def narrower(file: TextIO) -> tuple[int | None, int | None]:
        columns, lines = size(file)
        return columns and max(1, columns - ROOM), lines

    def show(done: int, total: int) -> None:
        bar.total, bar.bar_format = total, BAR
        bar.update(done - bar.n)

    bar.dynamic_ncols = narrower
    bar.refresh()
    try:
        yield show
    finally:
        bar.close()
        if bar.ncols:
            bar.fp.write(f"\r{' ' * (bar.ncols + ROOM - 1)}\r")
