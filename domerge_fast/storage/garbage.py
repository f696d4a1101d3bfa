"""Where Python's garbage collector would look through many objects for nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector out while objects are made that all live on, and none in a circle.

    Those of an adapter's header do: four adapters of 18,000 modules are read in 1.6 s of CPU time,
    with the collector at work in 3.3 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
