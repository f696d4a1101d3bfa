"""SHA-256 of files, worked out in threads of their own while something else is done."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

from .input_file import InputFile

__all__ = ["Digests", "Sums", "sha256"]

PIECE_BYTES = 1 << 20
MOST_THREADS = 4


class _Stopped(Exception):
    """Nobody wants the sum any more."""


class Sums(Protocol):
    """The sums of files."""

    def of(self, files: Iterable[InputFile]) -> dict[str, str]:
        """By the files' names."""
        ...


class Digests:
    """The sums of files, each begun at once; the block's end stops what is not done.

    A file that has changed since it was first opened is refused, as by all that read it.
    """

    def __init__(self, files: Iterable[InputFile]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "domerge-sum")
        self._sums: dict[InputFile, Future[str]] = {
            file: self._pool.submit(self._sum, file) for file in files
        }

    def of(self, files: Iterable[InputFile]) -> dict[str, str]:
        """By the files' names, when they are known."""
        return {file.path.name: self._sums[file].result() for file in files}

    def _sum(self, file: InputFile) -> str:
        found = hashlib.sha256()
        for piece in file.chunks(sys.maxsize, PIECE_BYTES):
            if self._stop.is_set():
                raise _Stopped
            found.update(piece)
        return found.hexdigest()

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def sha256(file: InputFile) -> str:
    """Of one file, now."""
    with Digests([file]) as digests:
        (found,) = digests.of([file]).values()
    return found
