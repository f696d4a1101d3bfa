"""A folder of dense updates: ΔW of every module under the base model's own parameter name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import LazyTensor
from ..adapters.whole import COPY, parameter
from ..adapters.whole_sum import change
from ..algebra import powers
from ..errors import DomergeError
from ..results.card import CARD, Heading
from ..results.report import Report
from ..storage.stream import SafetensorsWriter
from .format import Format, Holds
from .merge_folder import MergeFolder
from .model import weights
from .model.base_names import Renaming
from .model.experts import Piece, paths, pieces
from .target import Layout, Target

__all__ = ["DELTAS"]

WEIGHTS = "deltas.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FILES = (WEIGHTS, "deltas-*-of-*.safetensors", INDEX, CARD)
SHARD_BYTES = 5 * 10**9


class DeltaFolder(MergeFolder):
    """Writes ΔW module by module, in the shape and orientation of the base's weight and the
    target's dtype: deltas.safetensors, or shards with an index as Hugging Face's where that would
    be larger than SHARD_BYTES.

    Without the base model the orientation of linear weights is what the adapters' config says
    (`fan_in_fan_out`), for all of them; that of experts is known from the base alone. Tensors that
    adapters save whole become W - W0; a copy of the base's own weight is no update. Raises
    DomergeError for what no update can hold: tensors saved whole of which W0 is not at hand, and
    replicated layers.
    """

    note = "`W + ΔW` is the merged weight of every parameter in these files."
    heading = Heading("Merged weight updates (ΔW)", note=note)
    is_placed = True

    def __init__(self, path: Path, target: Target, overwrite: bool, force: bool = False) -> None:
        weights.check_no_replication(target)
        adapted = {layout.parameter for layout in target.layouts.values()}
        changes = target.changes.tensors(target.dtype)
        alone = {key: x for key, x in changes.items() if key not in adapted}
        self._saved = dict(_changes(target)) | alone
        self._more = target.changes.tensors(torch.float64)
        self._places = _places(target)
        self._begins: dict[str, int] = {}
        super().__init__(path, target, overwrite, force, FILES)

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        shapes = dict(_shapes(self._target, self._places))
        sizes = {
            key: math.prod(shape) * self._target.dtype.itemsize for key, shape in shapes.items()
        }
        shapes |= {key: tensor.shape for key, tensor in self._saved.items()}
        sizes |= {key: tensor.nbytes for key, tensor in self._saved.items()}
        self._total = sum(sizes.values())
        self._shards = shards(sizes)
        self._writers: dict[str, SafetensorsWriter] = {}
        for name, keys in self._shards.items():
            largest = {key: (self._target.dtype, shapes[key]) for key in keys}
            writer = SafetensorsWriter(
                folder / name, largest, placed=True, attached=self.is_attached
            )
            files.enter_context(writer)
            self._writers |= dict.fromkeys(keys, writer)

    def add(self, name: str, delta: Tensor) -> None:
        """ΔW [m, n] of a module, in any order of modules."""
        layout = self._target.layouts[name]
        for piece in self._places[name]:
            stored = weights.stored(layout, delta[piece.rows], piece.turned)
            if piece.path in self._more:
                stored = stored.cpu().double() + self._more[piece.path].read()
            found = weights.rounded(name, stored, self._target.dtype)
            powers.check_rounding(name, stored, found, found.dtype)
            self._write(layout, piece, found)

    def _write(self, layout: Layout, piece: Piece, found: Tensor) -> None:
        writer = self._writers[piece.path]
        if piece.index is None:
            writer.add(piece.path, found)
            return
        assert layout.slice
        if piece.path not in self._begins:
            shape = (layout.slice.count, *found.shape)
            self._begins[piece.path] = writer.reserve(piece.path, found.dtype, shape)
        writer.put(self._begins[piece.path] + piece.index * found.nbytes, found)

    def finish(self, report: Report) -> None:
        """Tensors saved whole, the index, if there are several shards, and the card."""
        for key, tensor in self._saved.items():
            self._writers[key].add_pieces(key, tensor)
        if len(self._shards) > 1:
            where = {key: shard for shard, keys in self._shards.items() for key in keys}
            total = {"total_size": self._total}
            self._write_json(INDEX, {"metadata": total, "weight_map": where})
        self._write_card(report)


def _places(target: Target) -> dict[str, Sequence[Piece]]:
    """Where every module's ΔW goes. DomergeError for experts without the base model."""
    layouts = target.layouts.values()
    numbered = [layout for layout in layouts if layout.is_numbered]
    found: dict[str, Sequence[Piece]] = {}
    if numbered:
        if target.base is None:
            problem = f"which way {numbered[0].parameter!r} lies is known from the base model alone"
            raise DomergeError(f"{problem}; give it (base, --base), or write an adapter")
        wanted = {p: s for x in layouts for p, s in paths(x, x.inputs).items()}
        found |= pieces(numbered, target.base, Renaming(wanted, target.base))
    for layout in layouts:
        if not layout.is_numbered:
            turned = weights.is_turned(layout, target)
            path = layout.parameter
            found[layout.name] = [Piece(path, path, turned, slice(0, layout.m))]
    return found


def _shapes(
    target: Target, places: Mapping[str, Sequence[Piece]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of every tensor of ΔW."""
    for name, layout in target.layouts.items():
        for piece in places[name]:
            rows = piece.rows.stop - piece.rows.start
            shape = weights.stored_shape(layout, piece.turned, rows)
            count = layout.slice.count if layout.slice else 1
            yield piece.path, shape if piece.index is None else (count, *shape)


def _changes(target: Target) -> Iterator[tuple[str, LazyTensor]]:
    """W - W0 of the tensors that are kept whole, by the base model's names for them."""
    adapted = {layout.parameter for layout in target.layouts.values()}
    for key, tensor in target.carried.items():
        if COPY in key:
            continue
        if parameter(key) in adapted:
            problem = f"{key!r} is saved whole by the adapters, and is LoRA in one as well"
            remedy = "write an adapter or a model, or say whole='drop' to have the LoRA alone"
            raise DomergeError(f"{problem}: two updates of one weight; {remedy}")
        origin = target.whole.origins.get(key)
        if origin is None or origin.shape != tensor.shape:
            problem = f"{key!r} is saved whole by the adapters, which is no update"
            remedy = "give the base model (base, --base), write an adapter, or say whole='drop'"
            raise DomergeError(f"{problem}; {remedy}")
        yield parameter(key), change(key, tensor, origin, target.dtype)


def shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Keys by file: in order, as many to a file as SHARD_BYTES hold, at least one."""
    parts: list[list[str]] = []
    room = 0
    for key, size in sizes.items():
        if size > room:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(key)
        room -= size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    names = (f"deltas-{k:05d}-of-{len(parts):05d}.safetensors" for k in range(1, len(parts) + 1))
    return dict(zip(names, parts))


DELTAS = Format(
    "deltas",
    "dense updates: ΔW of every module",
    write=DeltaFolder,
    form="deltas",
    holds=Holds(whole=True, convolutions=True, embeddings=True, experts=True, changes=True),
    dense=True,
)
