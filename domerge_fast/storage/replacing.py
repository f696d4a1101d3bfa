"""What an output may take the place of: what its path may be, and what may be there already."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .. import options
from ..errors import OutputError

__all__ = ["Replacing", "cannot_write", "check_apart", "check_path", "is_same"]


@dataclass(frozen=True)
class Replacing:
    """What may be replaced: with `overwrite`, a folder that is ours; with `force`, any that holds
    nothing but regular files whose names match `names`, patterns as of the shell. file: the output
    is one file, not a folder; `force` replaces any regular one."""

    overwrite: bool
    force: bool
    names: Collection[str]
    is_ours: Callable[[Path], bool]
    file: bool = False

    def __post_init__(self) -> None:
        options.check("overwrite", self.overwrite, bool)
        options.check("force", self.force, bool)

    def check(self, place: Path, shown: Path) -> None:
        """OutputError, about the path `shown`, unless `place` is absent, empty or such a one."""
        kind = "file" if self.file else "folder"
        try:
            if not os.path.lexists(place):
                return
            self._check_kind(place.stat().st_mode, shown)
            inside = [] if self.file else sorted(os.scandir(place), key=lambda entry: entry.name)
            foreign = [entry.name for entry in inside if not self._replaces(entry)]
            ours = self.force or (self.overwrite and not foreign and self.is_ours(place))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not place.exists():
                return  # a link to what does not exist yet
            raise cannot_write(shown, error) from error
        if foreign:
            problem = f"holds other files ({', '.join(foreign[:3])}{', …' if foreign[3:] else ''})"
            raise OutputError(str(shown), problem, "give another folder, or move them away")
        something = self.file or bool(inside)
        if something and not (self.overwrite or self.force):
            remedy = f"give another {kind}, or say overwrite (--overwrite)"
            raise OutputError(str(shown), "exists already", remedy)
        if something and not ours:
            problem = "is a file" if self.file else "holds files"
            remedy = f"give another {kind}, or say force (--force)"
            raise OutputError(str(shown), f"{problem} that domerge_fast did not write", remedy)

    def _check_kind(self, mode: int, shown: Path) -> None:
        if self.file and not stat.S_ISREG(mode):
            raise OutputError(str(shown), "is no regular file", "give another name")
        if not self.file and not stat.S_ISDIR(mode):
            raise OutputError(str(shown), "is a file", "give a folder that does not exist yet")

    def _replaces(self, entry: os.DirEntry[str]) -> bool:
        named = any(fnmatchcase(entry.name, pattern) for pattern in self.names)
        return named and entry.is_file(follow_symlinks=False)


def check_path(target: Path) -> None:
    """OutputError for what no file system can name."""
    try:
        named = b"\0" not in os.fsencode(target)
    except UnicodeEncodeError:
        named = False
    if not named:
        problem = "is no path (it holds characters that no name can have)"
        raise OutputError(str(target), problem, "give another")


def check_apart(target: Path, folder: Path, what: str) -> None:
    """OutputError if the target is a folder that is read, whatever it is called there, or holds it
    or one of its files."""
    place, source = Path(os.path.realpath(target)), Path(os.path.realpath(folder))
    try:
        inside = os.listdir(place) if os.path.isdir(place) else []
    except OSError as error:
        raise cannot_write(target, error) from error
    if place == source or is_same(place, source):
        raise OutputError(str(target), f"is {what}", "give another folder")
    if place in source.parents or any(is_same(place / name, source / name) for name in inside):
        raise OutputError(str(target), f"holds {what}, or a file of it", "give another folder")


def is_same(one: Path, other: Path) -> bool:
    """Whether both exist and are one file or folder: by another name, a link, or mounted twice."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def cannot_write(target: Path, error: OSError, left: str = "") -> OutputError:
    reason = error.strerror or str(error)
    remedy = "choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room or choose another place"
    kept = left or "nothing was kept"
    return OutputError(str(target), f"cannot be written ({reason}); {kept}", remedy)
