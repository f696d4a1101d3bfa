"""Where Python's garbage collector would look through many objects for nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector out while objects are made that all live on, and none in a circle.

    In a merge of four adapters of 18,000 modules it looks through their objects 185 times, once
    through all: 0.04 to 0.35 s of 1 s of the host's time. With 224 modules it is 2 % of 0.03 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
