"""Where the time of a `do` merge goes: seconds in its ops, in reading and in writing, by thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from domerge_fast import ops, reading
from domerge_fast.adapters.plan import Plan
from domerge_fast.formats.peft.write import PeftFolder

REST = "Python and waiting"
TIMED = [
    (reading, "load", "open"),
    (Plan, "stacks", "read"),
    (PeftFolder, "add", "write"),
    (PeftFolder, "finish", "write"),
    *((ops, name, name) for name in ops.__all__),
]
"""Functions and the stage they are."""

Stages = dict[str, dict[str, float]]
T = TypeVar("T")


def measure(merge: Callable[[], T]) -> tuple[T, Stages]:
    """The merge's result, and seconds by thread ("main", "read", "write") and stage.

    Those of "main" add up to the whole.
    """
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    with contextlib.ExitStack() as stack:
        for owner, name, stage in TIMED:
            stack.enter_context(_timed(owner, name, stage, seconds))
        start = time.perf_counter()
        result = merge()
        whole = time.perf_counter() - start
    found = {thread: dict(stages) for thread, stages in seconds.items()}
    found["main"][REST] = whole - sum(found["main"].values())
    return result, found


@contextlib.contextmanager
def _timed(
    owner: Any, name: str, stage: str, seconds: dict[str, dict[str, float]]
) -> Iterator[None]:
    original = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            seconds[_thread()][stage] += time.perf_counter() - start

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _thread() -> str:
    """The engine's threads are called "domerge-read_0" and "domerge-write_0"."""
    current = threading.current_thread()
    if current is threading.main_thread():
        return "main"
    return current.name.partition("_")[0].removeprefix("domerge-")
