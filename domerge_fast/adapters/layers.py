"""The lists of layers that adapters have modules in, and whether these are of one model."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NoReturn

from ..errors import AdapterError
from .adapter import Adapter
from .names import PREFIX
from .stems import Core, core_of, split

__all__ = ["Rests", "Trees", "check_layers", "check_parts", "children_of", "trees_of"]

Signature = tuple[object, ...]
"""Of a module or tensor: two of one name have the same."""

Rests = dict[str, Signature]
Trees = dict[Core, dict[str, Rests]]
"""All that an adapter has, by stem. A name without a number is a stem of its own, with one rest,
""."""

_STACKS = {"encoder", "decoder"}
_LAYERS = {"layers", "layer", "h", "block", "blocks"}
_PARTS = ("Audio", "Text", "Vision")
_ATTENTION = {"self_attn", "attn", "attention", "self_attention"}
_IN_LAYERS = _ATTENTION | {"mlp", "feed_forward", "block_sparse_moe"}


def trees_of(adapter: Adapter) -> Trees:
    """From modules and tensors saved whole."""
    rests: dict[str, Rests] = {}
    for name, module in adapter.modules.items():
        stem, rest = split(name)
        rests.setdefault(stem, {})[rest] = module.layer
    for key in adapter.carried:
        stem, rest = split(key.removeprefix(PREFIX))
        rests.setdefault(stem, {})[rest] = ("whole",)
    for name in adapter.changed:
        stem, rest = split(name)
        rests.setdefault(stem, {}).setdefault(rest, ("changed",))
    found: Trees = {}
    for stem, signatures in rests.items():
        found.setdefault(core_of(stem), {})[stem] = signatures
    return found


def children_of(rests: Collection[str]) -> set[str]:
    """What every layer has directly inside."""
    return {rest.partition(".")[2].partition(".")[0] for rest in rests}


def check_parts(adapters: Sequence[Adapter]) -> None:
    """AdapterError for adapters of two parts of a model, each saved from a class of its part alone,
    which has the same names as that of the other."""
    parts = [_part(adapter) for adapter in adapters]
    if not any(parts):
        return
    owners: dict[Core, tuple[str, int]] = {}
    for i, adapter in enumerate(adapters):
        for core, stems in trees_of(adapter).items():
            stem = next(iter(stems))
            part = "Text" if "text_model" in stem.split(".") else parts[i]
            theirs, k = owners.setdefault(core, (part, i)) if part else (part, i)
            if theirs != part:
                problem = f"its {stem!r} is of the model's {part.lower()} part, that of adapter "
                problem += f"{adapters[k].name!r} of its {theirs.lower()} part"
                raise AdapterError(adapter.name, None, problem, "merge them apart")


def _part(adapter: Adapter) -> str:
    """The part of a model that an adapter's class is of alone, by its name; "" if that says none or
    several."""
    name = (adapter.config.auto_mapping or {}).get("base_model_class")
    if not name:
        return ""
    found = set(_PARTS).intersection(re.findall("[A-Z][a-z0-9_]*", name))
    return found.pop() if len(found) == 1 else ""


def check_layers(adapters: Sequence[Adapter], trees: Sequence[Trees]) -> None:
    """AdapterError for layers of different models: other lists of layers, or other attention."""
    seen: dict[tuple[str, str], tuple[str, Adapter]] = {}  # (stack, list) -> stem, owner
    kinds: dict[tuple[str, str], tuple[str, Adapter]] = {}  # their attention
    for adapter, found in zip(adapters, trees):
        own = {
            (core[0] if len(core) > 1 else "", core[-1]): (stem, children_of(rests))
            for core, stems in found.items()
            if {*core[:-1]} <= _STACKS and core[-1] in _LAYERS
            for stem, rests in stems.items()
            if children_of(rests) & _IN_LAYERS
        }
        for (stack, layers), (stem, children) in own.items():
            if seen and not own.keys() & seen.keys():
                for (other, _), (their_stem, owner) in seen.items():
                    if {stack, other} != _STACKS:
                        _refuse_layers(adapter, f"{stem}.N", owner, f"{their_stem}.N")
            for word in children & _ATTENTION:
                place = f"{stem}.N.{word}"
                theirs, owner = kinds.setdefault((stack, layers), (place, adapter))
                if theirs.rpartition(".")[2] not in children:
                    _refuse_layers(adapter, place, owner, theirs)
        for key, (stem, _) in own.items():
            seen.setdefault(key, (stem, adapter))


def _refuse_layers(adapter: Adapter, stem: str, owner: Adapter, other: str) -> NoReturn:
    problem = f"its layers are {stem!r}, those of adapter {owner.name!r} are {other!r}, "
    problem += "and not both name their base model"
    remedy = "merge adapters of one base, or say base_model=... if they are parts of one"
    raise AdapterError(adapter.name, None, problem, remedy)
