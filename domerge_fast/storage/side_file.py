"""A file that a user asked for beside the output, such as figures or a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

__all__ = ["check", "told"]


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
