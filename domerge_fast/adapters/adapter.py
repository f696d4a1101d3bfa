"""What an adapter is, whatever it was read from."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..storage.buffers import are_row_major
from ..storage.input_file import InputFile
from ..storage.lazy import LazyTensor, MemoryTensor
from ..storage.safetensors_file import group_bytes
from .parts import Parts
from .style import Style

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Alike",
    "Kind",
    "Module",
    "Slice",
    "TokenRows",
    "called",
    "parameter_of",
    "parts_of",
    "without_paths",
]

Kind = Literal["linear", "embedding", "conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True, slots=True)
class Slice:
    """What a module is of a parameter that PEFT adapts as it is, without the module that owns it
    (`target_parameters`): the matrix at `index` of `count`, as the experts of a layer are. index:
    None for a parameter called `weight` that is a matrix itself. depth: how many wrappers are
    around this parameter's, because they adapt others of the same owner."""

    index: int | None
    count: int
    depth: int


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer of an adapter: delta = scaling * B @ A, an [m, n] matrix.

    ``a_shape`` and ``b_shape`` are the stored shapes without padding (see padding.py): [r, n] and
    [m, r]; for convolutions [r, in, k...] and [m, r, 1...], where n = in * k...; for embeddings n
    is the vocabulary and m the dimension (PEFT adds the transpose of delta to the [vocabulary,
    dimension] weight, and likewise for ``fan_in_fan_out`` layers). ``dtype`` holds both stored
    factors without loss. ``slice``: of a parameter without a layer of its own; a matrix of several
    is called by the parameter's name and its number. ``dense``: stored as a matrix or what is as
    large, and no factors of a lower rank than it has.
    """

    name: str
    kind: Kind
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    rank: int
    scaling: float
    dtype: torch.dtype
    slice: Slice | None = None
    dense: bool = False

    @property
    def m(self) -> int:
        return self.b_shape[0]

    @property
    def n(self) -> int:
        return math.prod(self.a_shape[1:])

    @property
    def layer(self) -> tuple[Kind, int, tuple[int, ...], int]:
        """What all adapters of the module have in common: kind, m, the shape of the inputs, and of
        how many matrices its parameter is."""
        count = self.slice.count if self.slice else 1
        return _layer(self.kind, self.b_shape[0], self.a_shape[1:], count)

    @property
    def parameter(self) -> str:
        """The model's name for the parameter that is adapted."""
        return parameter_of(self.name, self.slice)

    @property
    def place(self) -> tuple[str, int]:
        """By what modules are sorted."""
        if self.slice is None or self.slice.index is None:
            return self.name, 0
        return self.parameter, self.slice.index


@functools.lru_cache(maxsize=1 << 10)
def _layer(
    kind: Kind, m: int, inputs: tuple[int, ...], count: int
) -> tuple[Kind, int, tuple[int, ...], int]:
    """One tuple for all modules that are alike: adapters are compared module by module."""
    return kind, m, inputs, count


@dataclass(frozen=True, eq=False, slots=True)
class Alike:
    """What modules of an adapter that are alike have in common; see `Module`."""

    rank: int
    scaling: float
    m: int
    n: int
    dtype: torch.dtype


def parts_of(modules: Mapping[str, Any]) -> Parts:
    """Of what is adapted, by what the model calls it. modules: with what says a slice and the
    parameter of each."""
    return Parts([x.parameter if x.slice else name for name, x in modules.items()])


def parameter_of(name: str, piece: Slice | None) -> str:
    """The parameter that holds a module's weight."""
    numbered = piece is not None and piece.index is not None
    return name.rpartition(".")[0] if numbered else f"{name}.weight"


