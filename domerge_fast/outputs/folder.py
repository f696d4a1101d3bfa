"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import OutputError


@contextlib.contextmanager
def whole_folder(target: Path, overwrite: bool, ours: Collection[str]) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends without an error.

    An existing target is replaced only with `overwrite`, and only if all names in it match one of
    the patterns `ours` (as of the shell). After an error or Ctrl-C the new folder is removed and
    the target is as it was; after a kill only the new folder, with a hidden name, is left over.
    Raises OutputError.
    """
    check_target(target, overwrite, ours)
    target = Path(os.path.realpath(target))  # a link stays, what it points to is replaced
    made = _make_parents(target)
    try:
        name = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(target, error) from error
    fresh = Path(name)
    try:
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        check_target(target, overwrite, ours)  # again: much may have happened meanwhile
        _swap(fresh, target)
    except OSError as error:
        _discard(fresh, made)
        raise cannot_write(target, error) from error
    except BaseException:
        _discard(fresh, made)
        raise


def check_target(target: Path, overwrite: bool, ours: Collection[str]) -> None:
    """Raise OutputError unless `target` may be written."""
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(str(target), "is a file", "give a folder that does not exist yet")
        inside = sorted(entry.name for entry in target.iterdir())
    except OSError as error:
        raise cannot_write(target, error) from error
    foreign = [n for n in inside if not any(fnmatchcase(n, pattern) for pattern in ours)]
    if foreign:
        problem = f"holds other files ({', '.join(foreign[:3])}{', …' if foreign[3:] else ''})"
        raise OutputError(str(target), problem, "give another folder, or move them away")
    if inside and not overwrite:
        remedy = "give another folder, or say overwrite (--overwrite)"
        raise OutputError(str(target), "exists already", remedy)


def cannot_write(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    remedy = "make room or choose another place" if error.errno == 28 else "choose another place"
    return OutputError(str(target), f"cannot be written ({reason}); nothing was kept", remedy)


def _make_parents(target: Path) -> list[Path]:
    """Create the target's missing parents; returns those made, innermost first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise cannot_write(target, error) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _discard(fresh: Path, made: list[Path]) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    _remove_empty(made)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(fresh: Path, target: Path) -> None:
    """Put `fresh` in the target's place, in one step where the system can exchange names."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(fresh, target)
        return
    if not _exchange(fresh, target):
        aside = fresh.with_suffix(".old")
        os.replace(target, aside)
        try:
            os.replace(fresh, target)
        except OSError:
            os.replace(aside, target)
            raise
        fresh = aside
    shutil.rmtree(fresh, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux); False where the system or file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
