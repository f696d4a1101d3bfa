"""Locks on files, which a kill lets go of."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ...errors import OutputError

__all__ = ["Worker", "is_alive", "locked"]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock for as long as the block takes, after whoever has it."""
    with FileIO(str(path), "a") as file:  # NFS locks only what may be written to
        _lock(file, path, fcntl.LOCK_EX)
        yield


class Worker:
    """A process, or a part of one, that evaluates candidates: alive as long as it holds the lock
    on its file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self._path = folder / self.name
        self._file = FileIO(str(self._path), "a")
        _lock(self._file, self._path, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._file.close()


def is_alive(folder: Path, name: str) -> bool:
    """Whether a worker still holds its lock; the file of one that does not is removed."""
    try:
        file = FileIO(str(folder / name), "r+")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
    return False


def _lock(file: FileIO, path: Path, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        problem = f"is on a file system that cannot lock files ({error.strerror})"
        raise OutputError(str(path.parent), problem, "choose another place") from error
