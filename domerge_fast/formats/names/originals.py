"""Where a base of an image or video model has the weights of an adapter's modules, by the tables of
names: whatever either calls them, fused or split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ...adapters import Adapter, Module
from ...errors import AdapterError
from ...storage.lazy import LazyTensor
from ...storage.made import Shaped
from ...storage.views import Stacked
from ..model.checkpoint import Checkpoint
from .models import MODELS, Model, Piece
from .split import rows_of

__all__ = ["by_tables"]

_WEIGHT = ".weight"
_BASE = "give the base it was trained on: one safetensors file, or a folder of diffusers"


class _Place(NamedTuple):
    """Rows of a base's weight. piece: what they are in the one spelling."""

    key: str
    piece: Piece


def by_tables(adapter: Adapter, base: Checkpoint) -> Callable[[str], LazyTensor | None]:
    """From the parameters of a DoRA's modules to the base's weights, in the shapes that the modules
    have. AdapterError for a module that is in no table, or that the base does not have, and where
    the tables leave open which weight it is."""
    modules = [adapter.modules[name] for name in adapter.magnitudes]
    known = [model for model in MODELS.values() if all(_pieces(model, x) for x in modules)]
    if not known:
        raise _strange(adapter, modules)
    lacking: list[str] = []
    found: list[dict[str, list[_Place]]] = []
    for model in known:
        stored = _stored(model, base)
        places = {x.name: _places(_pieces(model, x), stored) for x in modules}
        lacking += [name for name, place in places.items() if not place][:1]
        found += [places] if all(places.values()) else []
    if not found:
        problem = f"is a DoRA of a weight that the base {str(base.folder)!r} does not have"
        raise AdapterError(adapter.name, lacking[0], problem, _BASE)
    if any(places != found[0] for places in found):
        titles = " or ".join(model.title for model in known)
        raise AdapterError(adapter.name, None, f"may be of {titles}, by its modules", _BASE)
    weights = {x.parameter: _weight(base, x, found[0][x.name]) for x in modules}
    return weights.get


def _strange(adapter: Adapter, modules: list[Module]) -> AdapterError:
    """By the first module that the table with most of them has not."""
    best = max(MODELS.values(), key=lambda model: sum(bool(_pieces(model, x)) for x in modules))
    name = next(x.name for x in modules if not _pieces(best, x))
    problem = "is a DoRA of a module whose name is in no table of modules, so that its weight in "
    return AdapterError(
        adapter.name, name, f"{problem}the base is not known", "extract it as a plain LoRA"
    )


def _pieces(model: Model, module: Module) -> tuple[Piece, ...]:
    """What a module is in the one spelling; () where the tables do not have it."""
    return model.pieces(module.name, (module.m, module.a_shape[1]))


def _stored(model: Model, base: Checkpoint) -> dict[str, list[_Place]]:
    """The base's weights by the pieces that they have."""
    found: dict[str, list[_Place]] = {}
    for key, x in base.tensors.items():
        if key.endswith(_WEIGHT) and len(x.shape) > 1:
            for piece in model.pieces(key.removesuffix(_WEIGHT), (x.shape[0], x.shape[1])):
                found.setdefault(piece.name, []).append(_Place(key, piece))
    return found


def _places(pieces: tuple[Piece, ...], stored: Mapping[str, list[_Place]]) -> list[_Place]:
    """Where the base has these rows of a module, in order; [] where it has not all of them once."""
    found = []
    for piece in pieces:
        places = stored.get(piece.name, [])
        if len(places) != 1:
            return []
        key, rows = places[0]
        # Halves that change places in both are in their order.
        found.append(_Place(key, dataclasses.replace(rows, swapped=piece.swapped != rows.swapped)))
    return found


def _weight(base: Checkpoint, module: Module, places: list[_Place]) -> LazyTensor | None:
    """The rows, one below the other, in the shape of the module; None where they are others."""
    parts = [_rows(base.tensors[key], piece) for key, piece in places]
    inputs = module.a_shape[1:]
    sizes = {math.prod(x.shape[1:]) for x in parts}
    alike = sizes == {math.prod(inputs)} and len({x.dtype for x in parts}) == 1
    if not alike or sum(x.shape[0] for x in parts) != module.m:
        return None
    whole = parts[0] if len(parts) == 1 else Stacked(tuple(parts))
    return Shaped(whole, (module.m, *inputs))


def _rows(x: LazyTensor, piece: Piece) -> LazyTensor:
    whole = (piece.start, piece.stop) == (0, x.shape[0]) and not piece.swapped
    return x if whole else rows_of(x, piece)
