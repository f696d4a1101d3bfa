"""A whole model folder: the base model's, with ΔW added to the weights of the merged modules."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OutputError
from ..merged import Target
from ..report import Report
from . import marker, weights
from .card import CARD, Heading, is_ours
from .checkpoint import CONFIG, open_checkpoint
from .fit import fit
from .folder import cannot_write
from .merge_folder import MergeFolder
from .stream import write, write_tensor

CHUNK_BYTES = 16 << 20
"""Of a weight in float32, added and rounded at once."""


class ModelFolder(MergeFolder):
    """Writes W0 + ΔW module by module into copies of the base's own files: same names, shards,
    order and dtypes; their headers get our mark. Sums are float32 and rounded once.

    base: a local folder with config.json and model.safetensors, or shards with their index.
    Tensors that adapters save whole take the place of the base's. Other files of the folder's top
    level are copied, but for weights in other formats, adapters and the card. Raises OptionError
    for a base that does not fit, before anything is written; what fits where is in fit.py.
    """

    heading = Heading("Model with merged LoRA adapters", "transformers")

    def __init__(self, path: Path, target: Target, base: Path, overwrite: bool) -> None:
        _check_apart(path, base)
        self._base = open_checkpoint(base)
        self._fit = fit(target, self._base)
        names = [*(file.name for file in self._base.starts), *self._base.others, CARD]
        super().__init__(path, target, overwrite, [glob.escape(name) for name in names])
        _check_written_by_us(path)

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._files = {
            path: files.enter_context(FileIO(folder / path.name, "w")) for path in self._base.starts
        }
        self._starts: dict[Path, int] = {}
        for path, start in self._base.starts.items():
            with path.open("rb") as original:
                head = marker.marked(original.read(start))
            write(self._files[path], head)
            self._starts[path] = len(head)
        self._missing = {place.key for place in self._fit.places.values()}
        for key in self._base.tensors:
            if key not in self._missing:
                self._write(key, 0, self._before(key))
                self._release(key)
        for name in self._base.others:
            shutil.copyfile(self._base.folder / name, folder / name)

    def add(self, name: str, delta: Tensor) -> None:
        """ΔW [m, n] of a module, in any order of modules."""
        place = self._fit.places[name]
        before = self._before(place.key)
        change = weights.stored(self._target.layouts[name], delta.detach().cpu(), place.turned)
        wide = torch.promote_types(before.dtype, torch.float32)
        rows = max(1, CHUNK_BYTES // (change[0].numel() * wide.itemsize))
        for start in range(0, len(change), rows):
            part = slice(start, start + rows)
            after = before[part].to(wide) + change[part].to(wide)
            skipped = before[:start].nbytes
            self._write(place.key, skipped, weights.rounded(name, after, before.dtype))
        self._release(place.key)
        self._missing.discard(place.key)

    def finish(self, report: Report) -> None:
        """The card. AssertionError if a module was not added: its weights would be zeros."""
        if self._missing:
            raise AssertionError(f"{min(self._missing)} was never written")
        self._write_card(report)

    def _before(self, key: str) -> Tensor:
        """The weight that ΔW is added to, in the base's dtype."""
        if key not in self._fit.replaced:
            return self._base.read(key)
        return self._fit.replaced[key].read().cpu().to(self._base.tensors[key].dtype)

    def _write(self, key: str, skipped: int, tensor: Tensor) -> None:
        """Write a tensor, or its part after so many bytes."""
        place = self._base.tensors[key]
        file: FileIO = self._files[place.file.path]
        file.seek(self._starts[place.file.path] + place.begin + skipped)
        write_tensor(file, tensor)

    def _release(self, key: str) -> None:
        """Unmap the base's file, once its tensors that are in use are gone."""
        self._base.tensors[key].file.release()


def _check_apart(path: Path, base: Path) -> None:
    place, of_base = Path(os.path.realpath(path)), Path(os.path.realpath(base))
    if of_base in (place, *place.parents):
        raise OutputError(str(path), "is in the base model's folder", "give another folder")


def _check_written_by_us(path: Path) -> None:
    """Models have all the same file names; only one that we wrote may be replaced."""
    try:
        if (path / CONFIG).exists() and not is_ours(path):
            problem = "holds a model that domerge_fast did not write"
            raise OutputError(str(path), problem, "give another folder, or remove it")
    except OSError as error:
        raise cannot_write(path, error) from error
