"""PEFT folders of adapters that were made, not merged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.peft.read import CONFIG, WEIGHTS
from ..formats.peft.write import WHERE, exactly, keys, rank_fields
from ..formats.target import Layout
from ..results.card import CARD
from ..storage.folder import whole_output
from ..storage.lazy import LazyTensor
from ..storage.marker import all_marked
from ..storage.replacing import Replacing
from ..storage.stream import SafetensorsWriter

__all__ = ["Factors", "write", "written"]

Factors = dict[str, tuple[Tensor, Tensor]]
"""A [r, n] and B [m, r] by module."""

SAID = "domerge_fast_osrm"
"""Under this the file has what it was made of, as JSON."""


@contextlib.contextmanager
def written(path: Path, overwrite: bool, force: bool) -> Iterator[Path]:
    """A folder that takes the path's place, whole or not at all, when the block ends. OutputError
    as for a merge."""
    names = (CONFIG, WEIGHTS, CARD)
    with whole_output(path, Replacing(overwrite, force, names, all_marked)) as folder:
        yield folder


def write(
    folder: Path,
    layouts: Mapping[str, Layout],
    factors: Factors,
    scales: Mapping[str, float],
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    carried: Mapping[str, LazyTensor] | None = None,
) -> None:
    """Config and weights. scales: alpha / r by module. config: fields besides what is adapted, and
    with which ranks. said: what it was made of. carried: tensors saved whole, by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        layout = layouts[name]
        tensors |= zip(keys(layout), layout.stored(a, b))
    carried = carried or {}
    sizes = {key: (x.dtype, tuple(x.shape)) for key, x in tensors.items()}
    sizes |= {key: (x.dtype, tuple(x.shape)) for key, x in carried.items()}
    text = json.dumps(said, ensure_ascii=False)
    with SafetensorsWriter(folder / WEIGHTS, sizes, len(json.dumps(text)) + 64) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        for key, lazy in carried.items():
            writer.add_pieces(key, lazy)
        writer.describe({SAID: text})
    fields = {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        **config,
        **dict.fromkeys(WHERE),
        "target_modules": exactly([*factors]),
        **rank_fields({name: len(a) for name, (a, _) in factors.items()}, scales),
    }
    text = json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
