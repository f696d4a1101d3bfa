"""Where merged modules lie in a base model: names, shapes, orientation, and what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from ..adapters import LazyTensor
from ..adapters.assemble import is_of_tokens
from ..adapters.lazy import in_step
from ..adapters.names import PREFIX
from ..merged import Layout, Target
from . import weights
from .checkpoint import Checkpoint, refusal

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TOKENS = re.compile(
    r"(?:.+\.)?(?:embed_tokens|wte|word_embeddings|embed_in|shared|lm_head|embed_out)"
)
_OTHER_BASE = "give the base model the adapters were trained on, or write an adapter"
_UNTIE = "save the base with two weights and tie_word_embeddings=false, or write an adapter"


@dataclass(frozen=True)
class Place:
    """The weight of a merged module: its name in the base, and whether it is stored as [n, m]."""

    key: str
    turned: bool


@dataclass(frozen=True)
class Fit:
    """places: by merged module. replaced: what adapters saved whole, by its name in the base."""

    places: Mapping[str, Place]
    replaced: Mapping[str, LazyTensor]


def fit(target: Target, base: Checkpoint) -> Fit:
    """OptionError, in one line, unless every merged module and saved tensor has its place."""
    weights.check_no_replication(target)
    rename = _renaming([f"{name}.weight" for name in target.layouts], base)
    places = {}
    for layout in target.layouts.values():
        key = rename(f"{layout.name}.weight")
        _check_present(layout, key, base)
        places[layout.name] = Place(key, _turned(layout, key, target, base))
    _check_squares(target, places, base)
    replaced = {}
    for path, tensor in target.carried.items():
        key = rename(path.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base.is_tied and _is_token_weight(key):
            _check_unchanged(key, tensor, base)
        else:
            _check_replaceable(key, tensor, base)
            replaced[key] = tensor
    return Fit(places, replaced)


def originals(names: Collection[str], base: Checkpoint) -> Callable[[str], LazyTensor | None]:
    """From parameter names of the adapted model, with these adapted modules, to the base's weights;
    a head that is not stored because it is tied is the embedding. OptionError, when a weight is
    asked for, unless the base has the modules."""
    rename = _renaming([f"{name}.weight" for name in names], base)
    tokens = [key for key in base.tensors if is_of_tokens(key)]

    def origin(path: str) -> LazyTensor | None:
        for name in names:
            if rename(f"{name}.weight") not in base.tensors and not is_of_tokens(f"{name}.weight"):
                problem = f"has no {rename(f'{name}.weight')!r} for module {name!r}"
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


def _check_present(layout: Layout, key: str, base: Checkpoint) -> None:
    module = f"module {layout.name!r}"
    if base.is_tied and _is_of_tokens(layout, base):
        problem = f"may tie the weight of {module} to another (tie_word_embeddings in config.json)"
        raise refusal(base.folder, problem, _UNTIE)
    if key in base.tensors:
        return
    stem = key.removesuffix("weight")
    inside = sorted(k for k in base.tensors if k.startswith(stem))
    if inside:
        problem = f"stores {module} as {inside[0]!r}, not as {key!r}: it is quantized or changed"
        raise refusal(base.folder, problem, "give the base in float32, float16 or bfloat16")
    raise refusal(base.folder, f"has no {key!r} for {module}", _OTHER_BASE)


def _is_of_tokens(layout: Layout, base: Checkpoint) -> bool:
    embeds = layout.kind == "embedding" and layout.inputs == (base.config.get("vocab_size"),)
    return embeds or _TOKENS.fullmatch(layout.name) is not None


def _turned(layout: Layout, key: str, target: Target, base: Checkpoint) -> bool:
    """Whether the weight is stored as [n, m].

    PEFT states `fan_in_fan_out` once, but sets it by the type of each layer: a model with Conv1D
    and Linear modules is told apart by their shapes.
    """
    tensor = base.tensors[key]
    if tensor.dtype not in _FLOATS:
        name = str(tensor.dtype).removeprefix("torch.")
        problem = f"stores {key!r} of module {layout.name!r} as {name}: it is quantized"
        raise refusal(base.folder, problem, "give the base in float32, float16 or bfloat16")
    stated = weights.is_turned(layout, target)
    for turned in (stated, not stated) if layout.kind == "linear" else (stated,):
        if weights.stored_shape(layout, turned) == tensor.shape:
            return turned
    expected = list(weights.stored_shape(layout, stated))
    problem = f"stores {key!r} as {list(tensor.shape)}, module {layout.name!r} needs {expected}"
    raise refusal(base.folder, problem, _OTHER_BASE)


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


def _check_unchanged(key: str, tensor: LazyTensor, base: Checkpoint) -> None:
    """OptionError unless a tensor saved whole is the base's, under one of its tied names."""
    if not any(_equal(tensor, k, base) for k in base.tensors if _is_token_weight(k)):
        problem = f"may tie {key!r}, which the adapters save whole, to another weight"
        raise refusal(base.folder, problem, _UNTIE)


def _is_token_weight(key: str) -> bool:
    return _TOKENS.fullmatch(key.removesuffix(".weight")) is not None


def _equal(tensor: LazyTensor, key: str, base: Checkpoint) -> bool:
    if tensor.shape != base.tensors[key].shape:
        return False
    own = base.tensors[key]
    return all(torch.equal(x.cpu().to(y.dtype), y) for x, y in in_step([tensor, own]))


def _check_replaceable(key: str, tensor: LazyTensor, base: Checkpoint) -> None:
    if key not in base.tensors:
        problem = f"has no {key!r}, which the adapters save whole"
        remedy = "load the base as the class that was trained and save it, or write an adapter"
        raise refusal(base.folder, problem, remedy)
    own = base.tensors[key]
    floats = tensor.dtype in _FLOATS and own.dtype in _FLOATS
    if tensor.shape != own.shape or not (floats or tensor.dtype == own.dtype):
        problem = (
            f"stores {key!r} as {_described(own)}, the adapters save it as {_described(tensor)}"
        )
        remedy = "resize the base as for training and save it, or write an adapter"
        raise refusal(base.folder, problem, remedy)


def _described(tensor: LazyTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
