"""Where merged modules lie in a base model: names, shapes, orientation, and what does not fit."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...adapters import LazyTensor, Module
from ...adapters.names import is_of_tokens
from ...adapters.whole import parameter
from ...adapters.whole_sum import Sum, equal
from ...errors import OptionError
from ..target import Layout, Target
from . import weights
from .base_names import OTHER_BASE, Renaming, nearest, stored
from .checkpoint import Checkpoint, check_float, how_quantized, refusal
from .experts import Piece, paths, pieces
from .quantized.dequantize import dequantized
from .vocabulary import (
    Vocabulary,
    check_replaceable,
    check_twins,
    is_token_layout,
    settle,
)

__all__ = ["fit", "in_numbers", "originals"]

LOG = logging.getLogger(__name__)

_RESIZED = "save the adapters with save_embedding_layers=True, or resize the base and save it"


@dataclass(frozen=True)
class Fit:
    """places: of ΔW, by merged module. replaced: what a ΔW is added to, or is written, in place of
    the base's own weight, by its name; vocabulary: of which weights more is to be said.
    changes: what is added besides, by the base's names."""

    places: Mapping[str, Sequence[Piece]]
    replaced: Mapping[str, LazyTensor]
    vocabulary: Vocabulary
    changes: Mapping[str, LazyTensor]


def fit(target: Target, base: Checkpoint) -> Fit:
    """OptionError, in one line, unless every merged module and saved tensor has its place."""
    weights.check_no_replication(target)
    layouts = target.layouts.values()
    rename = Renaming({p: s for x in layouts for p, s in paths(x, x.inputs).items()}, base)
    vocabulary = settle(target, base, rename)
    replaced = dict(vocabulary.replaced)
    for name, tensor in target.carried.items():
        if not is_of_tokens(path := parameter(name)):
            key = rename(path)
            check_replaceable(key, tensor, base.tensors.get(key), base)
            replaced[key] = tensor
    numbered = [layout for layout in layouts if layout.is_numbered]
    places: dict[str, Sequence[Piece]] = dict(pieces(numbered, base, rename))
    for layout in layouts:
        if not layout.is_numbered:
            path = layout.parameter
            key = vocabulary.keys.get(path) or rename(path)
            own = replaced.get(key) or stored(layout.name, key, base)
            turned = _turned(layout, key, own, target, base)
            places[layout.name] = [Piece(path, key, turned, slice(0, layout.m))]
    _check_one_each(places, base)
    changes = {}
    for path, change in target.changes.tensors(torch.float64).items():
        key = rename(path)
        _check_changeable(key, path, change, replaced.get(key, base.tensors.get(key)), base)
        changes[key] = change
    changed = {piece.key for place in places.values() for piece in place} | {
        key
        for key, x in replaced.items()
        if key in base.tensors and not equal(x, base.tensors[key])
    }
    changed |= changes.keys()
    check_twins(changed.difference(vocabulary.keys.values(), vocabulary.replaced), base)
    _check_squares(target, places, base)
    for key, tensor in replaced.items():
        if isinstance(tensor, Sum):
            own = base.tensors[vocabulary.beside.get(key, key)]
            replaced[key] = dataclasses.replace(tensor, dtype=own.dtype)
    return Fit(places, replaced, vocabulary, changes)


def in_numbers(target: Target) -> Target:
    """The target, where its base is quantized and the merge changes what is: with the base as the
    numbers that it stands for. OptionError as `fit`, and for a damaged base."""
    assert target.base
    if how_quantized(target.base) is None:
        return target
    try:
        fit(target, target.base)
    except OptionError:
        base = dequantized(target.base)
        if base is None:
            raise
        LOG.info("the base is quantized (%s): its weights are written as numbers", base.quantized)
        return dataclasses.replace(target, base=base)
    return target


