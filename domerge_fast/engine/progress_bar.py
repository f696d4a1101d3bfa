"""Shows how far a merge is: modules done and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["shown"]


@contextlib.contextmanager
def shown(
    progress: bool | Callable[[int, int], None], total: int
) -> Iterator[Callable[[int, int], None]]:
    """A function of (modules done, modules in all): a bar on stderr, the caller's, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" modules", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
