"""Shows how far a merge, or a search, is: what is done, and the time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["shown", "untold"]

BAR = "{percentage:3.0f}% {bar} {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
"""What tqdm shows, as wide as the terminal."""


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

    look = {"bar_format": BAR, "dynamic_ncols": True, "leave": False}
    with tqdm(total=total, unit=f" {unit}", **look) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
