"""The models that there are tables of, and what files of each style call their modules.

One spelling stands for all: that of diffusers, its part of the pipeline first
(`transformer.transformer_blocks.0.attn.to_q`), which cuts finest. Sizes are those of the tensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.style import MODEL
from .tables import Found, table

__all__ = ["MODELS", "STYLES", "Model", "Piece", "Size"]

STYLES = ("diffusers", "kohya", "comfyui", "bare", MODEL)
"""Whose names (`Style.names`) a merge can be written with. bare, and MODEL: those of the first code
and of diffusers' class without a part of the pipeline before them."""

_MAIN = ("transformer", "unet")
_FLAT = ("lora_transformer_", "lora_unet__", "lycoris_")
"""Prefixes of a main model's flattened names besides kohya's: OneTrainer, Wan Fun, LyCORIS."""
_DOTTED = ("model.diffusion_model.", "")
"""The same of dotted ones, besides ComfyUI's and diffusers'."""

Size = tuple[int, int]
"""Outputs and inputs of a module."""


@dataclass(frozen=True)
class Piece:
    """A module in the one spelling, as a part of a module that a file has: rows start to stop of
    its B; swapped: whether the halves of these change places."""

    name: str
    start: int
    stop: int
    swapped: bool = False


@dataclass(frozen=True)
class Model:
    """tables: of each part of the pipeline, its own first. prefixes: by style and part. original:
    whether kohya's names are those of the first code. also: other prefixes of
    flattened names that a part may have. bases: what names of base models have in them. layers: how
    many each list in the main part has in the published ones: where names and sizes do not, that
    tells models apart."""

    name: str
    title: str
    tables: Mapping[str, Sequence[str]]
    prefixes: Mapping[str, Mapping[str, str]]
    original: bool
    also: Mapping[str, Sequence[str]]
    bases: Sequence[str]
    layers: Mapping[str, Sequence[int]]

    @functools.cached_property
    def pieces(self) -> Callable[[str, Size], tuple[Piece, ...]]:
        """(name, size) -> what a module of a file is in the one spelling; () if the tables do not
        have it."""
        return functools.lru_cache(1 << 14)(self._pieces)

    def _pieces(self, name: str, size: Size) -> tuple[Piece, ...]:
        found = {_cut(part, hit, size) for part, hit in self._hits(name) if hit.fits(*size)}
        return found.pop() if len(found) == 1 else ()

    def is_base(self, text: str) -> bool:
        """Whether the name of a base model is of this one."""
        plain = text.lower().replace("_", "-")
        return any(base in plain for base in self.bases)

    def has_layers_of(self, pieces: Iterable[str]) -> bool:
        """Whether the last layers of pieces, in all lists, are those of a published model."""
        last: dict[str, int] = {}
        for piece in pieces:
            part, name, number, *_ = (*piece.split("."), "", "")
            if part in _MAIN and number.isdigit():
                last[name] = max(last.get(name, 0), int(number))
        return bool(last) and all(k + 1 in self.layers.get(x, ()) for x, k in last.items())

    def _hits(self, name: str) -> Iterator[tuple[str, Found]]:
        for part, prefix, joint in self._prefixes:
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                for k, chosen in enumerate(map(table, self.tables[part])):
                    yield from ((part, hit) for hit in chosen.of_original(rest, joint))
                    if k == 0:
                        yield from ((part, hit) for hit in chosen.of_part(rest, joint))

    @functools.cached_property
    def _prefixes(self) -> list[tuple[str, str, str]]:
        """Part, prefix and joint of all names that a file may have."""
        found = []
        for part in self.tables:
            is_main = part in _MAIN
            flat = [self.prefixes["kohya"][part], *self.also.get(part, ()), *(_FLAT * is_main)]
            dotted = [self.prefixes[style][part] for style in ("diffusers", "comfyui")]
            found += [(part, prefix, "_") for prefix in flat]
            found += [(part, prefix, ".") for prefix in (*dotted, *(_DOTTED * is_main))]
        return found

    def spelled(self, piece: str, size: Size, style: str) -> tuple[str, int]:
        """What a style calls the module that has a piece (named in the one spelling, of this size),
        and how many outputs that has. KeyError where it has no names for such a part."""
        part, _, rest = piece.partition(".")
        prefix, joint = self.prefixes[style][part], "_" if style == "kohya" else "."
        hits = (hit for hit in table(self.tables[part][0]).of_part(rest, ".") if hit.fits(*size))
        hit = next(hits)
        if part not in _MAIN or not self._takes_original(style):
            return prefix + rest.replace(".", joint), size[0]
        whole = hit.row.ratio if len(hit.parts) > 1 else None
        m = int(whole * size[1]) if whole else size[0]
        return prefix + hit.original.replace(".", joint), m

    def _takes_original(self, style: str) -> bool:
        """Whether its names are those of the first code."""
        return self.original if style == "kohya" else style in ("comfyui", "bare")


def _cut(part: str, hit: Found, size: Size) -> tuple[Piece, ...]:
    if hit.part is not None:
        return (Piece(f"{part}.{hit.parts[hit.part]}", 0, size[0]),)
    pieces, start = [], 0
    for x, name in zip(hit.row.parts, hit.parts):
        stop = start + int(x.ratio * size[1]) if len(hit.parts) > 1 and x.ratio else size[0]
        pieces.append(Piece(f"{part}.{name}", start, stop, x.swapped))
        start = stop
    return tuple(pieces)


def _model(name: str, row: Mapping[str, Any]) -> Model:
    prefixes = {style: row[style] for style in ("kohya", "comfyui")}
    prefixes["diffusers"] = {part: f"{part}." for part in row["tables"]}
    prefixes["bare"] = prefixes[MODEL] = {part: "" for part in row["tables"] if part in _MAIN}
    original = row["kohya_names"] == "original"
    rest = row.get("also", {}), row["bases"], row.get("layers", {})
    return Model(name, row["title"], row["tables"], prefixes, original, *rest)


def _models() -> dict[str, Model]:
    rows = json.loads((Path(__file__).parent / "models.json").read_text("utf-8"))
    return {name: _model(name, row) for name, row in rows.items()}


MODELS = _models()
