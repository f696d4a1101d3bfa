"""What a file holds a recipe as: YAML, JSON, a model card, or the metadata of a merge."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..storage import json_file, yaml_file
from ..storage.gguf_file import GgufFile
from ..storage.input_file import InputFile, Refuse
from ..storage.marker import RECIPE
from ..storage.safetensors_file import SafetensorsFile

__all__ = ["CARD", "parse", "plain_of"]

CARD = "README.md"
MOST_BYTES = 1_000_000
"""Of a recipe, and of a card with one."""


def plain_of(path: str | os.PathLike[str]) -> Any:
    """What a file holds, a merge of one file among them, or the card in a folder. OptionError."""
    place, name = Path(path), os.fspath(path)
    place = place / CARD if place.is_dir() else place
    if place.suffix in (".safetensors", ".gguf"):
        return parse(_of_merge(place, name), name)
    return parse(InputFile(place, functools.partial(_refusal, name)).read(MOST_BYTES), name)


def _of_merge(path: Path, name: str) -> bytes:
    """The recipe in a merge that is one file."""
    recipe = _metadata(path, functools.partial(_refusal, name)).get(RECIPE)
    if not isinstance(recipe, str):
        raise _refusal(name, "has no recipe in its metadata", "give a merge of domerge_fast")
    return recipe.encode()


def _metadata(path: Path, refuse: Refuse) -> Mapping[str, object]:
    if path.suffix == ".gguf":
        gguf = GgufFile(path, refuse)
        gguf.read_header()
        return gguf.metadata
    file = SafetensorsFile(path, refuse)
    file.tensors()
    return file.metadata


def parse(data: bytes, name: str) -> Any:
    """What a text holds: JSON, YAML, or Markdown with a recipe in it. OptionError."""
    try:
        if found := re.search(rb"^## Recipe\n\n(```+)json\n(.*?)\n\1$", data, re.M | re.S):
            return json_file.parse(found[2])
        return json_file.parse(data) if data.lstrip()[:1] == b"{" else yaml_file.parse(data)
    except (json_file.BadJson, yaml_file.BadYaml) as error:
        raise _refusal(name, f"cannot be read ({error})", "correct it") from error


def _refusal(path: str, problem: str, remedy: str) -> OptionError:
    return OptionError("recipe", f"{path!r}: {problem}", remedy)
