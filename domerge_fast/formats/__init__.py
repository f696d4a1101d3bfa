"""How adapters and merges are stored: a room a format, read and written."""

from __future__ import annotations

import os
from pathlib import Path

from ..adapters import Adapter
from ..errors import AdapterError, printable
from ..registry import Registry
from .deltas import DELTAS
from .format import Format, Read
from .model.write import MODEL
from .peft.read import from_model, load_folder
from .peft.write import ADAPTER
from .tensors import from_tensors

__all__ = ["FORMATS", "from_model", "from_tensors", "load"]

FORMATS = Registry("format", Format, (ADAPTER, DELTAS, MODEL))


def load(source: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """The adapter in a PEFT folder, or in another format that `list_formats` has: config and header
    are read and checked, factors stay on disk.

    ``name`` is what messages call it (the path as given if not stated, its bytes escaped where they
    are no UTF-8). Raises AdapterError, in one line, for whatever cannot be merged exactly.
    """
    name = name or printable(os.fspath(source))
    path = Path(source)
    try:
        return _reader(path, name)(path, name)
    except OSError as error:  # of the folder: its files say themselves what is wrong
        problem = f"cannot be read ({error.strerror})"
        raise AdapterError(name, None, problem, "check the folder") from error


def _reader(path: Path, name: str) -> Read:
    """What reads an adapter there: PEFT's reader, which says what is wrong, where nothing does."""
    for row in FORMATS.values():
        if row.read and row.recognises(path):
            if reason := row.why_not():
                raise AdapterError(name, None, f"has the format {row.name!r}", reason)
            return row.read
    return load_folder
