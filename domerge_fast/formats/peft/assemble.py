"""The one way from named tensors to an Adapter: every check of keys, shapes and dtypes is here.

Of the factors only what tells padding is read; dtypes and shapes are enough for the rest.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ...adapters.adapter import Adapter, AdapterConfig, Kind, Module, without_paths
from ...adapters.names import PREFIX, Spelling, is_of_tokens, is_saved
from ...errors import AdapterError, is_text
from ...storage.input_file import InputFile
from ...storage.lazy import LazyTensor, dtype_name
from .. import foreign
from .beside import INDICES, Beside
from .padding import unpadded_ranks
from .parameters import Wrapped, Wrappers, expanded

__all__ = ["assemble", "check_dtype"]

# A live model, and what consolidates its shards, have the adapter's name after the side.
_FACTOR = re.compile(
    r"(.+)\.lora_(?:([AB])(?:\.(.+))?\.weight"
    r"|embedding_([AB])(?:\.((?!weight$|bias$).+))?)"
)
# Of an embedding in modules_to_save that PEFT saves along because it was resized: all that its
# wrapper holds, the trained weight twice.
_INNER = re.compile(r"(.+\.)(original_module|modules_to_save)\.(weight|bias)")
_SAVED = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")
# What PEFT saves of the base model beside its own tensors: the input and output embeddings, under
# the names that transformers models give them.
_COPY = re.compile(r"(?:.+\.)?base_layer\.(?:weight|bias)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
_GATHER = "gather ZeRO-3 or FSDP shards before save_pretrained"

Sides = dict[str, tuple[str, LazyTensor]]  # "A" or "B" -> (whole key, tensor)


def assemble(
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, LazyTensor],
    scaling: Callable[[str, int], float],
    inputs: tuple[InputFile, ...] = (),
    wrappers: Wrappers | None = None,
) -> Adapter:
    """An Adapter of tensors under the keys PEFT writes, with or without its prefix.

    ``scaling`` maps (module, rank) to the factor in front of B @ A; ``wrappers`` tells which
    modules are parameters (parameters.py). Raises AdapterError for any tensor that is not part of a
    plain LoRA and for factors that do not fit each other.
    """
    spell = Spelling(tensors)
    beside = Beside(name)
    factors, carried, originals = _sort_tensors(name, config, tensors, spell, beside)
    modules: dict[str, Module] = {}
    stored: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    sizes = ((path, sides["A"][1].shape) for path, sides in factors.items() if "A" in sides)
    rows = {path: shape[0] for path, shape in sizes if shape}
    bare = wrappers(rows) if wrappers else {}
    for path, sides in sorted(factors.items()):
        path = sys.intern(path)  # one text for all adapters: they are compared name by name
        for module, pair in _modules(name, path, sides, scaling, bare.get(path)):
            if module.name in modules:
                problem = "is adapted twice, by itself and by its parameter"
                raise AdapterError(name, module.name, problem, _SAVE_AGAIN)
            modules[module.name], stored[module.name] = module, pair
    modules = dict(sorted(modules.items(), key=lambda item: item[1].place))
    if not modules:
        problem = "has no LoRA factors"
        raise AdapterError(name, None, problem, "leave it out, or check its target_modules")
    for padded, rank in unpadded_ranks(stored).items():
        modules[padded] = _of_rank(modules[padded], rank)
    removed = tuple(spell.removed(tensors))
    if removed:
        config = without_paths(config)
    return Adapter(
        name,
        config,
        modules,
        carried,
        stored,
        inputs,
        removed,
        originals | beside.originals(),
        differences=beside.differences(modules, bool(config.raw.get("lora_bias"))),
        magnitudes=beside.magnitudes_of(modules, bool(config.raw.get("use_dora"))),
        token_rows=beside.token_rows(config.raw.get(INDICES)),
    )


def _sort_tensors(
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, LazyTensor],
    spell: Spelling,
    beside: Beside,
) -> tuple[dict[str, Sides], dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The factors, what is saved whole, and what of that was before training; what PEFT stores
    otherwise goes to `beside`."""
    owners = beside.owners  # names of adapters in keys, and the first key of each
    factors, others = _factors(name, tensors, spell, owners)
    others = {key: x for key, x in others.items() if not beside.take(spell(key), x)}
    carried, originals = _carried(name, config.modules_to_save or (), others, spell, owners)
    if len(owners) > 1:
        (one, key), (other, other_key) = list(owners.items())[:2]
        problem = f"holds adapters {one!r} and {other!r} in one file ({key!r}, {other_key!r})"
        raise AdapterError(name, None, problem, "save each to a folder of its own")
    return factors, carried, originals


