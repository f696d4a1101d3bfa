"""A thread that works for the page, and stops in the middle of what is no longer wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import DomergeError

__all__ = ["Check", "Superseded", "Worker"]

T = TypeVar("T")

Check = Callable[[], None]
"""Raises Superseded where what is being worked on is no longer wanted."""


class Superseded(DomergeError):
    """Something else was asked for meanwhile, or the page is closed."""


@dataclass(eq=False)
class _Job:
    """kind: of what was asked for; of: about what. Neither of what everybody waits for."""

    kind: str = ""
    of: Hashable = None
    unwanted: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Does one thing after the other, in the order asked for. What it is given is called with a
    check, which it calls whenever it can stop."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._lock = threading.Lock()
        self._jobs: set[_Job] = set()
        self._closed = threading.Event()

    def lasting(self, work: Callable[[Check], T]) -> Future[T]:
        """What stops only when the page is closed."""
        return self._submit(_Job(), work)

    def newest(self, kind: str, of: Hashable, work: Callable[[Check], T]) -> Future[T]:
        """What stops when more of the kind is asked for, or anything about something else."""
        return self._submit(_Job(kind, of), work)

    def check(self) -> None:
        """Superseded where it was stopped."""
        if self._closed.is_set():
            raise Superseded("stopped: the page is closed")

    def stop(self) -> None:
        """Nothing is wanted any more."""
        self._closed.set()

    def close(self) -> None:
        """Stop, and let go of the thread."""
        self.stop()
        self._thread.shutdown()

    def _submit(self, job: _Job, work: Callable[[Check], T]) -> Future[T]:
        def check() -> None:
            self.check()
            if job.unwanted.is_set():
                raise Superseded("stopped: something else was asked for meanwhile")

        def run() -> T:
            try:
                check()
                return work(check)
            finally:
                with self._lock:
                    self._jobs.discard(job)

        with self._lock:
            for other in self._jobs if job.kind else ():
                if other.kind == job.kind or (other.kind and other.of != job.of):
                    other.unwanted.set()
            self._jobs.add(job)
        return self._thread.submit(run)
