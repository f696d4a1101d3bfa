"""What an adapter is, whatever it was read from."""

from __future__ import annotations

import dataclasses
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..storage.input_file import InputFile
from ..storage.lazy import LazyTensor, MemoryTensor
from ..storage.safetensors_file import SafetensorsFile

__all__ = ["Adapter", "AdapterConfig", "Kind", "Module", "called", "without_paths"]

Kind = Literal["linear", "embedding", "conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer of an adapter: delta = scaling * B @ A, an [m, n] matrix.

    ``a_shape`` and ``b_shape`` are the stored shapes without padding (see padding.py): [r, n] and
    [m, r]; for convolutions [r, in, k...] and [m, r, 1...], where n = in * k...; for embeddings n
    is the vocabulary and m the dimension (PEFT adds the transpose of delta to the [vocabulary,
    dimension] weight, and likewise for ``fan_in_fan_out`` layers). ``dtype`` holds both stored
    factors without loss.
    """

    name: str
    kind: Kind
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    rank: int
    scaling: float
    dtype: torch.dtype

    @property
    def m(self) -> int:
        return self.b_shape[0]

    @property
    def n(self) -> int:
        return math.prod(self.a_shape[1:])

    @property
    def layer(self) -> tuple[Kind, int, tuple[int, ...]]:
        """What all adapters of the module have in common: kind, m and the shape of the inputs."""
        return self.kind, self.b_shape[0], self.a_shape[1:]


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
    for chosen in (config.target_modules or [], config.exclude_modules or []):
        if isinstance(chosen, str) or any("." in str(name) for name in chosen):
            return dataclasses.replace(config, target_modules=None, exclude_modules=None)
    return config


def called(k: int, adapter: Adapter) -> str:
    """The adapter at position k as reports call it: they are published, and tell no whole path."""
    return f"adapter {k + 1} ({os.path.basename(os.path.normpath(adapter.name))})"


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: its modules, and its factors read on demand.

    ``name`` is what messages call it. ``modules`` is sorted by module name. ``carried`` holds the
    tensors stored whole (``modules_to_save`` and base embeddings saved along), by the key PEFT
    writes (with its ``base_model.model.`` prefix). ``inputs`` are all files it was read from. Names
    are those of the plain model; ``removed`` are the components that something around it had added
    to them. ``originals`` holds what some of the tensors stored whole were before training, by the
    name of the parameter, where that is known. ``model`` is the live model it was read from.
    """

    name: str
    config: AdapterConfig
    modules: Mapping[str, Module]
    carried: Mapping[str, LazyTensor]
    stored: Mapping[str, tuple[LazyTensor, LazyTensor]] = field(repr=False)
    file: SafetensorsFile | None = field(default=None, repr=False)
    inputs: tuple[InputFile, ...] = field(default=(), repr=False)
    removed: tuple[str, ...] = ()
    originals: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)
    model: weakref.ref[Any] | None = field(default=None, repr=False)

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
    def devices(self) -> set[torch.device]:
        """Where the factors are that are in memory."""
        tensors = (t for pair in self.stored.values() for t in pair)
        return {t.tensor.device for t in tensors if isinstance(t, MemoryTensor)}

    @property
    def nbytes(self) -> int:
        """Stored bytes of all factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.stored.values())
