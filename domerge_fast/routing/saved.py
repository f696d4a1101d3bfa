"""A router's folder: centres.safetensors, and router.json with everything else."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..errors import OptionError, is_text
from ..storage import json_file
from ..storage.folder import recover, whole_output
from ..storage.input_file import InputFile
from ..storage.marker import all_marked
from ..storage.replacing import Replacing
from ..storage.safetensors_file import SafetensorsFile
from ..storage.stream import SafetensorsWriter

__all__ = ["read", "write"]

CENTRES, ROUTER = "centres.safetensors", "router.json"
KEY = "centres"
FORMAT = 1


def write(
    folder: Path, centres: Tensor, plain: Mapping[str, Any], overwrite: bool, force: bool
) -> None:
    """The folder, whole or not at all. centres: [K, d] in float32. OutputError."""
    replacing = Replacing(overwrite, force, (CENTRES, ROUTER), all_marked)
    with whole_output(folder, replacing) as fresh:
        sizes = {KEY: (centres.dtype, tuple(centres.shape))}
        with SafetensorsWriter(fresh / CENTRES, sizes) as writer:
            writer.add(KEY, centres)
        text = json.dumps(_jsonable({"format": FORMAT, **plain}), indent=1, ensure_ascii=False)
        (fresh / ROUTER).write_text(text + "\n", encoding="utf-8")


def _jsonable(value: Any) -> Any:
    """NaN is null: JSON has no such number."""
    if isinstance(value, Mapping):
        return {key: _jsonable(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read(folder: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
    """Centres and the rest, whose shapes fit each other; OptionError for any other folder."""
    path = options.folder("folder", folder)
    if not os.path.exists(path):
        recover(path)
    refuse = functools.partial(OptionError, "folder")
    plain = json_file.read_object(InputFile(path / ROUTER, refuse), json_file.INDEX_BYTES)
    file = SafetensorsFile(path / CENTRES, refuse)
    tensors = file.tensors()
    if tensors.keys() != {KEY} or tensors[KEY].dtype != torch.float32:
        raise refuse(f"{CENTRES} does not hold float32 centres", "fit and save the router again")
    centres = tensors[KEY].read()
    if wrong := _wrong(plain, centres):
        raise refuse(f"{ROUTER} {wrong}", "fit and save the router again")
    for key in ("scores", "overall"):
        plain[key] = _numbers(plain[key])
    return centres, plain


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(x) for x in value]
    return math.nan if value is None else float(value)


def _wrong(plain: Mapping[str, Any], centres: Tensor) -> str | None:
    if plain.get("format") != FORMAT:
        return f"has the format {str(plain.get('format'))[:20]!r}, and {FORMAT} is known"
    if centres.ndim != 2 or not centres.isfinite().all():
        return "stands beside centres that are no matrix of numbers"
    names, adapters = plain.get("names"), plain.get("adapters")
    for key, value, size in (("names", names, len(centres)), ("adapters", adapters, None)):
        if not isinstance(value, list) or not all(map(is_text, value)) or not value:
            return f"has no {key}"
        if size is not None and len(value) != size:
            return f"has {len(value)} {key}, and there are {size} centres"
    assert isinstance(adapters, list)
    count = len(adapters)
    shapes = {"scores": (len(centres), count), "run": (len(centres), count)}
    for key, (rows, columns) in shapes.items():
        table = plain.get(key)
        if not isinstance(table, list) or len(table) != rows:
            return f"has no {key} of {rows} clusters"
        if not all(_row(row, columns, key == "scores") for row in table):
            return f"has no {key} of {columns} adapters"
    if not _row(plain.get("overall"), count, False):
        return "has no overall scores"
    if not _row(plain.get("queries"), len(centres), False):
        return "has no numbers of queries"
    beta = plain.get("beta")
    return None if _number(beta) and beta else "has no beta"


def _row(value: Any, size: int, gaps: bool) -> bool:
    if not isinstance(value, list) or len(value) != size:
        return False
    return all(_number(x) or (gaps and x is None) for x in value)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x >= 0
