"""How adapters and merges are stored: a room a format, read and written."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..adapters import Adapter
from ..adapters.style import Style
from ..errors import AdapterError, printable
from ..registry import Registry
from ..storage import hub
from ..storage.input_file import InputFile
from . import tokenizer
from .deltas import DELTAS
from .format import Format
from .gguf.write import GGUF
from .mlx.write import MLX
from .model.write import MODEL
from .peft.read import PICKLE, from_model
from .peft.write import PEFT
from .single_file.write import ROWS
from .tensors import from_tensors

__all__ = ["FORMATS", "from_model", "from_tensors", "load"]

LOG = logging.getLogger(__name__)

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
        return _complete(_row(path, name), path, name)
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
    if not any(_recognises(row, path) for row in FORMATS.values()):
        path = hub.local(source, [*files, PICKLE], refuse)
    if not path.exists():
        raise refuse("has no files of an adapter on the Hub", "name the folder: owner/name/folder")
    return path


def _row(path: Path, name: str) -> Format:
    """What reads an adapter there: PEFT's reader, which says what is wrong, where nothing does."""
    for row in _asked():
        if row.read and _recognises(row, path):
            if reason := row.why_not():
                raise AdapterError(name, None, f"has the format {row.name!r}", reason)
            return row
    return PEFT


def _asked() -> Iterator[Format]:
    """The rows in the order in which they are asked what they recognise."""
    for last in (False, True):
        yield from (row for row in FORMATS.values() if row.last == last)


def _recognises(row: Format, path: Path) -> bool:
    """What a row says of it; one of another package that fails at that stands in no one's way, as
    the log says."""
    try:
        return row.recognises(path)
    except Exception as error:  # whatever another package's function raises
        if row.name in FORMATS.own:
            raise
        LOG.info("format %s is passed over: %s: %s", row.name, type(error).__name__, error)
        return False


def _complete(row: Format, path: Path, name: str) -> Adapter:
    """The adapter there, with what a reader may leave out: its files, over which no merge is
    written, and its format, in which one is."""
    assert row.read
    adapter = row.read(path, name)
    if not adapter.inputs:
        found = sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
        refuse = functools.partial(AdapterError, name, None)
        adapter = replace(adapter, inputs=tuple(InputFile(file, refuse) for file in found))
    return adapter if adapter.style else replace(adapter, style=Style(row.name))
