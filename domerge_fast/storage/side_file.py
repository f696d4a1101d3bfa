"""A file that a user asked for beside the output, such as figures or a recipe."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

__all__ = ["MARK", "check", "check_replaced", "replace", "told"]

MARK = b"domerge_fast"
"""What stands near the beginning of a file that may be replaced by another of its kind."""


def check(path: str) -> None:
    """Raise OutputError for a folder, or a file in one that is not there."""
    if Path(path).is_dir():
        raise OutputError(path, "is a folder", "give the name of a file")
    if not Path(path).absolute().parent.is_dir():
        raise OutputError(path, "its folder does not exist", "make it first")


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """Raise OutputError where the system cannot write the file."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise OutputError(path, problem, "free space, or give another file") from error


def check_replaced(path: str) -> None:
    """Raise OutputError where there is a file that we did not write."""
    if not os.path.lexists(path):
        return
    with told(path), open(path, "rb") as file:
        ours = MARK in file.read(512)
    if not ours:
        raise OutputError(path, "is there already, and not ours", "move it, or say another name")


def replace(path: str, content: bytes) -> None:
    """The file with this content, or as it was: OutputError where it cannot be written."""
    place = Path(path).absolute()
    with told(path):
        number, name = tempfile.mkstemp(prefix=".domerge-", dir=place.parent)
        try:
            with open(number, "wb") as file:
                file.write(content)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
