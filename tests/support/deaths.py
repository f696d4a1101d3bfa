"""What may happen to a process that merges with others, by where it is: each is set up in the
process that it happens to."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

from domerge_fast.distributed import journal, shared, work
from domerge_fast.distributed.claims import Claims
from domerge_fast.distributed.journal import Journal
from domerge_fast.formats.merge_folder import MergeFolder
from domerge_fast.storage import folder, resumable, stream

Happening = Callable[[], None]


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def idle(for_good: bool = True) -> None:
    """This process takes no unit, or none before others have had one for too long."""
    Claims.free = lambda self, rather=(): iter(())  # type: ignore[method-assign]
    if for_good:
        shared.PATIENCE = (1e6, 1e6)


def at(owner: Any, name: str, happening: Happening, call: int = 1, after: bool = False) -> None:
    """Let it happen at the n-th call of a function of this process, before or after it."""
    real, numbers = getattr(owner, name), itertools.count(1)

    @functools.wraps(real)
    def instead(*args: Any, **given: Any) -> Any:
        number = next(numbers)  # of several threads
        if number == call and not after:
            happening()
        found = real(*args, **given)
        if number == call and after:
            happening()
        return found

    setattr(owner, name, instead)


def torn_write(call: int = 1) -> None:
    """A kill when half of a tensor is written, and something else stands in place of the rest."""

    def write(file: Any, data: Any) -> None:
        view = memoryview(data).cast("B")
        os.write(file.fileno(), view[: len(view) // 2])
        os.write(file.fileno(), b"\xff" * (len(view) - len(view) // 2))
        killed()

    at(stream, "write_tensor", lambda: setattr(stream, "write", write), call)


def torn_entry(call: int = 1) -> None:
    """A kill when half of an entry of the journal is written."""

    def put(path: Any, data: bytes) -> None:
        with open(path.with_name(f"{path.name}.half"), "wb") as file:
            file.write(data[: len(data) // 2])
        killed()

    at(Journal, "put", lambda: setattr(journal, "put", put), call)


STAGES: dict[str, tuple[int, Callable[[], None]]] = {
    "adapters are read": (0, lambda: at(work, "identity", killed)),
    "the output is begun": (0, lambda: at(resumable.Resumable, "start", killed)),
    "the others are told": (0, lambda: at(work.Work, "_say", killed, after=True)),
    "a tensor is half written": (1, torn_write),
    "a tensor is half written by the first": (0, lambda: torn_write(3)),
    "a unit is written": (1, lambda: at(Journal, "put", killed)),
    "an entry is half written": (1, torn_entry),
    "some units are done": (0, lambda: at(Journal, "put", killed, 3, after=True)),
    "all units are done": (0, lambda: at(MergeFolder, "_write_card", killed)),
    "all is written": (0, lambda: at(folder, "_swap", killed)),
    "the output has its place": (0, lambda: at(folder, "_swap", killed, after=True)),
    "some entries are cleared away": (0, lambda: at(os, "unlink", killed, 5)),
    "the rest is cleared away": (0, lambda: at(os, "rmdir", killed)),
}
"""By where a process of which rank is killed, when two merge."""