def _factors(
    name: str, tensors: Mapping[str, LazyTensor], spell: Spelling, owners: dict[str, str]
) -> tuple[dict[str, Sides], dict[str, LazyTensor]]:
    """Both sides of every module; and all other tensors."""
    factors: dict[str, Sides] = {}
    others: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        if not is_text(key):
            problem = f"tensor {key!r} has a name that no file can hold"
            raise AdapterError(name, None, problem, "give it another, in Unicode")
        if not (match := _FACTOR.fullmatch(spell(key))):
            others[key] = tensor
            continue
        module, one, owner, side, other_owner = match.groups()
        sides, side = factors.setdefault(module, {}), one or side
        if side in sides:
            problem = f"stores factor {side} twice, as {sides[side][0]!r} and {key!r}"
            raise AdapterError(name, module, problem, _SAVE_AGAIN)
        sides[side] = key, tensor
        if owner := owner or other_owner:
            owners.setdefault(owner, key)
    return factors, others


def _carried(
    name: str,
    saved_names: Sequence[str],
    others: Mapping[str, LazyTensor],
    spell: Spelling,
    owners: dict[str, str],
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """What is saved whole, by the keys PEFT writes, and what of that was before training."""
    carried: dict[str, str] = {}
    originals: dict[str, LazyTensor] = {}
    paths = {spell(key) for key in others}
    for key, tensor in others.items():
        path = spell(key)
        if (inner := _INNER.fullmatch(path)) and _is_carried(inner[1] + inner[3], saved_names):
            path = inner[1] + inner[3]
            if inner[2] == "original_module":
                originals[path] = tensor
            if inner[2] == "original_module" or path in paths:
                continue
        elif saved := _SAVED.fullmatch(path):
            path = f"{saved[1]}.{saved[3]}"
            owners.setdefault(saved[2], key)
        elif ".lora_" in path or not _is_carried(path, saved_names):
            raise _unknown(name, path)
        first = carried.setdefault(path, key)
        if first != key:
            problem = f"stores {path!r} twice, as {first!r} and {key!r}"
            raise AdapterError(name, None, problem, _SAVE_AGAIN)
        if 0 in tensor.shape:
            problem = f"stores {path!r} whole but empty (shape {list(tensor.shape)})"
            raise AdapterError(name, None, problem, _GATHER)
    whole = {PREFIX + path: others[key] for path, key in carried.items()}
    return whole, {path: x for path, x in originals.items() if PREFIX + path in whole}


def _is_carried(path: str, modules_to_save: Sequence[str]) -> bool:
    return bool(is_of_tokens(path) or _COPY.fullmatch(path)) or is_saved(path, modules_to_save)


def _unknown(name: str, path: str) -> AdapterError:
    module, _, tensor = path.partition(".lora_")
    if told := foreign.of_key(path):
        problem, remedy = f"{told[0]}, by its tensor {path!r}", told[1]
    else:
        problem, remedy = f"unknown tensor {path!r}", _SAVE_AGAIN + ", as a plain LoRA"
    return AdapterError(name, module if tensor else None, problem, remedy)


def _modules(
    adapter: str,
    path: str,
    sides: Sides,
    scaling: Callable[[str, int], float],
    wrapped: Wrapped | None,
) -> Iterable[tuple[Module, tuple[LazyTensor, LazyTensor]]]:
    """What a pair of factors adapts: a module, or a parameter's matrices."""
    if wrapped is None:
        module = _module(adapter, path, sides, scaling)
        return [(module, (sides["A"][1], sides["B"][1]))]
    rank = wrapped.rank
    whole = _module(adapter, wrapped.parameter, sides, lambda name, _: scaling(name, rank))
    if whole.kind != "linear" or len(whole.a_shape) != 2:
        problem = f"is a parameter that is adapted as a {whole.kind}"
        raise AdapterError(adapter, whole.name, problem, _SAVE_AGAIN)
    return expanded(adapter, whole, (sides["A"][1], sides["B"][1]), wrapped)


def _module(adapter: str, name: str, sides: Sides, scaling: Callable[[str, int], float]) -> Module:
    if len(sides) < 2:
        present = next(iter(sides))
        missing = "B" if present == "A" else "A"
        raise AdapterError(adapter, name, f"has factor {present} but no {missing}", _SAVE_AGAIN)
    if ".base_layer." in f".{name}.":
        problem = "is wrapped by another LoRA layer, and no parameter of target_parameters"
        remedy = "correct target_parameters in adapter_config.json, or train it without "
        raise AdapterError(adapter, name, problem, f"{remedy}nn.MultiheadAttention")
    (key, a), (key_b, b) = sides["A"], sides["B"]
    kind = _kind(key, a.shape)
    if (".lora_embedding_B" in key_b) != (kind == "embedding"):
        raise AdapterError(adapter, name, f"mixes {key!r} with {key_b!r}", _SAVE_AGAIN)
    for side, tensor in (("A", a), ("B", b)):
        check_dtype(adapter, name, f"factor {side}", tensor.dtype)
    problem_and_remedy = _shape_problem(kind, a.shape, b.shape)
    if problem_and_remedy or kind is None:
        problem, remedy = problem_and_remedy or ("has factors of no known layer", _SAVE_AGAIN)
        raise AdapterError(adapter, name, problem, remedy)
    rank = a.shape[0]  # as stored: it is what the scaling goes by
    dtype = torch.promote_types(a.dtype, b.dtype)
    factor = scaling(name, rank)
    if factor == 0 or not math.isfinite(factor):
        problem = f"has scaling {factor:g} (lora_alpha or alpha_pattern, over the rank)"
        remedy = "correct alpha or scaling, or leave the adapter out: its update would be lost"
        raise AdapterError(adapter, name, problem, remedy)
    return Module(name, kind, a.shape, b.shape, rank, factor, dtype)


def _of_rank(module: Module, rank: int) -> Module:
    m, _, *ones = module.b_shape
    a_shape = (rank, *module.a_shape[1:])
    return dataclasses.replace(module, a_shape=a_shape, b_shape=(m, rank, *ones), rank=rank)


def _kind(key: str, a_shape: tuple[int, ...]) -> Kind | None:
    if ".lora_embedding_A" in key:
        return "embedding"
    kinds: dict[int, Kind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
    return kinds.get(len(a_shape))


def check_dtype(adapter: str, module: str, what: str, dtype: torch.dtype) -> None:
    """AdapterError for a dtype that no factor may have. what: the tensor, as messages call it."""
    if dtype in _FLOATS:
        return
    remedy = "dequantize the adapter to float32, float16 or bfloat16"
    if dtype == torch.float64:
        remedy = "cast the adapter to float32"
    problem = f"{what} is {dtype_name(dtype)}"
    raise AdapterError(adapter, module, problem, remedy)


def _shape_problem(
    kind: Kind | None, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[str, str] | None:
    """What is wrong with the stored shapes, and what to do; None if nothing is."""
    if len(a) == len(b) == 2 and a[0] == b[1] and 0 not in a and 0 not in b:
        return None
    shapes = f"A {list(a)}, B {list(b)}"
    if len(a) < 2 or len(b) < 2 or 0 in a or 0 in b:
        return f"has an empty factor or one that is no matrix ({shapes})", _GATHER
    if len(a) != len(b) or set(b[2:]) - {1} or (kind == "embedding" and len(a) > 2):
        return f"has shapes of different layers ({shapes})", _SAVE_AGAIN
    if a[0] == b[1]:
        return None
    if len(a) > 2 and a[0] % b[1] == 0:
        remedy = "leave grouped convolutions out of target_modules"
        return f"adapts a convolution in {a[0] // b[1]} groups ({shapes})", remedy
    return f"has factors of different rank ({shapes})", _SAVE_AGAIN