@dataclass(frozen=True)
class AdapterConfig:
    """What a PEFT config says besides ranks and scaling; names and values are PEFT's own.

    ``raw`` is the whole config as read ({} for an adapter made of plain tensors).
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[list[int]] | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


def without_paths(config: AdapterConfig) -> AdapterConfig:
    """The config of an adapter whose modules are called otherwise than in the model that it was
    saved from: its selection of modules is kept only where it is by their last names."""
    chosen = config.target_modules, config.exclude_modules, config.target_parameters
    for names in (names or [] for names in chosen):
        if isinstance(names, str) or any("." in str(name) for name in names):
            return dataclasses.replace(
                config, target_modules=None, exclude_modules=None, target_parameters=None
            )
    return config


def called(k: int, adapter: Adapter) -> str:
    """The adapter at position k as reports call it: they are published, and tell no whole path."""
    return f"adapter {k + 1} ({os.path.basename(os.path.normpath(adapter.name))})"


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of a parameter [V, d] as they were trained, the others being as they were before. at:
    which, one for each row of `rows` [k, d]."""

    at: tuple[int, ...]
    rows: LazyTensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: its modules, and its factors read on demand.

    ``name`` is what messages call it. ``modules`` is sorted by `Module.place`. ``carried`` holds
    the tensors stored whole (``modules_to_save`` and base embeddings saved along), by the key PEFT
    writes (with its ``base_model.model.`` prefix). ``inputs`` are all files it was read from. Names
    are those of the plain model; ``removed`` are the components that something around it had added
    to them. ``originals`` holds what some of the tensors stored whole were before training, by the
    name of the parameter, where that is known. ``model`` is the live model it was read from.
    ``style`` is how it was stored; None for plain tensors, whose names are the caller's.
    ``notes`` is what is to be said of it where it is merged.
    ``differences`` and ``token_rows`` are what it changes beside them, by the parameters' names:
    only sums take them along (differences.py). ``magnitudes`` are those of a DoRA, by module
    (dora.py): [m] of its outputs, or [1, inputs, 1...].
    """

    name: str
    config: AdapterConfig
    modules: Mapping[str, Module]
    carried: Mapping[str, LazyTensor]
    stored: Mapping[str, tuple[LazyTensor, LazyTensor]] = field(repr=False)
    inputs: tuple[InputFile, ...] = field(default=(), repr=False)
    removed: tuple[str, ...] = ()
    originals: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)
    model: weakref.ref[Any] | None = field(default=None, repr=False)
    style: Style | None = None
    notes: tuple[str, ...] = ()
    differences: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict, repr=False)
    magnitudes: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, n] and B [m, r] of a module: row-major, stored dtype, scaling not applied.

        From a file they are read anew, into memory of their own. KeyError if the adapter has no
        such module; AdapterError if the file has changed since it was loaded.
        """
        a, b = self.stored[name]
        rank = self.modules[name].rank
        if rank < a.shape[0]:
            a_rows, b_columns = a.rows(0, rank), b.read()[:, :rank]
            return a_rows.flatten(1).contiguous(), b_columns.flatten(1).contiguous()
        return a.read().flatten(1).contiguous(), b.read().flatten(1).contiguous()

    @property
    def folder(self) -> Path | None:
        """Where its files are; None for one that was in memory."""
        return self.inputs[0].path.parent if self.inputs else None

    @cached_property
    def names(self) -> list[str]:
        """Of all modules."""
        return [*self.modules]

    @cached_property
    def alike(self) -> tuple[list[Alike], torch.Tensor]:
        """Of modules that are alike, and which of them every module is, [N]."""
        numbers: dict[tuple, int] = {}
        found: list[Alike] = []
        which = []
        for x in self.modules.values():
            key = x.rank, x.scaling, x.a_shape, x.b_shape, x.dtype
            if (number := numbers.get(key)) is None:
                number = numbers[key] = len(found)
                found.append(Alike(x.rank, x.scaling, x.m, x.n, x.dtype))
            which.append(number)
        return found, torch.tensor(which, dtype=torch.int64)

    @cached_property
    def rooms(self) -> list[int]:
        """What every module's factors take of a buffer that they are read into; [] where all are
        `in_place`."""
        if self.in_place:
            return []
        return [group_bytes(self.stored[name]) for name in self.modules]

    @cached_property
    def in_place(self) -> bool:
        """Whether all factors are row-major matrices in memory, which are merged where they lie."""
        return all(isinstance(x, torch.Tensor) for x in self.sides[0][:1])

    @cached_property
    def sides(self) -> tuple[list[Any], list[Any]]:
        """The A's, and the B's, of all modules: tensors where all are `in_place`, else as
        stored."""
        pairs = [self.stored[name] for name in self.modules]
        stored = [a for a, _ in pairs], [b for _, b in pairs]
        tensors = [[x.tensor for x in side if type(x) is MemoryTensor] for side in stored]
        in_place = all(len(own) == len(pairs) and are_row_major(own) for own in tensors)
        return (tensors[0], tensors[1]) if in_place else stored

    @cached_property
    def places(self) -> dict[str, int]:
        """Which module has which of them."""
        return {name: k for k, name in enumerate(self.modules)}

    @cached_property
    def pieces(self) -> dict[str, Module]:
        """The modules that are one of several matrices of a parameter."""
        return {n: x for n, x in self.modules.items() if x.slice and x.slice.index is not None}

    @cached_property
    def layers(self) -> list[tuple]:
        """`Module.layer` of every module."""
        return [module.layer for module in self.modules.values()]

    @cached_property
    def is_sliced(self) -> bool:
        """Whether a module is of a parameter that is adapted as it is."""
        return any(module.slice for module in self.modules.values())

    @cached_property
    def parts(self) -> Parts:
        """Of what is adapted, by what the model calls it."""
        return parts_of(self.modules)

    @property
    def changed(self) -> list[str]:
        """The parameters that it changes by no product of factors."""
        return sorted({*self.differences, *self.token_rows})

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """Where the factors are that are in memory."""
        pairs = self.stored.values()
        return frozenset(x.tensor.device for pair in pairs for x in pair if type(x) is MemoryTensor)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.stored.values())