def originals(
    modules: Mapping[str, Module], base: Checkpoint
) -> Callable[[str], LazyTensor | None]:
    """From parameter names of the adapted model, with these adapted modules, to the base's weights,
    of one that is quantized as numbers; a head that is not stored because it is tied is the
    embedding. OptionError, when a weight is asked for, unless the base has the modules."""
    ways = {name: paths(module, module.a_shape[1:]) for name, module in modules.items()}

    @functools.cache
    def found() -> tuple[Checkpoint, Renaming]:
        whole = dequantized(base) or base
        # The vocabulary may have been resized.
        shapes = {p: () if is_of_tokens(p) else s for way in ways.values() for p, s in way.items()}
        rename = Renaming(shapes, whole)
        for name, way in ways.items():
            if not any(rename(path) in whole.tensors or is_of_tokens(path) for path in way):
                key = rename(next(iter(way)))
                problem = f"has no {key!r} for module {name!r}{nearest(key, whole)}"
                raise refusal(base.folder, problem, OTHER_BASE)
        return whole, rename

    def origin(path: str) -> LazyTensor | None:
        whole, rename = found()
        key = rename(path)
        if key not in whole.tensors and whole.is_tied and is_of_tokens(path):
            tokens = [key for key in whole.tensors if is_of_tokens(key)]
            key = tokens[0] if len(tokens) == 1 else key
        return whole.tensors.get(key)

    return origin


def _turned(layout: Layout, key: str, tensor: LazyTensor, target: Target, base: Checkpoint) -> bool:
    """Whether the weight is stored as [n, m].

    PEFT states `fan_in_fan_out` once, but sets it by the type of each layer: a model with Conv1D
    and Linear modules is told apart by their shapes.
    """
    check_float(layout.name, key, base)
    stated = weights.is_turned(layout, target)
    for turned in (stated, not stated) if layout.kind == "linear" else (stated,):
        if weights.stored_shape(layout, turned) == tensor.shape:
            return turned
    expected = list(weights.stored_shape(layout, stated))
    problem = f"stores {key!r} as {list(tensor.shape)}, module {layout.name!r} needs {expected}"
    resized = is_token_layout(layout, base) and tensor.shape[1:] == tuple(expected[1:])
    raise refusal(base.folder, problem, _RESIZED if resized else OTHER_BASE)


def _check_changeable(
    key: str, path: str, change: LazyTensor, own: LazyTensor | None, base: Checkpoint
) -> None:
    """OptionError unless a change has a parameter of its shape in the base."""
    if own is None:
        problem = f"has no {key!r} for the change of {path!r}{nearest(key, base)}"
        raise refusal(base.folder, problem, OTHER_BASE)
    check_float(path, key, base)
    if own.shape != change.shape:
        problem = f"stores {key!r} as {list(own.shape)}, its change is "
        raise refusal(base.folder, f"{problem}{list(change.shape)}", OTHER_BASE)


def _check_one_each(places: Mapping[str, Sequence[Piece]], base: Checkpoint) -> None:
    """OptionError where two modules are one weight: the second would take the first's place."""
    owners: dict[tuple[str, int | None], str] = {}
    for name, place in places.items():
        for piece in place:
            if (first := owners.setdefault((piece.key, piece.index), name)) != name:
                problem = f"has one weight {piece.key!r} for modules {first!r} and {name!r}"
                remedy = "merge adapters that name their modules alike, or write an adapter"
                raise refusal(base.folder, problem, remedy)


def _check_squares(target: Target, places: Mapping[str, Sequence[Piece]], base: Checkpoint) -> None:
    """OptionError for a square weight that may lie either way."""
    linear = [x for x in target.layouts.values() if x.kind == "linear" and not x.is_numbered]
    if all(places[x.name][0].turned == weights.is_turned(x, target) for x in linear):
        return
    for layout in linear:
        if layout.inputs == (layout.m,):
            problem = f"stores some weights as [in, out]; that of module {layout.name!r} is square"
            remedy = "say fan_in_fan_out if all are stored so, or write an adapter"
            raise refusal(base.folder, problem, remedy)
