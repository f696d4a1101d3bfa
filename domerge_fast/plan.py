"""Which modules there are, which adapters have each, and the groups they are merged in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .adapters import Adapter, Module
from .problem import Problem

GROUP_BYTES = 64 << 20
"""Factor bytes in a group of modules: small enough for the cache, large enough for all cores."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One module with its factors from every adapter that has it, as the two problems.

    adapters: positions in the plan's list, one a block. a: blocks A_i [r_i, n]. b: blocks B_i^T
    [r_i, m] with the scaling s_i as their scale. weights: w_i.
    """

    name: str
    adapters: tuple[int, ...]
    a: Problem
    b: Problem
    weights: tuple[float, ...]

    @property
    def rank(self) -> int:
        return self.a.rank

    @property
    def omegas(self) -> list[float]:
        """ω_i = w_i / sum |w| over the adapters that have the module."""
        total = sum(map(abs, self.weights))
        return [w / total for w in self.weights]


@dataclass(frozen=True, eq=False)
class Plan:
    """The modules of a merge in order. Adapters of weight zero are left out of every stack."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    names: tuple[str, ...]
    owners: dict[str, tuple[int, ...]]

    @classmethod
    def make(cls, adapters: Sequence[Adapter], weights: Sequence[float]) -> Plan:
        owners: dict[str, list[int]] = {}
        for i, adapter in enumerate(adapters):
            for name in adapter.modules if weights[i] != 0 else ():
                owners.setdefault(name, []).append(i)
        frozen = {name: tuple(members) for name, members in owners.items()}
        return cls(adapters, weights, tuple(owners), frozen)

    def module(self, name: str) -> Module:
        """The module as its first owner describes it (rank and scaling are that adapter's)."""
        return self.adapters[self.owners[name][0]].modules[name]

    def modules(self, name: str) -> list[Module]:
        return [self.adapters[i].modules[name] for i in self.owners[name]]

    def rank(self, name: str) -> int:
        """R, the stacked rank of a module."""
        return sum(module.rank for module in self.modules(name))

    def dtype(self) -> torch.dtype:
        """The dtype that all factors share, or float32 where they differ."""
        dtypes = {m.dtype for name in self.names for m in self.modules(name)}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def groups(self, budget: int = GROUP_BYTES) -> Iterator[list[str]]:
        """Names in order, as many in a group as fit the budget, at least one."""
        group: list[str] = []
        size = 0
        for name in self.names:
            module = self.module(name)
            nbytes = self.rank(name) * (module.m + module.n) * module.dtype.itemsize
            if group and size + nbytes > budget:
                yield group
                group, size = [], 0
            group.append(name)
            size += nbytes
        if group:
            yield group

    def stack(self, name: str, device: torch.device) -> Stack:
        """Read a module's factors from every adapter that has it."""
        owners = self.owners[name]
        pairs = [self.adapters[i].factors(name) for i in owners]
        scaling = tuple(module.scaling for module in self.modules(name))
        return Stack(
            name,
            owners,
            Problem(tuple(a.to(device) for a, _ in pairs), (1.0,) * len(pairs)),
            Problem(tuple(b.to(device).T for _, b in pairs), scaling),
            tuple(self.weights[i] for i in owners),
        )
