"""The mark in a file's metadata (safetensors, GGUF) by which we know again what we wrote.

Whoever changes the file with another program writes it without the mark, and so takes it over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import DomergeError
from . import json_file
from .gguf_file import GgufFile
from .safetensors_file import METADATA

__all__ = ["MARK", "RECIPE", "all_marked", "is_marked", "marked"]

MARK = {"domerge_fast": __version__}

_GGUF = ".gguf"

RECIPE = "domerge_fast_recipe"
"""Under this a merge that is one file has its recipe, as JSON."""


def marked(head: bytes) -> bytes:
    """What stands before the data of a safetensors file (length and header, which are valid), with
    our mark beside the metadata there is; the data begins at a multiple of 8 bytes.

    Metadata without a format is worse than none: transformers refuses it.
    """
    header = json.loads(head[8:])
    metadata = {"format": "pt"} | (header.pop(METADATA, None) or {}) | MARK
    text = json.dumps({METADATA: metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def all_marked(folder: Path) -> bool:
    """Whether there are safetensors or GGUF files in a folder, and all of them are marked.
    OSError."""
    paths = [*folder.glob("*.safetensors"), *folder.glob(f"*{_GGUF}")]
    return bool(paths) and all(map(is_marked, paths))


def is_marked(path: Path) -> bool:
    """False also for a damaged file. OSError if it cannot be read."""
    metadata = _of_gguf(path) if path.suffix == _GGUF else _header(path).get(METADATA)
    return isinstance(metadata, Mapping) and MARK.keys() <= metadata.keys()


def _of_gguf(path: Path) -> Mapping[str, object]:
    file = GgufFile(path, lambda problem, remedy: DomergeError(problem))
    try:
        file.read_header()
    except DomergeError:
        return {}
    return file.metadata


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= json_file.INDEX_BYTES else b""
    try:
        header = json_file.parse(text)
    except json_file.BadJson:
        return {}
    return header if isinstance(header, dict) else {}
