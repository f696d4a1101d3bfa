"""Where merged modules lie in a base model: names, shapes, orientation, and what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..adapters import LazyTensor
from ..adapters.assemble import is_of_tokens
from ..adapters.whole import Sum, parameter
from ..merged import Layout, Target
from . import weights
from .checkpoint import Checkpoint, refusal
from .vocabulary import FLOATS, Vocabulary, check_replaceable, is_token_layout, settle

_OTHER_BASE = "give the base model the adapters were trained on, or write an adapter"
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
    rename = _renaming([f"{name}.weight" for name in target.layouts], base)
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
    _check_squares(target, places, base)
    for key, tensor in replaced.items():
        if isinstance(tensor, Sum):
            own = base.tensors[vocabulary.beside.get(key, key)]
            replaced[key] = dataclasses.replace(tensor, dtype=own.dtype)
    return Fit(places, replaced, vocabulary)


def originals(names: Collection[str], base: Checkpoint) -> Callable[[str], LazyTensor | None]:
    """From parameter names of the adapted model, with these adapted modules, to the base's weights;
    a head that is not stored because it is tied is the embedding. OptionError, when a weight is
    asked for, unless the base has the modules."""
    wanted = {f"{name}.weight": name for name in names}
    rename = _renaming(wanted, base)
    tokens = [key for key in base.tensors if is_of_tokens(key)]
    missing = [p for p in wanted if rename(p) not in base.tensors and not is_of_tokens(p)]

    def origin(path: str) -> LazyTensor | None:
        if missing:
            problem = f"has no {rename(missing[0])!r} for module {wanted[missing[0]]!r}"
            raise refusal(base.folder, problem, _OTHER_BASE)
        key = rename(path)
        if key not in base.tensors and base.is_tied and is_of_tokens(path) and len(tokens) == 1:
            key = tokens[0]
        return base.tensors.get(key)

    return origin


def _renaming(wanted: Collection[str], base: Checkpoint) -> Callable[[str], str]:
    """From parameter names of the adapted model to those of the file.

    A model with a head and the one without it load each other's files: transformers takes one
    outer name (`transformer.`, `model.`, …) off or puts it on. Which one is not in the folder, so
    it is the one that finds the modules.
    """

    def found(change: tuple[str, str]) -> int:
        off, on = change
        return sum(on + key.removeprefix(off) in base.tensors for key in wanted)

    as_is = ("", "")
    changes = [(outer, "") for outer in _outer(wanted)] + [
        ("", outer) for outer in _outer(base.tensors)
    ]
    best = max(found(change) for change in [as_is, *changes])
    chosen = [as_is] if found(as_is) == best else [c for c in changes if found(c) == best]
    if len(chosen) > 1:
        ways = " and ".join(repr(off + on) for off, on in chosen[:2])
        problem = f"has the adapters' modules under more than one name ({ways})"
        raise refusal(base.folder, problem, _OTHER_BASE)
    off, on = chosen[0]
    return lambda key: on + key.removeprefix(off)


def _outer(names: Collection[str]) -> list[str]:
    return sorted({f"{name.partition('.')[0]}." for name in names})


def _stored(layout: Layout, key: str, base: Checkpoint) -> LazyTensor:
    if key in base.tensors:
        return base.tensors[key]
    module = f"module {layout.name!r}"
    stem = key.removesuffix("weight")
    inside = sorted(k for k in base.tensors if k.startswith(stem))
    if inside:
        problem = f"stores {module} as {inside[0]!r}, not as {key!r}: it is quantized or changed"
        raise refusal(base.folder, problem, "give the base in float32, float16 or bfloat16")
    raise refusal(base.folder, f"has no {key!r} for {module}", _OTHER_BASE)


def _turned(layout: Layout, key: str, tensor: LazyTensor, target: Target, base: Checkpoint) -> bool:
    """Whether the weight is stored as [n, m].

    PEFT states `fan_in_fan_out` once, but sets it by the type of each layer: a model with Conv1D
    and Linear modules is told apart by their shapes.
    """
    own = base.tensors.get(key, tensor)
    if own.dtype not in FLOATS:
        name = str(own.dtype).removeprefix("torch.")
        problem = f"stores {key!r} of module {layout.name!r} as {name}: it is quantized"
        raise refusal(base.folder, problem, "give the base in float32, float16 or bfloat16")
    stated = weights.is_turned(layout, target)
    for turned in (stated, not stated) if layout.kind == "linear" else (stated,):
        if weights.stored_shape(layout, turned) == tensor.shape:
            return turned
    expected = list(weights.stored_shape(layout, stated))
    problem = f"stores {key!r} as {list(tensor.shape)}, module {layout.name!r} needs {expected}"
    resized = is_token_layout(layout, base) and tensor.shape[1:] == tuple(expected[1:])
    raise refusal(base.folder, problem, _RESIZED if resized else _OTHER_BASE)


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
