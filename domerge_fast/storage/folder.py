"""A folder or a file that appears whole or not at all, and stays through a power cut.

Everything is written and flushed to the disk in a hidden folder beside the target, and then takes
the target's place in one step; only when that step is on the disk is the old output removed. One
process at a time works on a target: the lock is held from before the old output is looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError, OutputWarning
from .replacing import Replacing, cannot_write, check_path
from .workplace import Workplace

__all__ = ["Writing", "last_written", "recover", "whole_output"]

NEW, OLD = "new", "old"
"""In the hidden folder: what is written, which the old output is exchanged for; and the old output
while its name is free, where names cannot be exchanged."""

last_written: Path | None = None
"""What this process has put in its place last: an interrupt after that did not stop it."""


@contextlib.contextmanager
def whole_output(target: Path, replacing: Replacing) -> Iterator[Path]:
    """A new folder, or a new and empty file where `replacing` is of one, that takes the target's
    place when the block ends without an error.

    Inside the block the target is locked, and what a killed run has left is gone. After an error
    or Ctrl-C all is as it was; after a kill only a hidden folder is left over, until the next run.
    What fails when the new folder is in its place, is told by an OutputWarning. Raises OutputError.
    """
    check_path(target)
    replacing.check(target, target)
    writing = Writing(target, replacing)
    try:
        yield writing.begin()
        writing.commit()
    except BaseException as error:
        if writing.is_committed():
            writing.finish()
            if isinstance(error, OSError):  # in the last steps of an exchange by renaming
                return
            raise
        left = writing.undo()
        if isinstance(error, OSError):
            raise cannot_write(target, error, left) from error
        if left:
            _warn(target, f"was not written, but {left}", "remove that")
        raise
    try:
        writing.finish()
    except KeyboardInterrupt:
        writing.finish(again=True)
        raise


def recover(target: Path) -> None:
    """Put back an output that a kill has left without a name. OutputError."""
    check_path(target)
    writing = Writing(target, Replacing(False, False, (), lambda folder: False))
    if not writing.is_torn():
        return
    try:
        writing.sweep()
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        writing.undo()


class Writing:
    """One output on its way: `begin`, `commit`, `finish`; or `undo` at any time before it is
    committed. All but `undo` and `finish` raise OSError or OutputError. One that another process
    has begun: `lock`, `go_on`, and the rest; `let_go` leaves it for the next."""

    def __init__(self, target: Path, replacing: Replacing) -> None:
        self._shown = target
        self._target = Path(os.path.realpath(target))  # a link stays, what it points to is replaced
        self._replacing = replacing
        self._work = Workplace(self._target)
        self._new, self._old = self._work.folder / NEW, self._work.folder / OLD
        self._fresh = self._new / self._target.name if replacing.file else self._new
        self._made: list[Path] = []
        self._is_swept = False
        self._born: tuple[int, int] | None = None
        self._is_swapping = False

    @property
    def hidden(self) -> Path:
        """The folder beside the target in which all happens."""
        return self._work.folder

    @property
    def fresh(self) -> Path:
        """The new folder or file."""
        return self._fresh

    def begin(self) -> Path:
        """The new folder or file, empty; what a killed run has left is cleared away."""
        self.lock()
        self._clear()
        self._replacing.check(self._target, self._shown)
        os.mkdir(self._new)
        if self._replacing.file:
            self._fresh.touch(exist_ok=False)
        self._born = _identity(self._fresh)
        return self._fresh

    def lock(self) -> None:
        """Lock the target, unless that is done."""
        if self._work.is_held:
            return
        self._made = [parent for parent in self._target.parents if not parent.exists()]
        if self._made:
            self._target.parent.mkdir(parents=True, exist_ok=True)
        self._work.enter()

    def go_on(self) -> None:
        """With what another process has begun."""
        if self.is_torn():
            os.replace(self._old, self._target)
        self._replacing.check(self._target, self._shown)
        self._born = _identity(self._fresh)
        self._is_swept = True

    def let_go(self) -> None:
        """Leave all as it is."""
        self._work.let_go()

    def sweep(self) -> None:
        """Lock the target, and clear away what a killed run has left."""
        self.lock()
        self._clear()

    def _clear(self) -> None:
        try:
            if self.is_torn():
                os.replace(self._old, self._target)
            self._work.clear()
        except OSError as error:
            problem = f"cannot be written: {self._work.folder.name!r} beside it was left by a run"
            problem += f" that was stopped, and cannot be removed ({error.strerror})"
            raise OutputError(str(self._shown), problem, "remove that folder") from error
        self._is_swept = True

    def is_torn(self) -> bool:
        """Whether a kill between two renames has left the target without a name."""
        both = os.path.exists(self._old) and os.path.exists(self._new)
        return both and not os.path.exists(self._target)

    def commit(self) -> None:
        """Flush everything, and put what is new in the target's place."""
        self.flush()
        for folder in self._made:
            _sync(folder.parent)
        _sync(self._target.parent)  # it can be: afterwards there is no way back
        self._replacing.check(self._target, self._shown)  # again: much may have happened meanwhile
        self._is_swapping = True
        _swap(self._fresh, self._target)

    def flush(self) -> None:
        """All that is new is on the disk."""
        for path in self._new.iterdir():
            _sync(path)
        _sync(self._new)

    def is_committed(self) -> bool:
        """Whether what is new has left its place for the target's: as it is on the disk, because
        an interrupt may come at any moment."""
        return self._is_swapping and _identity(self._fresh) != self._born

    def finish(self, again: bool = False) -> None:
        """Flush the exchange, then remove the old output. There is no way back, so what fails is
        told as a warning. again: after Ctrl-C in it."""
        global last_written
        last_written = self._target
        old = None
        try:
            old = self._replaced()
            if not again or self._work.retake():
                self._clear_away()
        except OSError as error:
            what = "what was there before" if old else "a hidden folder"
            problem = f"was written, but {what} is left in {self._work.folder.name!r} beside it"
            problem += f", which cannot be removed ({error.strerror})"
            self._work.let_go()
            _warn(self._shown, problem, "remove that")

    def _replaced(self) -> Path | None:
        """The old output, once the new one has its name."""
        return next((path for path in (self._fresh, self._old) if path.exists()), None)

    def _clear_away(self) -> None:
        _sync(self._target.parent)
        _sync(self._work.folder)
        if old := self._replaced():
            self._check_old(old)
        self._work.clear()
        self._work.leave()

    def _check_old(self, old: Path) -> None:
        """What another program put there at the last moment is not removed with the old output."""
        try:
            self._replacing.check(old, self._shown)
        except OutputError as error:
            if isinstance(error.__cause__, OSError):  # it cannot be looked at
                raise error.__cause__ from error
            kept = self._target.parent / f"replaced-{uuid.uuid4().hex[:8]}"
            os.replace(old, kept)
            problem = f"was written, but what was there had changed: it is now {kept.name!r}"
            _warn(self._shown, problem, "look through it")

    def undo(self) -> str:
        """Remove all that was made. What could not be, in words."""
        try:
            if not self._work.is_held:
                self._work.forget()
            elif self._old.exists():  # the target could be neither replaced nor put back
                self._work.let_go()
                return f"what was there is in {self._work.folder.name!r} beside it"
            elif self._is_swept:
                self._work.clear()
            if self._work.is_held:
                self._work.leave()
        except (OSError, OutputError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._work.let_go()
            return f"a part is left in {self._work.folder.name!r} beside it ({reason})"
        for folder in self._made:
            with contextlib.suppress(OSError):  # another one may have put something there
                folder.rmdir()
        return ""


def _warn(target: Path, problem: str, remedy: str) -> None:
    warnings.warn(OutputWarning(str(target), problem, remedy), stacklevel=2)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems flush no folders on their own.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(file)


def _swap(fresh: Path, target: Path) -> None:
    """Put `fresh` in the target's place and the target, if there is one, in its: in one step where
    the system can exchange names. Where it cannot, a file takes another's place at once."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        os.replace(fresh, target)
        return
    if _exchange(fresh, target):
        return
    if fresh.is_file():
        os.replace(fresh, target)
        return
    aside = fresh.with_name(OLD)
    try:
        os.replace(target, aside)
        os.replace(fresh, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        raise
    os.replace(aside, fresh)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux); False where the system or file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
