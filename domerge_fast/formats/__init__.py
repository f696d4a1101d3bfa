"""How adapters and models are stored: a room a format, read and written."""

from __future__ import annotations

import os
from pathlib import Path

from ..adapters import Adapter
from ..errors import AdapterError, printable
from .peft.read import from_model, load_folder
from .tensors import from_tensors

__all__ = ["from_model", "from_tensors", "load"]


def load(source: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """The adapter in a PEFT folder: config and header are read and checked, factors stay on disk.

    ``name`` is what messages call it (the path as given if not stated, its bytes escaped where they
    are no UTF-8). Raises AdapterError, in one line, for whatever cannot be merged exactly.
    """
    name = name or printable(os.fspath(source))
    try:
        return load_folder(Path(source), name)
    except OSError as error:  # of the folder: its files say themselves what is wrong
        problem = f"cannot be read ({error.strerror})"
        raise AdapterError(name, None, problem, "check the folder") from error
