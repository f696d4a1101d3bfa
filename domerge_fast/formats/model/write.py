"""A whole model folder: the base model's, with ΔW added to the weights of the merged modules."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ...errors import DomergeError, OutputError
from ...results.card import CARD, Heading
from ...results.report import Report
from ...storage import json_file, marker
from ...storage.folder import check_apart, check_path, is_same
from ...storage.input_file import InputFile
from ...storage.lazy import LazyTensor, dtype_name, pieces
from ...storage.safetensors_file import SafetensorsFile
from ...storage.stream import copy_file, write, write_tensor
from .. import tokenizer
from ..format import Format
from ..merge_folder import MergeFolder
from ..target import Target
from . import weights
from .checkpoint import CONFIG, INDEX
from .fit import fit

__all__ = ["MODEL"]

CHUNK_BYTES = 16 << 20
"""Of a weight in float32, added and rounded at once."""

SAMPLED = 16
"""Of so many rows, one is looked at for what rounding leaves of ΔW."""

LEAST_KEPT = 0.01
"""An update of which rounding leaves a smaller share is refused."""


class ModelFolder(MergeFolder):
    """Writes W0 + ΔW module by module into copies of the base's own files: same names, shards,
    order and dtypes; their headers get our mark. Sums are float32 and rounded once; where that
    leaves next to nothing of a module's ΔW, DomergeError (see weights.Realised).

    Tensors that adapters save whole take the place of the base's. Other files of the folder's top
    level are copied, but for weights in other formats, adapters and the card. The target has the
    base. Raises OptionError for one that does not fit, before anything is written; what fits where
    is in fit.py.
    """

    heading = Heading("Model with merged LoRA adapters", "transformers")

    def __init__(self, path: Path, target: Target, overwrite: bool, force: bool = False) -> None:
        assert target.base
        base = target.base
        check_path(path)
        _check_outside(path, base.folder)
        check_apart(path, base.folder, "the base model's folder")
        self._base = base
        self._fit = fit(target, self._base)
        self._realised: dict[str, weights.Realised] = {}
        self._notes = self._fit.vocabulary.notes
        if self._fit.vocabulary.rows and not target.copied:
            self._notes += ("the tokenizer is the base's: the adapters have none for new tokens",)
        names = [*(file.path.name for file in self._base.inputs), CARD, *tokenizer.FILES]
        super().__init__(path, target, overwrite, force, [glob.escape(name) for name in names])

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._places: dict[str, tuple[FileIO, int]] = {}
        for base in self._base.files:
            head, begins = self._head(base)
            file = files.enter_context(FileIO(folder / base.path.name, "w"))
            write(file, head)
            self._places |= {key: (file, len(head) + begin) for key, begin in begins.items()}
        self._missing = {place.key for place in self._fit.places.values()}
        for key in self._places:
            if key not in self._missing:
                self._copy(key)
        self._copy_others(folder)

    def _head(self, base: SafetensorsFile) -> tuple[bytes, dict[str, int]]:
        """What stands before the data of a file, and where each tensor begins after it: as in the
        base, unless a weight has another shape or is new, which is stored beside another."""
        own = {key: tensor for key, tensor in self._base.tensors.items() if tensor.file is base}
        beside = self._fit.vocabulary.beside
        new = {key: own[stored] for key, stored in beside.items() if stored in own}
        shapes = {key: self._before(key)[0].shape for key in {**own, **new}}
        if not new and all(shapes[key] == tensor.shape for key, tensor in own.items()):
            return marker.marked(base.head()), {key: x.begin for key, x in own.items()}
        header = json_file.parse(base.head()[8:])
        begins, end = {}, 0
        for key, tensor in sorted({**own, **new}.items(), key=lambda item: item[1].begin):
            begins[key] = end
            end += math.prod(shapes[key]) * tensor.dtype.itemsize
            entry = {"shape": list(shapes[key]), "data_offsets": [begins[key], end]}
            header[key] = header[beside.get(key, key)] | entry
        return marker.marked(bytes(8) + json.dumps(header).encode()), begins

    def _copy_others(self, folder: Path) -> None:
        """The other files; config and index as the weights are now, and the tokenizer that fits."""
        vocabulary = self._fit.vocabulary
        copied = self._target.copied if vocabulary.rows else ()
        for file in self._base.others:
            name = file.path.name
            if name == CONFIG and vocabulary.config is not None:
                self._write_json(name, vocabulary.config)
            elif name == INDEX and vocabulary.config is not None:
                self._write_json(name, self._index(file))
            elif not (copied and name in tokenizer.FILES):
                copy_file(file, folder / name)
        for file in copied:
            copy_file(file, folder / file.path.name)

    def _index(self, file: InputFile) -> Mapping[str, object]:
        index = json_file.read_object(file, json_file.INDEX_BYTES)
        where = {key: Path(os.fsdecode(file.name)).name for key, (file, _) in self._places.items()}
        sizes = (
            math.prod(self._before(key)[0].shape) * self._before(key)[1].itemsize for key in where
        )
        metadata = index.get("metadata")
        total = {"total_size": sum(sizes)}
        metadata = (metadata if isinstance(metadata, dict) else {}) | total
        return index | {"metadata": metadata, "weight_map": dict(sorted(where.items()))}

    def add(self, name: str, delta: Tensor) -> None:
        """ΔW [m, n] of a module, in any order of modules."""
        key = self._fit.places[name].key
        sample = weights.Realised()
        written = 0
        for sums in self._sums(name, delta):
            self._write(key, written, sums[2])
            written += sums[2].nbytes
            sample.add(*(x[::SAMPLED] for x in sums))
        if sample.share < LEAST_KEPT:
            self._check_kept(name, delta)
        self._realised[name] = sample
        self._missing.discard(key)

    def _sums(self, name: str, delta: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """W0, ΔW and their rounded sum, some rows of the weight at a time."""
        place = self._fit.places[name]
        before, dtype = self._before(place.key)
        change = weights.stored(self._target.layouts[name], delta.detach().cpu(), place.turned)
        wide = torch.promote_types(dtype, torch.float32)
        rows = max(1, CHUNK_BYTES // (change[0].numel() * wide.itemsize))
        for start in range(0, len(change), rows):
            part = change[start : start + rows].to(wide)
            old = before.rows(start, start + len(part)).cpu().to(dtype).to(wide)
            yield old, part, weights.rounded(name, old + part, dtype)

    def _check_kept(self, name: str, delta: Tensor) -> None:
        """DomergeError where next to nothing of ΔW is left: the sample may have missed it."""
        whole = weights.Realised()
        for sums in self._sums(name, delta):
            whole.add(*sums)
        if whole.share < LEAST_KEPT:
            dtype = dtype_name(sums[2].dtype)
            problem = f"module {name!r}: the update is lost in the rounding of the base's {dtype}"
            remedy = "write an adapter, use a larger scale, or give the base in float32"
            raise DomergeError(f"{problem} ({100 * whole.share:.2g} % is left); {remedy}")

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of the vocabulary; and what rounding left of the update, where it is not nearly all."""
        wanted = sum(x.wanted for x in self._realised.values())
        kept = sum(x.kept for x in self._realised.values())
        if not wanted or kept > 0.99 * wanted:
            return self._notes
        note = f"rounding to the base's dtype keeps {100 * kept / wanted:.0f} % of the update"
        return (*self._notes, note)

    def finish(self, report: Report) -> None:
        """The card. AssertionError if a module was not added: its weights would be zeros."""
        if self._missing:
            raise AssertionError(f"{min(self._missing)} was never written")
        self._write_card(report)
        self._base.check()

    def _before(self, key: str) -> tuple[LazyTensor, torch.dtype]:
        """The weight that ΔW is added to, and the dtype that it has in the base."""
        own = self._base.tensors[self._fit.vocabulary.beside.get(key, key)]
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
        file, begin = self._places[key]
        file.seek(begin + skipped)
        write_tensor(file, tensor)


def _check_outside(path: Path, base: Path) -> None:
    place, of_base = Path(os.path.realpath(path)), Path(os.path.realpath(base))
    for folder in (place, *place.parents):
        if folder == of_base or is_same(folder, of_base):
            raise OutputError(str(path), "is in the base model's folder", "give another folder")


MODEL = Format(
    "model",
    "the base model's folder with ΔW added to its weights",
    write=ModelFolder,
    dense=True,
    needs_base=True,
)
