"""A whole model folder: the base model's, with ΔW added to the weights of the merged modules."""

from __future__ import annotations

import contextlib
import glob
import os
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.lazy import LazyTensor, pieces
from ..adapters.safetensors_file import SafetensorsFile
from ..errors import OutputError
from ..merged import Target
from ..report import Report
from . import marker, weights
from .card import CARD, Heading
from .checkpoint import open_checkpoint
from .fit import fit
from .folder import check_apart, check_path, is_same
from .merge_folder import MergeFolder
from .stream import copy_file, write, write_tensor

CHUNK_BYTES = 16 << 20
"""Of a weight in float32, added and rounded at once."""


class ModelFolder(MergeFolder):
    """Writes W0 + ΔW module by module into copies of the base's own files: same names, shards,
    order and dtypes; their headers get our mark. Sums are float32 and rounded once.

    Tensors that adapters save whole take the place of the base's. Other files of the folder's top
    level are copied, but for weights in other formats, adapters and the card. Raises OptionError
    for a base that does not fit, before anything is written; what fits where is in fit.py.
    """

    heading = Heading("Model with merged LoRA adapters", "transformers")

    def __init__(
        self, path: Path, target: Target, base: Path, overwrite: bool, force: bool = False
    ) -> None:
        check_path(path)
        _check_outside(path, base)
        check_apart(path, base, "the base model's folder")
        self._base = open_checkpoint(base)
        self._fit = fit(target, self._base)
        names = [*(file.path.name for file in self._base.inputs), CARD]
        super().__init__(path, target, overwrite, force, [glob.escape(name) for name in names])

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._files: dict[SafetensorsFile, FileIO] = {}
        self._starts: dict[SafetensorsFile, int] = {}
        for base in self._base.files:
            head = marker.marked(base.head())
            self._files[base] = files.enter_context(FileIO(folder / base.path.name, "w"))
            write(self._files[base], head)
            self._starts[base] = len(head)
        self._missing = {place.key for place in self._fit.places.values()}
        for key in self._base.tensors:
            if key not in self._missing:
                self._copy(key)
        for file in self._base.others:
            copy_file(file, folder / file.path.name)

    def add(self, name: str, delta: Tensor) -> None:
        """ΔW [m, n] of a module, in any order of modules."""
        place = self._fit.places[name]
        before, dtype = self._before(place.key)
        change = weights.stored(self._target.layouts[name], delta.detach().cpu(), place.turned)
        wide = torch.promote_types(dtype, torch.float32)
        rows = max(1, CHUNK_BYTES // (change[0].numel() * wide.itemsize))
        written = 0
        for start in range(0, len(change), rows):
            part = change[start : start + rows].to(wide)
            after = before.rows(start, start + len(part)).cpu().to(dtype).to(wide) + part
            rounded = weights.rounded(name, after, dtype)
            self._write(place.key, written, rounded)
            written += rounded.nbytes
        self._missing.discard(place.key)

    def finish(self, report: Report) -> None:
        """The card. AssertionError if a module was not added: its weights would be zeros."""
        if self._missing:
            raise AssertionError(f"{min(self._missing)} was never written")
        self._write_card(report)
        self._base.check()

    def _before(self, key: str) -> tuple[LazyTensor, torch.dtype]:
        """The weight that ΔW is added to, and the dtype that it has in the base."""
        own = self._base.tensors[key]
        return self._fit.replaced.get(key, own), own.dtype

    def _copy(self, key: str) -> None:
        before, dtype = self._before(key)
        written = 0
        for piece in pieces(before):
            kept = piece.cpu().to(dtype)
            self._write(key, written, kept)
            written += kept.nbytes

    def _write(self, key: str, skipped: int, tensor: Tensor) -> None:
        """Write a tensor, or its part after so many bytes."""
        place = self._base.tensors[key]
        file: FileIO = self._files[place.file]
        file.seek(self._starts[place.file] + place.begin + skipped)
        write_tensor(file, tensor)


def _check_outside(path: Path, base: Path) -> None:
    place, of_base = Path(os.path.realpath(path)), Path(os.path.realpath(base))
    for folder in (place, *place.parents):
        if folder == of_base or is_same(folder, of_base):
            raise OutputError(str(path), "is in the base model's folder", "give another folder")
