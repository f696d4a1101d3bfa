"""Which modules there are, which adapters have each, and the groups they are merged in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..algebra.side import Side
from ..storage.buffers import Buffers
from ..storage.safetensors_file import group_bytes, read_group
from . import Adapter, LazyTensor, Module

__all__ = ["GPU_GROUP_BYTES", "GROUP_BYTES", "Plan", "Stack", "near_one"]

GROUP_BYTES = 64 << 20
"""Factor bytes in a group of modules: small enough for the cache, large enough for all cores."""

GPU_GROUP_BYTES = 256 << 20
"""On a GPU: enough problems for all its multiprocessors, and several groups to overlap."""

SQUARES = 2 * 4 * 12
"""Bytes for every entry of an R x R matrix: both sides have their Gram, C and the descent's own."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One module with its factors from every adapter that has it, as the two sides.

    adapters: positions in the plan's list, one a block. a: blocks A_i [r_i, n]. b: blocks B_i^T
    [r_i, m] with the scaling s_i as their scale. weights: w_i.

    powers: the true A is 2^powers[0] times this one, and the true B^T (with its weights)
    2^powers[1] times. far: whether some adapters are so much smaller than others that they vanish
    beside them in float32 sums of squares. Both are what engine/precision.py leaves behind.
    """

    name: str
    adapters: tuple[int, ...]
    a: Side
    b: Side
    weights: tuple[float, ...]
    powers: tuple[int, int] = (0, 0)
    far: bool = False

    @property
    def rank(self) -> int:
        return self.a.rank

    @property
    def omegas(self) -> tuple[float, ...]:
        """ω_i = w_i / sum |w| over the adapters that have the module."""
        return _shares(self.weights)


@functools.lru_cache(maxsize=1 << 10)
def _shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    sizes = near_one(weights)
    total = sum(map(abs, sizes))
    return tuple([w / total for w in sizes])


def near_one(weights: Sequence[float]) -> list[float]:
    """The weights over a power of two, with the largest near 1: their sums are finite, and no
    digit is lost."""
    power = math.frexp(max(map(abs, weights)))[1]
    return [math.ldexp(w, -power) for w in weights]


@dataclass(frozen=True, eq=False)
class Plan:
    """The modules of a merge in order. Adapters of weight zero are left out of every stack. own:
    the weights of modules that have others."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    names: tuple[str, ...]
    owners: dict[str, tuple[int, ...]]
    own: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        own: Mapping[str, Sequence[float]] | None = None,
    ) -> Plan:
        own = own or {}
        owners: dict[str, list[int]] = {}
        for i, adapter in enumerate(adapters):
            for name in adapter.modules:
                if own.get(name, weights)[i] != 0:
                    owners.setdefault(name, []).append(i)
        frozen = {name: tuple(members) for name, members in owners.items()}
        return cls(adapters, weights, tuple(owners), frozen, own)

    def only(self, names: Sequence[str]) -> Plan:
        """The plan of these modules."""
        return replace(self, names=tuple(names), owners={n: self.owners[n] for n in names})

    @property
    def every_weight(self) -> list[float]:
        """The weights of all modules, in no order."""
        return [*self.weights, *(w for name in self.names for w in self.own.get(name, ()))]

    def module(self, name: str) -> Module:
        """The module as its first owner describes it (rank and scaling are that adapter's)."""
        return self.adapters[self.owners[name][0]].modules[name]

    def modules(self, name: str) -> list[Module]:
        return [self.adapters[i].modules[name] for i in self.owners[name]]

    def rank(self, name: str) -> int:
        """R, the stacked rank of a module."""
        return sum(self.sizes[name][0])

    @property
    def ranks(self) -> dict[str, int]:
        """R of every module."""
        return {name: sum(ranks) for name, (ranks, _) in self.sizes.items()}

    @cached_property
    def sizes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """The r_i of every module, and min(m, n), which no rank has to exceed."""
        adapters, found = self.adapters, {}
        for name, owners in self.owners.items():
            modules = [adapters[i].modules[name] for i in owners]
            first = modules[0]
            found[name] = tuple([module.rank for module in modules]), min(first.m, first.n)
        return found

    @property
    def wide(self) -> bool:
        """Whether a module's stacked rank exceeds what its update can have."""
        return any(sum(ranks) > side for ranks, side in set(self.sizes.values()))

    def dtype(self) -> torch.dtype:
        """The dtype that all factors share, or float32 where they differ."""
        dtypes = {m.dtype for name in self.names for m in self.modules(name)}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def factor_bytes(self, name: str) -> int:
        """Bytes of a module's factors, of all adapters."""
        module = self.module(name)
        return self.rank(name) * (module.m + module.n) * module.dtype.itemsize

    def dense_bytes(self, name: str) -> int:
        """Bytes of a module's ΔW in float32."""
        module = self.module(name)
        return 4 * module.m * module.n

    def device_bytes(self, name: str, dtype: torch.dtype) -> int:
        """Device memory that merging a module to factors of this dtype takes: the factors and the
        results, each twice (one group computes while another is copied), and R x R matrices.
        Kernels' scratch memory comes on top: up to 256 MiB, whatever the group."""
        module = self.module(name)
        rank = self.rank(name)
        merged = rank * (module.m + module.n) * dtype.itemsize
        return 2 * self.factor_bytes(name) + 2 * merged + SQUARES * rank * rank

    def groups(self, share: Callable[[str], float]) -> Iterator[list[str]]:
        """Names in order, until their shares of a group add up to 1; at least one in a group."""
        group: list[str] = []
        filled = 0.0
        for name in self.names:
            part = share(name)
            if group and filled + part > 1:
                yield group
                group, filled = [], 0.0
            group.append(name)
            filled += part
        if group:
            yield group

    def stack(self, name: str) -> Stack:
        """A module's factors from every adapter that has it, where they are."""
        return self._stack(name, [self.adapters[i].factors(name) for i in self.owners[name]])

    def read_bytes(self, names: Sequence[str]) -> int:
        """What a buffer for the factors of a group has to hold."""
        return sum([self._rooms[name] for name in names])

    @cached_property
    def _rooms(self) -> dict[str, int]:
        """What every module's factors take of a buffer."""
        stored = [adapter.stored for adapter in self.adapters]
        return {
            name: group_bytes([x for i in owners for x in stored[i][name]])
            for name, owners in self.owners.items()
        }

    def stacks(self, names: Sequence[str], buffers: Buffers) -> list[Stack]:
        """Modules' factors from every adapter that has them, where they are; those of files are
        read into a buffer."""
        found = iter(read_group([x for pair in self._pairs(names) for x in pair], buffers))
        return [
            self._stack(name, [_unpadded(m, next(found), next(found)) for m in self.modules(name)])
            for name in names
        ]

    def _pairs(self, names: Sequence[str]) -> list[tuple[LazyTensor, LazyTensor]]:
        return [self.adapters[i].stored[name] for name in names for i in self.owners[name]]

    def _stack(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Stack:
        owners, modules = self.owners[name], self.modules(name)
        ranks = tuple([module.rank for module in modules])
        scaling = tuple([module.scaling for module in modules])
        first, weights = modules[0], self.own.get(name, self.weights)
        return Stack(
            name,
            owners,
            Side.of([a for a, _ in pairs], (1.0,) * len(pairs), ranks, first.n),
            Side.of([b for _, b in pairs], scaling, ranks, first.m, transposed=True),
            tuple([weights[i] for i in owners]),
        )


def _unpadded(module: Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r] without the rank rows that are padding (formats/peft/padding.py)."""
    if module.rank == a.shape[0]:
        return a, b
    return a[: module.rank], b[:, : module.rank].contiguous()
