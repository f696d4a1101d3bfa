"""Writes a merge as one safetensors file, in the spelling of its inputs.

The scale of a merge is in the factors, and where there is an alpha it is the rank, as float32, so
that every reader scales by 1 whatever it does with it. What is converted keeps its alphas.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...algebra import powers
from ...results.card import CARD, Heading, recipe_text, short_names
from ...results.report import Report
from ...storage.marker import RECIPE
from ...storage.stream import SafetensorsWriter
from ..format import EACH, NONE, Format, Holds
from ..merge_folder import MergeFolder
from ..model import weights
from ..target import Target
from . import beside, metadata
from .grammar import BARE, COMFYUI, DIFF, DIFFUSERS, GRAMMARS, KOHYA, XLABS
from .read import OF_DIFFUSERS, find, load

__all__ = ["ROWS", "SingleFile"]

FILE = "lora.safetensors"
_SPARE = 1024
"""Bytes for what metadata says of ranks, before these are known."""


class _Kind(NamedTuple):
    """A row: its name, what it is, the spelling of keys unless the inputs have another, and its
    file's name in a folder."""

    name: str
    summary: str
    grammar: str
    file: str = FILE


_KINDS = (
    _Kind(KOHYA, "one file of kohya's kind: sd-scripts, musubi, LyCORIS, OneTrainer", "lora_down"),
    _Kind(DIFFUSERS, "one file, or a folder of it, as diffusers saves it", "lora_A", OF_DIFFUSERS),
    _Kind(COMFYUI, "one file with ComfyUI's names (diffusion_model.…)", "lora_A"),
    _Kind(BARE, "one file with the model's own names and nothing before them", "lora_A"),
    _Kind(XLABS, "one file of x-flux", "down"),
)


class SingleFile(MergeFolder):
    """Writes a merge module by module, with every module's own rank unless the target has one."""

    def __init__(
        self, kind: _Kind, path: Path, target: Target, overwrite: bool, force: bool = False
    ) -> None:
        super().__init__(path, target, overwrite, force, (kind.file, CARD), kind.file)
        self.heading = Heading("Merged LoRA", "diffusers" if kind.name == DIFFUSERS else None)
        self._file = kind.file
        style = target.styles[0] if target.styles else None
        self._grammar = GRAMMARS[style.grammar if style and style.grammar else kind.grammar]
        has_scales = bool(style and style.alphas) or any(x != 1 for x in target.scales.values())
        self._alphas = kind.name == KOHYA or (kind.name == COMFYUI and has_scales)
        self._modules: list[tuple[int, float]] = []

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        place = folder if self.is_file else folder / self._file
        largest: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layout in self._target.layouts.values():
            if layout.dense:
                shape = layout.m, *layout.inputs
                largest[f"{layout.name}.{DIFF}"] = self._target.dtype, shape
                continue
            rank = self._target.rank or layout.largest_rank
            a, b = layout.shapes(rank)
            largest |= {
                key: (self._target.dtype, shape)
                for key, shape in zip(self._keys(layout.name), (a, b))
            }
            if self._alphas:
                largest[f"{layout.name}.alpha"] = torch.float32, ()
        changes = dict(beside.written(self._target))
        largest |= {key: (x.dtype, x.shape) for key, x in changes.items()}
        texts = sum(len(json.dumps(dict(style.metadata))) for style in self._target.styles)
        recipe = self._target.recipe_bytes() if self._target.recipe_bytes else 0
        spare = texts + 2 * recipe + _SPARE  # names are in it twice
        self._writer = files.enter_context(SafetensorsWriter(place, largest, spare))

    def _keys(self, module: str) -> tuple[str, str]:
        return f"{module}{self._grammar.down}", f"{module}{self._grammar.up}"

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """A [k, n] and B [m, k] of a module, with ΔW = B A."""
        if self._target.layouts[name].dense:
            self._add_dense(name, a, b)
            return
        a, b = self._target.padded(a, b)
        stored = self._target.layouts[name].stored(a, b)
        for key, tensor in zip(self._keys(name), stored):
            self._writer.add(key, tensor.to(self._target.dtype))
        if self._alphas:
            alpha = self._target.scale(name) * len(a)
            self._writer.add(f"{name}.alpha", torch.tensor(alpha, dtype=torch.float32))
        self._modules.append((len(a), self._target.scale(name)))

    def _add_dense(self, name: str, a: Tensor, b: Tensor) -> None:
        """A module as its update, which has no scale beside it."""
        layout, dtype = self._target.layouts[name], self._target.dtype
        update = powers.product(name, a, b) * self._target.scale(name)
        found = weights.rounded(name, update, dtype)
        powers.check_rounding(name, update, found, dtype)
        self._writer.add(f"{name}.{DIFF}", found.reshape(layout.m, *layout.inputs))

    def finish(self, report: Report) -> None:
        """What changes beside factors, what the file says of itself, and the card."""
        inputs = [style.metadata for style in self._target.styles]
        changes = dict(beside.written(self._target))
        for key, tensor in changes.items():
            self._writer.add_pieces(key, tensor)
        others = bool(changes) or any(x.dense for x in self._target.layouts.values())
        if report.converted:
            texts = metadata.converted(inputs, self._modules, others)
        else:
            names = short_names(report.adapters)
            texts = metadata.merged(inputs, self._modules, names, others)
            texts |= {RECIPE: recipe_text(report.recipe)}
        self._writer.describe(texts)
        self._write_card(report)


def _row(kind: _Kind) -> Format:
    return Format(
        kind.name,
        kind.summary,
        lambda path: find(path) is not None,
        load,
        functools.partial(SingleFile, kind),
        holds=Holds(
            ranks=True,
            alphas=kind.name in (KOHYA, COMFYUI),
            convolutions=True,
            differences=kind.name in (KOHYA, COMFYUI, BARE),
            changes=kind.name in (KOHYA, COMFYUI, BARE),
            scales=EACH if kind.name in (KOHYA, COMFYUI) else NONE,
        ),
        names=kind.name,
        files=(kind.file,),
        last=True,
    )


ROWS = tuple(map(_row, _KINDS))
