"""Parameters that PEFT adapts as they are (`target_parameters`): the experts of an MoE layer.

Models of transformers 5 hold the weights of a layer's E experts in one parameter of three
dimensions. Its factors are A [r E, n], r rows an expert, and B [m, r E], in whose columns the
experts of one rank row stand together (`ParamWrapper` of peft 0.21):

    ΔW_e = Σ_j B[:, j E + e] A[e r + j, :]

Here every expert is a module, "<parameter>.<e>". A parameter that is a matrix has E = 1.

Of several parameters of one module the wrappers lie in each other, in the order in which the module
registers them: the last one's is the outermost and has the module's own path, every other has one
`.base_layer` more. A file does not say which is which; the names that transformers (5.24) and its
models' code give experts all agree on one order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...adapters.adapter import Module, Slice
from ...errors import AdapterError
from ...storage.lazy import Columns, LazyTensor
from ...storage.safetensors_file import block

__all__ = ["BASE", "Wrapped", "Wrappers", "expanded", "in_config", "order", "owner_of"]

BASE = ".base_layer"
WEIGHT = ".weight"
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj"), ("w1", "v1", "w2")
"""As modules register them; those of one group are together in one module."""

_RANKS = "correct r or rank_pattern in adapter_config.json"

_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"

Pair = tuple[LazyTensor, LazyTensor]


@dataclass(frozen=True)
class Wrapped:
    """The parameter of a wrapper, the rank r of its factors, and how many wrappers are around."""

    parameter: str
    rank: int
    depth: int


Wrappers = Callable[[Mapping[str, int]], Mapping[str, Wrapped]]
"""From the rows of A by path to those paths that are wrappers of parameters."""


def owner_of(parameter: str) -> str:
    """The module that has a parameter."""
    return parameter.rpartition(".")[0]


def order(parameters: Sequence[str]) -> list[str] | None:
    """Parameters of one module as it registers them; None where that is not known."""
    if len(parameters) == 1:
        return [*parameters]
    last = {p.rpartition(".")[2]: p for p in parameters}
    for known in _ORDER:
        if last.keys() <= set(known):
            return [last[name] for name in known if name in last]
    return None


def in_config(adapter: str, targets: Sequence[str], rank_of: Callable[[str], int]) -> Wrappers:
    """The wrappers of an adapter by the `target_parameters` of its config. rank_of: what the config
    says of a module or parameter. AdapterError where they do not say what a wrapper adapts."""

    heads: dict[str, set[str]] = {}
    for target in targets:
        head, _, last = target.rpartition(".")
        heads.setdefault(head, set()).add(last)

    def wrappers(rows: Mapping[str, int]) -> dict[str, Wrapped]:
        found: dict[str, Wrapped] = {}
        for owner, paths in _owners(adapter, rows).items():
            exact, any_owner = _named(owner, heads), heads.get("", set())
            if not exact and len(paths) == 1 and (not any_owner or rows[owner] == rank_of(owner)):
                continue  # a module as others
            names = exact if len(exact) == len(paths) else exact | any_owner
            own = [*reversed(_ordered(adapter, owner, names, len(paths)))]
            for depth, (path, name) in enumerate(zip(paths, own)):
                found[path] = Wrapped(name, rank_of(name), depth)
            counts = {found[path].parameter: rows[path] / found[path].rank for path in paths}
            _check_counts(adapter, owner, counts)
        return found

    return wrappers


def _named(owner: str, heads: Mapping[str, set[str]]) -> set[str]:
    """What the config calls the parameters of a module, by the end of its name. heads: what comes
    before the last names in `target_parameters`, with these."""
    found = set(heads.get(owner, ()))
    while "." in owner:
        owner = owner.partition(".")[2]
        found |= heads.get(owner, set())
    return found


def _check_counts(adapter: str, owner: str, counts: Mapping[str, float]) -> None:
    """AdapterError unless all parameters of a module have as many experts. counts: of those."""
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        told = ", ".join(f"{n.rpartition('.')[2]} {c:g}" for n, c in sorted(several.items()))
        problem = f"its parameters have different numbers of experts by their ranks ({told})"
        raise AdapterError(adapter, owner, problem, _RANKS)


def _owners(adapter: str, paths: Collection[str]) -> dict[str, list[str]]:
    """The paths of the wrappers around every module, from the outermost on. AdapterError where one
    lacks."""
    found: dict[str, set[str]] = {}
    for path in paths:
        owner = path
        while owner.endswith(BASE):
            owner = owner.removesuffix(BASE)
        found.setdefault(owner, set()).add(path)
    nested = {owner: _nested(owner, len(own)) for owner, own in found.items()}
    for owner, own in nested.items():
        if lacking := [path for path in own if path not in found[owner]]:
            problem = f"has no factors of the wrapper {lacking[0]!r}, which others are in"
            raise AdapterError(adapter, owner, problem, _SAVE_AGAIN)
    return nested


def _nested(owner: str, count: int) -> list[str]:
    return [f"{owner}{depth * BASE}" for depth in range(count)]


def _ordered(adapter: str, owner: str, names: Collection[str], count: int) -> list[str]:
    """The parameters that so many wrappers around a module adapt, as it registers them. names: what
    the config calls those that it may have."""
    told = ", ".join(sorted(names))
    if len(names) != count:
        problem = f"has {count} wrappers, target_parameters names {len(names)} ({told or 'none'})"
        remedy = "name its parameters in full in target_parameters, in adapter_config.json"
        raise AdapterError(adapter, owner, problem, remedy)
    if (found := order([f"{owner}.{name}" for name in names])) is None:
        problem = f"adapts {told} of one module, whose order no file says"
        remedy = "load it into its model, and merge it by from_model"
        raise AdapterError(adapter, owner, problem, remedy)
    return found


def expanded(
    adapter: str, whole: Module, pair: Pair, wrapped: Wrapped
) -> Iterator[tuple[Module, Pair]]:
    """The modules of a parameter with factors A [r E, n] and B [m, r E]. whole: those as if they
    were one module's."""
    (a, b), rank = pair, wrapped.rank
    rows, n = whole.a_shape
    if rows % rank:
        problem = f"its factors have {rows} rank rows, no multiple of the rank {rank} of an expert"
        raise AdapterError(adapter, whole.name, problem, _RANKS)
    count = rows // rank
    if count == 1 and whole.name.endswith(WEIGHT):
        name = whole.name.removesuffix(WEIGHT)
        yield dataclasses.replace(whole, name=name, slice=Slice(None, 1, wrapped.depth)), pair
        return
    own = dataclasses.replace(whole, a_shape=(rank, n), b_shape=(whole.m, rank), rank=rank)
    for e in range(count):
        piece = Slice(e, count, wrapped.depth)
        module = dataclasses.replace(own, name=f"{whole.name}.{e}", slice=piece)
        yield module, (block(a, e * rank, (e + 1) * rank), Columns(b, e, count))
