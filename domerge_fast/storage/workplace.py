"""A hidden folder beside an output, in which whoever writes that output works: one at a time.

Its name follows from the output's and has always the same length. Who works there holds the lock
(flock) on a file in it, so that a kill lets go of it: whoever gets the lock and finds something
there knows that nobody works on it any more. Nothing is left of it when the work is done.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from io import FileIO
from pathlib import Path

from ..errors import OutputError

__all__ = ["Workplace"]

WAIT_SECONDS = 60.0
"""For another one who writes the same output."""

_POLL_SECONDS = 0.05
_LOCK = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_GONE_OR_IN_USE = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
"""Another one has come in, and may have gone again."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Workplace:
    """For the output at a path without links; nothing is made before `enter`."""

    def __init__(self, target: Path) -> None:
        name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
        self.folder = target.parent / f".domerge_fast-{name}"
        self.is_held = False
        self._is_made = False
        self._target = target
        self._path = self.folder / _LOCK
        self._lock: FileIO | None = None

    def enter(self) -> None:
        """Make the folder and take its lock.

        OutputError if another one keeps it for longer than WAIT_SECONDS, and where there are no
        locks; OSError if the folder cannot be made.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._take():
            if time.monotonic() > deadline:
                problem = "is being written by another process, which holds the lock"
                problem += f" '{self.folder.name}/{_LOCK}' beside it"
                raise OutputError(str(self._target), problem, "try again when that one has ended")
            time.sleep(_POLL_SECONDS)

    def inside(self) -> list[Path]:
        """What is in the folder, but for the lock. OSError."""
        return [self.folder / name for name in sorted(os.listdir(self.folder)) if name != _LOCK]

    def clear(self) -> None:
        """Remove the folders inside with their files. OSError, also for what we do not make: a
        folder in them."""
        for folder in self.inside():
            for name in os.listdir(folder):
                os.unlink(folder / name)
            os.rmdir(folder)

    def leave(self) -> None:
        """Remove the lock, and the folder where nothing else is in it. OSError."""
        try:
            os.unlink(self._path)
        finally:
            self.let_go()  # first: NFS keeps a file by another name as long as it is open
        try:
            os.rmdir(self.folder)
        except OSError as error:
            if error.errno not in _GONE_OR_IN_USE:
                raise

    def let_go(self) -> None:
        """Let go of the lock, and leave everything where it is."""
        self.is_held = False
        if self._lock is not None:
            with contextlib.suppress(OSError):  # nothing was written to it, and it is closed
                self._lock.close()
            self._lock = None

    def retake(self) -> bool:
        """After a `leave` that was stopped half-way: whether the folder is still there, nobody
        else has come in, and the lock is held again. Raises as `enter` does."""
        self.let_go()
        return os.path.isdir(self.folder) and self._take()

    def forget(self) -> None:
        """Remove what an `enter` that was stopped half-way has left, if anything. OSError."""
        try:
            mine = self.retake()
        except (OSError, OutputError):
            if self._is_made:  # otherwise it is another one's
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)
                os.rmdir(self.folder)
            return
        if mine:
            self.leave()

    def _take(self) -> bool:
        self._make()
        try:
            self._lock = FileIO(str(self._path), "a")  # NFS locks only what may be written to
        except FileNotFoundError:
            return False  # whoever worked here has just left
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_held = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._path))
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if self._is_made:
                self.leave()
            problem = f"is on a file system that cannot lock files ({error.strerror})"
            raise OutputError(str(self._target), problem, "choose another place") from error
        if not self.is_held:
            self.let_go()
        return self.is_held

    def _make(self) -> None:
        try:
            os.mkdir(self.folder, 0o700)
            self._is_made = True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # gone again
                self._check_safe()

    def _check_safe(self) -> None:
        """OutputError if somebody else could change what is written before it is in its place."""
        found, around = os.lstat(self.folder), os.stat(self.folder.parent)
        theirs = found.st_uid != os.geteuid() or bool(found.st_mode & _OTHERS_WRITE)
        if not stat.S_ISDIR(found.st_mode) or (theirs and around.st_mode & _OTHERS_WRITE):
            problem = f"cannot be written: {self.folder.name!r} beside it is somebody else's"
            remedy = "remove that folder, or choose another place"
            raise OutputError(str(self._target), problem, remedy)
