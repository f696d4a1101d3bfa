"""The mark in a safetensors file's metadata by which we know again what we wrote.

Whoever changes the file with another program writes it without the mark, and so takes it over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._version import __version__
from . import json_file
from .safetensors_file import METADATA

__all__ = ["MARK", "all_marked", "marked"]

MARK = {"domerge_fast": __version__}


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
    """Whether there are safetensors files in a folder, and all of them are marked. OSError."""
    paths = list(folder.glob("*.safetensors"))
    return bool(paths) and all(map(is_marked, paths))


def is_marked(path: Path) -> bool:
    """False also for a damaged file. OSError if it cannot be read."""
    metadata = _header(path).get(METADATA)
    return isinstance(metadata, dict) and MARK.keys() <= metadata.keys()


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= json_file.INDEX_BYTES else b""
    try:
        header = json_file.parse(text)
    except json_file.BadJson:
        return {}
    return header if isinstance(header, dict) else {}
