"""Reads a LoRA that is one safetensors file: pairs its keys, and finds the scale of every module.

Of the tensors only the alphas are read, and what tells padding.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...adapters.adapter import Adapter, AdapterConfig, Module
from ...adapters.names import PREFIX, Spelling
from ...adapters.style import Style
from ...errors import AdapterError
from ...storage.garbage import uncollected
from ...storage.lazy import LazyTensor
from ...storage.safetensors_file import FileTensor, SafetensorsFile
from .. import foreign
from ..peft.assemble import assemble
from . import beside, lycoris, metadata
from .grammar import ALPHA, DORA, DOWN, GRAMMARS, KINDS, KOHYA, UP, names_of, split
from .scales import scales
from .shapes import factors, magnitude

__all__ = ["OF_DIFFUSERS", "find", "load"]

OF_DIFFUSERS = "pytorch_lora_weights.safetensors"
_SUFFIXES = (".safetensors", ".sft")
_PLAIN = "train or extract it as a plain LoRA"
_AGAIN = "download it again, or save it again with the tool that trained it"

Modules = dict[str, dict[str, tuple[str, FileTensor]]]
"""By name and part: the key and the tensor."""


def find(path: Path) -> Path | None:
    """The file of an adapter that is one: itself, diffusers' in a folder, or the only one in a
    folder without a config."""
    if path.suffix in _SUFFIXES and os.path.isfile(path):
        return path
    if not os.path.isdir(path) or os.path.exists(path / "adapter_config.json"):
        return None
    if os.path.isfile(path / OF_DIFFUSERS):
        return path / OF_DIFFUSERS
    inside = [x for end in _SUFFIXES for x in path.glob(f"*{end}") if os.path.isfile(x)]
    return inside[0] if len(inside) == 1 else None


@uncollected()
def load(path: Path, name: str) -> Adapter:
    """The adapter in a file, or in a folder with one. AdapterError for what is no plain LoRA."""
    refuse = functools.partial(AdapterError, name, None)
    file = SafetensorsFile(find(path) or path, refuse)
    tensors = file.tensors()
    if any(key.startswith(PREFIX) for key in tensors):
        raise refuse("is a file", "give the folder that holds adapter_config.json")
    if metadata.is_dylora(file.metadata):
        raise refuse("is a LyCORIS DyLoRA, whose scale depends on its training", _PLAIN)
    modules, changes, style = _sorted(name, tensors)
    style = dataclasses.replace(style, metadata=metadata.theirs(file.metadata))
    dora = {module: parts.pop(DORA) for module, parts in modules.items() if DORA in parts}
    found, notes = scales(name, file, modules, style)
    named: dict[str, LazyTensor] = {}
    for module, parts in modules.items():
        a, b = factors(name, module, parts)
        named |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    config = AdapterConfig(base_model_name_or_path=metadata.base_model(style.metadata))
    made = assemble(name, config, named, lambda module, _: found[module], (file.input,))
    made = dataclasses.replace(made, modules=dict(_marked(made, modules)), style=style)
    magnitudes = {module: magnitude(made, module, *stored) for module, stored in dora.items()}
    made = dataclasses.replace(made, magnitudes=magnitudes)
    made = dataclasses.replace(made, differences=beside.differences(name, changes))
    return dataclasses.replace(made, notes=(*_told(made, modules), *notes))


def _marked(adapter: Adapter, modules: Modules) -> Iterator[tuple[str, Module]]:
    """The adapter's modules, with those that are no factors in the file."""
    for name, module in adapter.modules.items():
        dense = lycoris.is_one(modules[name]) and lycoris.is_dense(adapter.stored[name])
        yield name, dataclasses.replace(module, dense=True) if dense else module


def _told(adapter: Adapter, modules: Modules) -> Iterator[str]:
    """What is to be said of modules that are no plain LoRA."""
    found = [x for name, x in adapter.modules.items() if lycoris.is_one(modules[name])]
    if thin := [module.rank for module in found if not module.dense]:
        most = max(thin)
        yield f"{len(thin)} modules of LoHa or LoKr are exact factors here, of rank up to {most}"
    if full := len(found) - len(thin):
        yield f"{full} modules have full rank, and so has the merge; --rank cuts it"


def _sorted(name: str, tensors: Mapping[str, FileTensor]) -> tuple[Modules, Modules, Style]:
    """The parts of every module, what else changes, and the spelling that all are in."""
    spell = Spelling(tensors)
    modules: Modules = {}
    changes: Modules = {}
    names: dict[str, str] = {}  # whose they are, and the first key of each
    grammars: dict[str, str] = {}  # of every module
    for key, tensor in tensors.items():
        if not (part := split(spell(key))):
            raise _unknown(name, [key for key in tensors if not split(spell(key))])
        apart = beside.is_beside(part.part, tensor)
        parts = (changes if apart else modules).setdefault(part.module, {})
        if part.part in parts:
            problem = f"stores one factor twice, as {parts[part.part][0]!r} and {key!r}"
            raise AdapterError(name, part.module, problem, _AGAIN)
        parts[part.part] = key, tensor
        if part.part in (ALPHA, DORA):
            continue
        names.setdefault(names_of(part), key)
        if apart:
            continue
        spelling = part.grammar or KINDS[part.part]
        if grammars.setdefault(part.module, spelling) != spelling:
            problem = f"has {key!r} beside {next(iter(parts.values()))[0]!r}: two spellings"
            raise AdapterError(name, part.module, problem, _AGAIN)
    _check_parts(name, modules)
    if len(names) != 1:
        raise _mixed(name, names)
    [kind] = names
    alphas = kind == KOHYA or any(ALPHA in parts for parts in modules.values())
    found = GRAMMARS.keys() & grammars.values()
    grammar = found.pop() if len(found) == 1 else ""
    norms, kinds = beside.norms(changes), frozenset(grammars.values()) - GRAMMARS.keys()
    return modules, changes, Style(kind, kind, grammar, alphas, norms=norms, kinds=kinds)


def _check_parts(name: str, modules: Modules) -> None:
    """Whether every module has all of the parts of one kind."""
    for module, parts in modules.items():
        missing = [part for part in (DOWN, UP) if part not in parts]
        if lycoris.is_one(parts):
            missing = lycoris.missing(parts)
        if missing:
            key = next(iter(parts.values()))[0]
            words = " and no ".join(_WORDS.get(part, part) for part in missing)
            raise AdapterError(name, module, f"has {key!r}, but no {words}", _AGAIN)


_WORDS = {DOWN: "A (lora_down, lora_A)", UP: "B (lora_up, lora_B)"}


def _unknown(name: str, keys: Sequence[str]) -> AdapterError:
    """Of keys that no LoRA has: by the first that tells what it is."""
    for key in keys:
        if told := foreign.of_key(key):
            return AdapterError(name, None, f"{told[0]}, by its tensor {key!r}", told[1])
    problem = f"has the tensor {keys[0]!r}, which is no part of a LoRA that is known here"
    return AdapterError(name, None, problem, "train or save it as a plain LoRA")


def _mixed(name: str, names: Mapping[str, str]) -> AdapterError:
    if not names:
        return AdapterError(name, None, "has no LoRA factors", "leave it out")
    (one, key), (other, other_key) = list(names.items())[:2]
    problem = f"has names of {one!r} ({key!r}) and of {other!r} ({other_key!r}) in one file"
    return AdapterError(name, None, problem, "split it into one file for each")
