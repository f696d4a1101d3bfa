"""Where merged modules lie in a base model: names, shapes, orientation, and what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...adapters import LazyTensor, Module
from ...adapters.names import is_of_tokens
from ...adapters.whole import Sum, equal, parameter
from ...storage.lazy import dtype_name
from ..target import Layout, Target
from . import weights
from .base_names import OTHER_BASE, Renaming, nearest
from .checkpoint import Checkpoint, refusal
from .vocabulary import (
    FLOATS,
    Vocabulary,
    check_replaceable,
    check_twins,
    is_token_layout,
    settle,
)

__all__ = ["fit", "originals"]

_RESIZED = "save the adapters with save_embedding_layers=True, or resize the base and save it"


@dataclass(frozen=True)
class Place:
    """The weight of a merged module: its name in the base, and whether it is stored as [n, m]."""

    key: str
    turned: bool


@dataclass(frozen=True)
class Fit:
    """places: by merged module. replaced: what a ΔW is added to, or is written, in place of the
    base's own weight, by its name; vocabulary: of which weights more is to be said."""

    places: Mapping[str, Place]
    replaced: Mapping[str, LazyTensor]
    vocabulary: Vocabulary


def fit(target: Target, base: Checkpoint) -> Fit:
    """OptionError, in one line, unless every merged module and saved tensor has its place."""
    weights.check_no_replication(target)
    both = (False, True)
    shapes = {
        f"{layout.name}.weight": [weights.stored_shape(layout, turned) for turned in both]
        for layout in target.layouts.values()
    }
    rename = Renaming(shapes, base)
    vocabulary = settle(target, base, rename)
    replaced = dict(vocabulary.replaced)
    for name, tensor in target.carried.items():
        if not is_of_tokens(path := parameter(name)):
            key = rename(path)
            check_replaceable(key, tensor, base.tensors.get(key), base)
            replaced[key] = tensor
    places = {}
    for layout in target.layouts.values():
        path = f"{layout.name}.weight"
        key = vocabulary.keys.get(path) or rename(path)
        stored = replaced.get(key) or _stored(layout, key, base)
        places[layout.name] = Place(key, _turned(layout, key, stored, target, base))
    _check_one_each(places, base)
    changed = {place.key for place in places.values()} | {
        key
        for key, x in replaced.items()
        if key in base.tensors and not equal(x, base.tensors[key])
    }
    check_twins(changed.difference(vocabulary.keys.values(), vocabulary.replaced), base)
    _check_squares(target, places, base)
    for key, tensor in replaced.items():
        if isinstance(tensor, Sum):
            own = base.tensors[vocabulary.beside.get(key, key)]
            replaced[key] = dataclasses.replace(tensor, dtype=own.dtype)
    return Fit(places, replaced, vocabulary)


def originals(
    modules: Mapping[str, Module], base: Checkpoint
) -> Callable[[str], LazyTensor | None]:
    """From parameter names of the adapted model, with these adapted modules, to the base's weights;
    a head that is not stored because it is tied is the embedding. OptionError, when a weight is
    asked for, unless the base has the modules."""
    wanted = {f"{name}.weight": name for name in modules}
    # The vocabulary may have been resized.
    shapes = {p: () if is_of_tokens(p) else _shapes(modules[name]) for p, name in wanted.items()}
    rename = Renaming(shapes, base)
    tokens = [key for key in base.tensors if is_of_tokens(key)]
    missing = [p for p in wanted if rename(p) not in base.tensors and not is_of_tokens(p)]

    def origin(path: str) -> LazyTensor | None:
        if missing:
            key = rename(missing[0])
            problem = f"has no {key!r} for module {wanted[missing[0]]!r}{nearest(key, base)}"
            raise refusal(base.folder, problem, OTHER_BASE)
        key = rename(path)
        if key not in base.tensors and base.is_tied and is_of_tokens(path) and len(tokens) == 1:
            key = tokens[0]
        return base.tensors.get(key)

    return origin


def _shapes(module: Module) -> list[tuple[int, ...]]:
    """What a module's weight may be stored as."""
    inputs = module.a_shape[1:]
    return [(module.m, *inputs), (*inputs, module.m)]


def _stored(layout: Layout, key: str, base: Checkpoint) -> LazyTensor:
    if key in base.tensors:
        return base.tensors[key]
    module = f"module {layout.name!r}"
    stem = key.removesuffix("weight")
    inside = sorted(k for k in base.tensors if k.startswith(stem))
    if inside:
        problem = f"stores {module} as {inside[0]!r}, not as {key!r}: it is quantized or changed"
        raise refusal(base.folder, problem, "give the base in float32, float16 or bfloat16")
    raise refusal(base.folder, f"has no {key!r} for {module}{nearest(key, base)}", OTHER_BASE)


def _turned(layout: Layout, key: str, tensor: LazyTensor, target: Target, base: Checkpoint) -> bool:
    """Whether the weight is stored as [n, m].

    PEFT states `fan_in_fan_out` once, but sets it by the type of each layer: a model with Conv1D
    and Linear modules is told apart by their shapes.
    """
    own = base.tensors.get(key, tensor)
    if own.dtype not in FLOATS:
        name = dtype_name(own.dtype)
        problem = f"stores {key!r} of module {layout.name!r} as {name}: it is quantized"
        raise refusal(base.folder, problem, "give the base in float32, float16 or bfloat16")
    stated = weights.is_turned(layout, target)
    for turned in (stated, not stated) if layout.kind == "linear" else (stated,):
        if weights.stored_shape(layout, turned) == tensor.shape:
            return turned
    expected = list(weights.stored_shape(layout, stated))
    problem = f"stores {key!r} as {list(tensor.shape)}, module {layout.name!r} needs {expected}"
    resized = is_token_layout(layout, base) and tensor.shape[1:] == tuple(expected[1:])
    raise refusal(base.folder, problem, _RESIZED if resized else OTHER_BASE)


def _check_one_each(places: Mapping[str, Place], base: Checkpoint) -> None:
    """OptionError where two modules are one weight: the second would take the first's place."""
    owners: dict[str, str] = {}
    for name, place in places.items():
        if (first := owners.setdefault(place.key, name)) != name:
            problem = f"has one weight {place.key!r} for modules {first!r} and {name!r}"
            remedy = "merge adapters that name their modules alike, or write an adapter"
            raise refusal(base.folder, problem, remedy)


def _check_squares(target: Target, places: Mapping[str, Place], base: Checkpoint) -> None:
    """OptionError for a square weight that may lie either way."""
    linear = [x for x in target.layouts.values() if x.kind == "linear"]
    if all(places[x.name].turned == weights.is_turned(x, target) for x in linear):
        return
    for layout in linear:
        if layout.inputs == (layout.m,):
            problem = f"stores some weights as [in, out]; that of module {layout.name!r} is square"
            remedy = "say fan_in_fan_out if all are stored so, or write an adapter"
            raise refusal(base.folder, problem, remedy)
