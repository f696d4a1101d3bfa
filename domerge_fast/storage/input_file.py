"""A file from outside, read as it was when it was first opened.

It is read into memory of our own, never mapped: a file that shrinks or fails under a mapping kills
the process, and one that is rewritten shows up half old and half new. No descriptor is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from ..errors import DomergeError

__all__ = ["InputFile", "Refuse"]

Refuse: TypeAlias = Callable[[str, str], DomergeError]
"""(problem, remedy) -> the error in the words of whoever the file belongs to."""

Identity: TypeAlias = tuple[int, int, int, int, int]
Run: TypeAlias = tuple[int, Sequence[memoryview]]
"""Where in the file to start, and the memory to fill one after the other."""

_ELSEWHERE = -1
"""In place of the number of a file system."""

_MOST_PARTS = 1024
"""Of one preadv; IOV_MAX of Linux."""


class InputFile:
    """The file at `path`; every error is `refuse(problem, remedy)`, which the path's name begins.

    The first opening says which file it is; every later one has to find the same file, unchanged,
    before and after what it reads.
    """

    __slots__ = ("_identity", "path", "refuse")

    def __init__(self, path: Path, refuse: Refuse) -> None:
        self.path = path
        self.refuse = refuse
        self._identity: Identity | None = None

    def __getstate__(self) -> tuple[Path, Refuse, Sequence[int]]:
        """For another process, perhaps on a machine where the file system has another number."""
        return self.path, self.refuse, self.known_by

    def __setstate__(self, state: tuple[Path, Refuse, Sequence[int]]) -> None:
        self.path, self.refuse, known_by = state
        self._identity = (_ELSEWHERE, *known_by) if known_by else None  # type: ignore[assignment]

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor; when the block ends without an error, all it read was of one file.

        Where the block refuses what it read and the file has changed meanwhile, that it changed is
        what is said: half of a new file and half of an old one look damaged.
        """
        file = self._open()
        try:
            try:
                self._compare(os.fstat(file))
                try:
                    yield file
                except DomergeError:
                    self._compare(os.fstat(file))
                    raise
                self._compare(os.fstat(file))
            finally:
                os.close(file)
        except OSError as error:
            raise self._unreadable(error) from error

    def check(self) -> None:
        """Raise unless the file is still there, unchanged."""
        try:
            self._compare(os.stat(self.path))
        except OSError as error:
            raise self._unreadable(error) from error

    @property
    def known_by(self) -> Sequence[int]:
        """What tells the file from others, and from itself when it has changed, on any machine:
        its number, size and times; () before it was opened."""
        return self._identity[1:] if self._identity else ()

    @property
    def size(self) -> int:
        """Bytes of the file, when it was first opened."""
        assert self._identity is not None
        return self._identity[2]

    def read(self, most: int) -> bytes:
        """All of it; refused if that is more than so many bytes."""
        with self.opened() as file:
            self._check_size(most)
            data = bytearray(self.size)
            self.fill(file, [(0, [memoryview(data)])])
        return bytes(data)

    def chunks(self, most: int, nbytes: int = 16 << 20) -> Iterator[memoryview]:
        """All of it, a piece at a time in the same memory; refused if that is more than `most`
        bytes."""
        with self.opened() as file:
            self._check_size(most)
            memory = memoryview(bytearray(min(self.size, nbytes)))
            for start in range(0, self.size, nbytes):
                part = memory[: self.size - start]
                self.fill(file, [(start, [part])])
                yield part

    def fill(self, file: int, runs: Sequence[Run]) -> None:
        """Fill memory from an opened file; refused if it ends before that is full."""
        for start, parts in runs:
            for k in range(0, len(parts), _MOST_PARTS):
                some = parts[k : k + _MOST_PARTS]
                start = self._fill(file, start, some)

    def _check_size(self, most: int) -> None:
        if self.size > most:
            problem = f"has {self.size} bytes, at most {most} are read"
            raise self._problem(problem, "check the file")

    def _open(self) -> int:
        try:
            # Without waiting: a pipe would never open.
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise self._unreadable(error) from error

    def _fill(self, file: int, start: int, parts: Sequence[memoryview]) -> int:
        wanted = sum(map(len, parts))
        while wanted:
            done = os.preadv(file, parts, start)
            if not done:
                raise self._problem("ends before its data does", "download or save it again")
            start, wanted = start + done, wanted - done
            if wanted:
                parts = _rest(parts, done)
        return start

    def _compare(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise self._problem("is no regular file", "give a file")
        now = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        if self._identity is None or (_ELSEWHERE, *now[1:]) == self._identity:
            self._identity = now
        elif self._identity != now:
            raise self._problem("changed since it was loaded", "start again once it is complete")

    def _unreadable(self, error: Exception) -> DomergeError:
        reason = getattr(error, "strerror", None) or str(error)
        return self._problem(f"cannot be read ({reason})", "check the file")

    def _problem(self, problem: str, remedy: str) -> DomergeError:
        return self.refuse(f"{self.path.name} {problem}", remedy)


def _rest(parts: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of the parts after so many bytes."""
    ends = list(itertools.accumulate(map(len, parts)))
    k = next(k for k, end in enumerate(ends) if end > done)
    return [parts[k][len(parts[k]) - (ends[k] - done) :], *parts[k + 1 :]]
