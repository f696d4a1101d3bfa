"""Adapters of language models with a fused module, and of others with its parts in its place.

language.json: what one class of a model has (Phi-3, Phi-4 and GLM-4 in transformers), and what the
classes of Llama's kind have, in the order of its rows; parts with one letter have as many each.
Experts that are matrices of a parameter in some adapters and modules in others become modules.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ...adapters import Adapter, Module
from ...adapters.names import EXPERT
from ...errors import AdapterError
from .experts import FAMILIES, ways
from .models import Piece
from .split import Split, split

__all__ = ["parted"]

_NUMBER = re.compile(r"\.\d+$")

Sizes = Mapping[str, int]
"""Outputs of modules by name."""


def parted(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str]]:
    """The adapters with fused modules split that others have in parts, and what is to be said of
    that. Sizes are those of the parts. AdapterError where they do not fit."""
    cuts = _fused(adapters) | _experts(adapters)
    if not cuts:
        return list(adapters), []
    sizes = {n: x.b_shape[0] for a in adapters for n, x in a.modules.items()}
    ends = dict.fromkeys(_NUMBER.sub("", name).rpartition(".")[2] for name in cuts)
    into = dict.fromkeys(part.rpartition(".")[2] for parts in cuts.values() for part in parts)
    note = (
        f"{' and '.join(ends)} of some adapters split into {', '.join(into)}, as others have them"
    )
    return [_split(adapter, cuts, sizes) for adapter in adapters], [note]


def _fused(adapters: Sequence[Adapter]) -> dict[str, dict[str, str]]:
    """The parts of all fused modules of which some adapter has any."""
    every = [a.names for k, a in enumerate(adapters) if not k or a.names != adapters[0].names]
    text = "\n".join([*itertools.chain(*every), ""])
    if not any(f"{end}\n" in text for end in _ends()):  # told of all names at once
        return {}
    names = dict.fromkeys(itertools.chain(*every))
    return {n: parts for n in names if n.endswith(_ends()) and (parts := _parts_of(n, names))}


def _experts(adapters: Sequence[Adapter]) -> dict[str, dict[str, str]]:
    """The parts of all matrices of parameters whose experts some adapter has as modules."""
    pieces = {name: x for adapter in adapters for name, x in adapter.pieces.items()}
    if not pieces:
        return {}
    owners: dict[str, set[str]] = {}
    for name, module in ((n, x) for adapter in adapters for n, x in adapter.modules.items()):
        if not module.slice and (found := EXPERT.fullmatch(name)):
            owners.setdefault(found[1], set()).add(found[2])
    return {n: parts for n, x in pieces.items() if (parts := _parts_of_expert(x, owners))}


def _parts_of_expert(module: Module, owners: Mapping[str, Collection[str]]) -> dict[str, str]:
    index = module.name.rpartition(".")[2]
    for owner, names in ways(module.parameter):
        family = next(f for f in FAMILIES if names in f.values())
        if any(name in owners.get(owner, ()) for parts in family.values() for name in parts):
            return {f"{owner}.{index}.{name}": "u" for name in names}
    return {}


def _parts_of(name: str, names: Collection[str]) -> dict[str, str]:
    """The parts of a fused module and the letters of their sizes, if there are any of them."""
    for fused, parts in _rows().items():
        if f".{name}".endswith(f".{fused}"):
            stem = name[: len(name) - len(fused)]
            found = {stem + part: letter for part, letter in parts.items()}
            return found if any(part in names for part in found) else {}
    return {}


@functools.cache
def _ends() -> tuple[str, ...]:
    """How the names of fused modules end, and hardly any others."""
    return tuple(_rows())


@functools.cache
def _rows() -> dict[str, dict[str, str]]:
    return json.loads((Path(__file__).parent / "language.json").read_text("utf-8"))


def _split(adapter: Adapter, cuts: Mapping[str, Mapping[str, str]], sizes: Sizes) -> Adapter:
    if not cuts.keys() & adapter.modules.keys():
        return adapter
    found: dict[str, Split] = {}
    for name, module in adapter.modules.items():
        if name in cuts:
            module = dataclasses.replace(module, slice=None)
        into = _pieces(adapter, module, cuts[name], sizes) if name in cuts else [_whole(module)]
        for part in split(module, adapter.stored[name], into):
            if found.setdefault(part[0].name, part) is not part:
                problem = "is in this adapter twice, by itself and in a fused module"
                raise AdapterError(adapter.name, part[0].name, problem, "leave one of them out")
    return dataclasses.replace(
        adapter,
        config=dataclasses.replace(
            adapter.config, target_modules=None, exclude_modules=None, target_parameters=None
        ),
        modules=dict(sorted(((n, m) for n, (m, _) in found.items()), key=lambda x: x[1].place)),
        stored={name: pair for name, (_, pair) in found.items()},
    )


def _whole(module: Module) -> Piece:
    return Piece(module.name, 0, module.m)


def _pieces(
    adapter: Adapter, module: Module, parts: Mapping[str, str], sizes: Sizes
) -> list[Piece]:
    """The fused module's parts by their sizes in other adapters; one size that none has is what is
    left."""
    known = {letter: sizes[part] for part, letter in parts.items() if part in sizes}
    letters = [*parts.values()]
    lacking = [letter for letter in letters if letter not in known]
    if lacking:
        left = module.m - sum(known[letter] for letter in letters if letter in known)
        known |= dict.fromkeys(lacking, left // len(lacking))
    if sum(known[letter] for letter in letters) != module.m or min(known.values()) < 1:
        several = ", ".join(f"{part.rpartition('.')[2]} {known[x]}" for part, x in parts.items())
        problem = f"has {module.m} outputs, which are not those of its parts ({several})"
        raise AdapterError(adapter.name, module.name, problem, "merge adapters of one base model")
    return list(_placed(parts, known))


def _placed(parts: Mapping[str, str], known: Mapping[str, int]) -> Iterator[Piece]:
    start = 0
    for part, letter in parts.items():
        yield Piece(part, start, start + known[letter])
        start += known[letter]
