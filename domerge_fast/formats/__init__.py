"""How adapters and merges are stored: a room a format, read and written."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from ..adapters import Adapter
from ..errors import AdapterError, printable
from ..registry import Registry
from ..storage import hub
from . import tokenizer
from .deltas import DELTAS
from .format import Format, Read
from .gguf.write import GGUF
from .mlx.write import MLX
from .model.write import MODEL
from .peft.read import PICKLE, from_model, load_folder
from .peft.write import PEFT
from .single_file.write import ROWS
from .tensors import from_tensors

__all__ = ["FORMATS", "from_model", "from_tensors", "load"]

FORMATS = Registry("format", Format, (PEFT, MLX, *ROWS, GGUF, DELTAS, MODEL))


def load(source: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """The adapter in a PEFT folder, or in another format that `list_formats` has: config and header
    are read and checked, factors stay on disk. An id on the Hugging Face Hub (`owner/name`, also
    with `/folder` and `@revision`) that is no path here is fetched into its cache (hub.py).

    ``name`` is what messages call it (the path as given if not stated, its bytes escaped where they
    are no UTF-8). Raises AdapterError, in one line, for whatever cannot be merged exactly.
    """
    name = name or printable(os.fspath(source))
    path = _fetched(os.fspath(source), name)
    try:
        return _reader(path, name)(path, name)
    except OSError as error:  # of the folder: its files say themselves what is wrong
        problem = f"cannot be read ({error.strerror})"
        raise AdapterError(name, None, problem, "check the folder") from error


def _fetched(source: str, name: str) -> Path:
    """Where it is on this machine; of what is on the Hub a pickle only where nothing else is."""
    if not hub.is_id(source):
        return Path(source)
    refuse = functools.partial(AdapterError, name, None)
    files = [*tokenizer.FILES, *(file for row in FORMATS.values() for file in row.files)]
    path = hub.local(source, files, refuse)
    if not any(row.recognises(path) for row in FORMATS.values()):
        path = hub.local(source, [*files, PICKLE], refuse)
    if not path.exists():
        raise refuse("has no files of an adapter on the Hub", "name the folder: owner/name/folder")
    return path


def _reader(path: Path, name: str) -> Read:
    """What reads an adapter there: PEFT's reader, which says what is wrong, where nothing does."""
    for row in FORMATS.values():
        if row.read and row.recognises(path):
            if reason := row.why_not():
                raise AdapterError(name, None, f"has the format {row.name!r}", reason)
            return row.read
    return load_folder
