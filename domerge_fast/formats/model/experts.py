"""Where a base's files have the matrices of a parameter that is adapted as it is.

Transformers 5 holds the experts of a layer in one parameter of three dimensions. Files have that
(gpt-oss, Llama 4), or, as older versions held them, a linear layer for each part of an expert,
which transformers joins on loading and takes apart on saving (Qwen3-MoE, Mixtral, DeepSeek).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...adapters.adapter import Module
from ...storage.lazy import LazyTensor
from ..names.experts import ways
from ..target import Layout
from .base_names import OTHER_BASE, stored
from .checkpoint import Checkpoint, check_float, parts, refusal

__all__ = ["Piece", "paths", "pieces"]

Shapes = list[tuple[int, ...]]
Weights = Layout | Module

_TURNED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Model types whose parameters are [E, in, out], as their classes say (`is_transposed`)."""


@dataclass(frozen=True)
class Piece:
    """Some rows of ΔW [m, n], and the weight that they are added to: its name in the adapted model
    and in the base, whether it lies there as [n, m], and its number where it is one of several
    matrices of a tensor."""

    path: str
    key: str
    turned: bool
    rows: slice
    index: int | None = None


def paths(weight: Weights, inputs: tuple[int, ...]) -> dict[str, Shapes]:
    """What a module's weight may be called, with what it may be stored as: what the adapted model
    calls it first. inputs: the shape of the inputs."""
    m, piece = weight.m, weight.slice
    if piece is None or piece.index is None:
        return {weight.parameter: [(m, *inputs), (*inputs, m)]}
    matrices: Shapes = [(piece.count, m, *inputs), (piece.count, *inputs, m)]
    found = {weight.parameter: matrices if piece.count > 1 else [*matrices, (m, *inputs)]}
    for way in _ways(weight.parameter, piece.index, m):
        found |= {path: [(rows.stop - rows.start, *inputs)] for path, rows in way}
    return found


def _ways(parameter: str, index: int, m: int) -> Iterator[list[tuple[str, slice]]]:
    """The layers that a matrix of a parameter may be stored as, and which rows each has."""
    for owner, names in ways(parameter):
        step, left = divmod(m, len(names))
        if not left:
            yield [
                (f"{owner}.{index}.{name}.weight", slice(k * step, (k + 1) * step))
                for k, name in enumerate(names)
            ]


def _taken_apart(
    layout: Layout, rename: Callable[[str], str], tensors: Mapping[str, LazyTensor]
) -> list[Piece] | None:
    """The layers that the base has in place of a matrix of a parameter, if it has."""
    assert layout.slice
    assert layout.slice.index is not None
    for way in _ways(layout.parameter, layout.slice.index, layout.m):
        pieces = [Piece(path, rename(path), False, rows) for path, rows in way]
        if all(_fits(piece, layout, tensors.get(piece.key)) for piece in pieces):
            return pieces
    return None


def _fits(piece: Piece, layout: Layout, tensor: LazyTensor | None) -> bool:
    shape = (piece.rows.stop - piece.rows.start, *layout.inputs)
    return tensor is not None and tensor.shape == shape


def pieces(
    layouts: Sequence[Layout], base: Checkpoint, rename: Callable[[str], str]
) -> dict[str, list[Piece]]:
    """Where the base has each of these matrices of parameters. OptionError for one that it has not,
    or of which nothing tells which way it lies there."""
    found: dict[str, list[Piece]] = {}
    whole: dict[str, Layout] = {}
    for layout in layouts:
        apart = None
        if rename(layout.parameter) not in base.tensors:
            apart = _taken_apart(layout, rename, base.tensors)
        if apart is None:
            whole.setdefault(layout.parameter, layout)
            continue
        found[layout.name] = apart
        for piece in apart:
            check_float(layout.name, piece.key, base)
    turned = _turned(whole.values(), base, rename)
    for layout in layouts:
        if layout.name not in found:
            assert layout.slice
            path = layout.parameter
            key = rename(path)
            index = layout.slice.index if len(base.tensors[key].shape) > 2 else None
            found[layout.name] = [Piece(path, key, turned[path], slice(0, layout.m), index)]
    return found


def _turned(
    layouts: Collection[Layout], base: Checkpoint, rename: Callable[[str], str]
) -> dict[str, bool]:
    """Whether parameters, of each of which there is one matrix's layout, are stored as [E, n, m]:
    by their shapes; square ones as the others, or as the model's type says."""
    ways = {x.parameter: _possible(x, rename(x.parameter), base) for x in layouts}
    sure = {way[0] for way in ways.values() if len(way) == 1}
    is_turned = any(part.get("model_type") in _TURNED for part in parts(base.config))
    for layout in layouts:
        if len(ways[layout.parameter]) > 1 and len(sure) != 1 and not is_turned:
            key = rename(layout.parameter)
            problem = f"stores {key!r} with square matrices, and nothing tells which way they lie"
            raise refusal(base.folder, problem, "write an adapter")
    usual = sure.pop() if len(sure) == 1 else True
    return {name: way[0] if len(way) == 1 else usual for name, way in ways.items()}


def _possible(layout: Layout, key: str, base: Checkpoint) -> list[bool]:
    """The ways a parameter may lie in the base, by its shape. OptionError for none."""
    assert layout.slice
    shape = stored(layout.name, key, base).shape
    check_float(layout.name, key, base)
    count, m, n = layout.slice.count, layout.m, layout.inputs[0]
    lead = () if count == 1 and len(shape) == 2 else (count,)
    both = {False: (*lead, m, n), True: (*lead, n, m)}
    found = [turned for turned, wanted in both.items() if shape == wanted]
    if not found:
        problem = f"stores {key!r} as {list(shape)}, {layout.parameter!r} needs {list(both[False])}"
        raise refusal(base.folder, problem, OTHER_BASE)
    return found
