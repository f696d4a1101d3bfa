"""A whole model folder: the base model's, with ΔW added to the weights of the merged modules."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ...errors import DomergeError, OutputError
from ...results.card import CARD, Heading
from ...results.report import Report
from ...storage import json_file, marker
from ...storage.input_file import InputFile
from ...storage.lazy import LazyTensor, dtype_name, in_step
from ...storage.replacing import check_apart, check_path, is_same
from ...storage.safetensors_file import DTYPE_NAMES, METADATA, SafetensorsFile, matrix
from ...storage.stream import copy_file, write, write_tensor
from .. import tokenizer
from ..format import Format, Holds
from ..merge_folder import MergeFolder
from ..target import Target
from . import weights
from .checkpoint import CONFIG, INDEX, Checkpoint
from .experts import Piece
from .fit import fit
from .quantized.dequantized import Dequantized

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
    leaves next to nothing of a module's ΔW, DomergeError (see weights.Realised). Of a base that is
    quantized, and given as numbers, all weights are written as these, rounded once with what is
    added.

    Tensors that adapters save whole take the place of the base's. Other files of the folder's top
    level are copied, but for weights in other formats, adapters and the card. The target has the
    base. Raises OptionError for one that does not fit, before anything is written; what fits where
    is in fit.py.
    """

    heading = Heading("Model with merged LoRA adapters", "transformers")
    is_placed = True

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
        if base.quantized:
            self._notes += (_of_quantized(self._base),)
        if self._fit.vocabulary.rows and not target.copied:
            self._notes += ("the tokenizer is the base's: the adapters have none for new tokens",)
        names = [*(file.path.name for file in self._base.inputs), CARD, *tokenizer.FILES]
        super().__init__(path, target, overwrite, force, [glob.escape(name) for name in names])

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._places: dict[str, tuple[FileIO, int]] = {}
        for base in self._base.files:
            head, begins = self._head(base)
            mode = "r+" if self.is_attached else "w"
            file = files.enter_context(FileIO(folder / base.path.name, mode))
            if not self.is_attached:
                write(file, head)
            self._places |= {key: (file, len(head) + begin) for key, begin in begins.items()}
        self._missing = {(x.key, x.index) for place in self._fit.places.values() for x in place}
        if self.is_attached:
            return
        changed: dict[str, set[int | None]] = {}
        for key, index in self._missing:
            changed.setdefault(key, set()).add(index)
        for key in self._places:
            self._copy(key, changed.get(key, set()))
        self._copy_others(folder)

    def _head(self, base: SafetensorsFile) -> tuple[bytes, dict[str, int]]:
        """What stands before the data of a file, and where each tensor begins after it: as in the
        base, unless a weight has another shape or is new, which is stored beside another."""
        own = {key: tensor for key, tensor in self._base.tensors.items() if tensor.file is base}
        beside = self._fit.vocabulary.beside
        new = {key: own[stored] for key, stored in beside.items() if stored in own}
        shapes = {key: self._before(key)[0].shape for key in {**own, **new}}
        same = not new and all(shapes[key] == tensor.shape for key, tensor in own.items())
        if same and not self._base.quantized:
            return marker.marked(base.head()), {key: x.begin for key, x in own.items()}
        header = {METADATA: json_file.parse(base.head()[8:]).get(METADATA)}
        begins, end = {}, 0
        for key in sorted({**own, **new}, key=lambda key: {**own, **new}[key].begin):
            begins[key], dtype = end, self._before(key)[1]
            end += math.prod(shapes[key]) * dtype.itemsize
            place = {"shape": list(shapes[key]), "data_offsets": [begins[key], end]}
            header[key] = {"dtype": DTYPE_NAMES[dtype], **place}
        return marker.marked(bytes(8) + json.dumps(header).encode()), begins

    def _copy_others(self, folder: Path) -> None:
        """The other files; config and index as the weights are now, and the tokenizer that fits."""
        vocabulary = self._fit.vocabulary
        config = vocabulary.config
        if config is None and self._base.quantized:
            config = self._base.config
        copied = self._target.copied if vocabulary.rows else ()
        for file in self._base.others:
            name = file.path.name
            if name == CONFIG and config is not None:
                self._write_json(name, config)
            elif name == INDEX and config is not None:
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
        sample = weights.Realised()
        for piece in self._fit.places[name]:
            written = 0
            for sums in self._sums(name, delta, piece):
                self._write(piece.key, written, sums[2], piece.index or 0)
                written += sums[2].nbytes
                sample.add(*(x[::SAMPLED] for x in sums))
            self._missing.discard((piece.key, piece.index))
        if sample.share < LEAST_KEPT:
            self._check_kept(name, delta)
        self._realised[name] = sample

    def noted(self) -> dict[str, tuple[float, float]]:
        """How much of each update is left."""
        found = {name: (x.wanted, x.kept) for name, x in self._realised.items()}
        self._realised.clear()
        return found

    def take_note(self, noted: Mapping[str, tuple[float, float]]) -> None:
        for name, numbers in noted.items():
            self._realised[name] = weights.Realised(*numbers)
            for piece in self._fit.places.get(name, ()):
                self._missing.discard((piece.key, piece.index))

    def _sums(
        self, name: str, delta: Tensor, piece: Piece
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """W0, ΔW and their rounded sum, some rows of the weight at a time."""
        before, dtype = self._before(piece.key)
        exact = isinstance(before, Dequantized)
        if piece.index is not None:
            before = matrix(before, piece.index)
        change = delta[piece.rows].detach().cpu()
        change = weights.stored(self._target.layouts[name], change, piece.turned)
        wide = torch.promote_types(dtype, torch.float32)
        rows = max(1, CHUNK_BYTES // (change[0].numel() * wide.itemsize))
        for start in range(0, len(change), rows):
            part = change[start : start + rows].to(wide)
            if more := self._fit.changes.get(piece.key):
                part = (part.double() + more.rows(start, start + len(part))).to(wide)
            old = before.rows(start, start + len(part)).cpu()
            old = (old if exact else old.to(dtype)).to(wide)
            yield old, part, weights.rounded(name, old + part, dtype)

    def _check_kept(self, name: str, delta: Tensor) -> None:
        """DomergeError where next to nothing of ΔW is left: the sample may have missed it."""
        whole = weights.Realised()
        for piece in self._fit.places[name]:
            for sums in self._sums(name, delta, piece):
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
            raise AssertionError(f"{next(iter(self._missing))[0]} was never written")
        self._write_card(report)
        self._base.check()

    def _before(self, key: str) -> tuple[LazyTensor, torch.dtype]:
        """The weight that ΔW is added to, and the dtype that it has in the base."""
        own = self._base.tensors[self._fit.vocabulary.beside.get(key, key)]
        dtype = own.written if isinstance(own, Dequantized) else own.dtype
        return self._fit.replaced.get(key, own), dtype

    def _copy(self, key: str, changed: Collection[int | None]) -> None:
        """Write what the base has, but for the matrices that will come."""
        before, dtype = self._before(key)
        if None in changed:
            return
        for index in range(before.shape[0]) if changed else (0,):
            if index in changed:
                continue
            written = 0
            for kept in self._changed(key, matrix(before, index) if changed else before, dtype):
                self._write(key, written, kept, index)
                written += kept.nbytes

    def _changed(self, key: str, before: LazyTensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """A parameter in pieces, with its change where it has one that is no ΔW."""
        change = self._fit.changes.get(key)
        for piece, *more in in_step([before] if change is None else [before, change]):
            kept = piece.cpu()
            kept = weights.rounded(key, kept, dtype) if self._base.quantized else kept.to(dtype)
            if more:
                added = weights.rounded(key, kept.double() + more[0], dtype)
                self._realised.setdefault(key, weights.Realised()).add(kept, more[0], added)
                kept = added
            yield kept

    def _write(self, key: str, skipped: int, tensor: Tensor, index: int = 0) -> None:
        """Write a tensor, or its part after so many bytes, or that of one of its matrices."""
        file, begin = self._places[key]
        before, dtype = self._before(key)
        matrices = index * math.prod(before.shape[1:]) * dtype.itemsize
        file.seek(begin + matrices + skipped)
        write_tensor(file, tensor)


def _of_quantized(base: Checkpoint) -> str:
    """What is to be said of a base whose numbers are written."""
    dtypes = {x.written for x in base.tensors.values() if isinstance(x, Dequantized)}
    names = " and ".join(sorted(map(dtype_name, dtypes)))
    return f"the base is quantized ({base.quantized}): its weights are written in {names}"


def _check_outside(path: Path, base: Path) -> None:
    place, of_base = Path(os.path.realpath(path)), Path(os.path.realpath(base))
    for folder in (place, *place.parents):
        if folder == of_base or is_same(folder, of_base):
            raise OutputError(str(path), "is in the base model's folder", "give another folder")


MODEL = Format(
    "model",
    "the base model's folder with ΔW added to its weights",
    write=ModelFolder,
    form="model",
    holds=Holds(whole=True, convolutions=True, embeddings=True, experts=True, changes=True),
    dense=True,
    needs_base=True,
)
