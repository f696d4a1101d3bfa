"""Modules of a file as the finer ones of the one spelling.

A part of a fused module has all of its A and the part's rows of B. Files that were fused from
finer modules have a rank for each of these: columns of B that are zero in a part, with their rows
of A, add nothing to it and are left out. Whether there are such is told by the first row of a part,
so that factors which were trained fused are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ...adapters.adapter import Module
from ...storage.lazy import LazyTensor, pieces
from ...storage.safetensors_file import block
from ...storage.views import Picked, Stacked, rows_at
from .models import Piece

__all__ = ["Split", "rows_of", "split"]

Pair = tuple[LazyTensor, LazyTensor]
Split = tuple[Module, Pair]


def split(module: Module, pair: Pair, into: Sequence[Piece]) -> list[Split]:
    """The module as these pieces of it. Those that it does not change are left out, unless it
    changes none."""
    if len(into) == 1 and not into[0].swapped:
        return [(dataclasses.replace(module, name=into[0].name), pair)]
    parts = [(piece, rows_of(pair[1], piece)) for piece in into]
    used = [_used(b, module.rank) if len(into) > 1 else None for _, b in parts]
    if not any(columns is None or columns for columns in used):
        used = [None] * len(parts)
    return list(_parts(module, pair[0], parts, used))


def rows_of(b: LazyTensor, piece: Piece) -> LazyTensor:
    """The piece's rows of B, or of all of a weight."""
    if not piece.swapped:
        return block(b, piece.start, piece.stop)
    half = (piece.start + piece.stop) // 2
    return Stacked((block(b, half, piece.stop), block(b, piece.start, half)))


def _used(b: LazyTensor, rank: int) -> tuple[int, ...] | None:
    """The columns of B, of the first so many, that are not zero; None if all are used."""
    used = b.rows(0, 1).flatten(1).any(0)[:rank]
    if used.all():
        return None
    for rows in pieces(b):
        used = used | rows.flatten(1).any(0)[:rank]
    return None if used.all() else tuple(used.nonzero().flatten().tolist())


def _parts(
    module: Module,
    a: LazyTensor,
    parts: Sequence[tuple[Piece, LazyTensor]],
    used: Sequence[tuple[int, ...] | None],
) -> Iterator[Split]:
    for (piece, b), columns in zip(parts, used):
        rows = piece.stop - piece.start
        if columns is None:
            shape = (rows, *module.b_shape[1:])
            yield dataclasses.replace(module, name=piece.name, b_shape=shape), (a, b)
        elif columns:
            pair = rows_at(a, columns), Picked(b, columns)
            yield _of_columns(module, piece.name, pair), pair


def _of_columns(module: Module, name: str, pair: Pair) -> Module:
    a, b = pair
    return dataclasses.replace(module, name=name, a_shape=a.shape, b_shape=b.shape, rank=a.shape[0])
