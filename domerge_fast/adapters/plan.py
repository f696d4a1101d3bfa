"""Which modules there are, which adapters have each, and the groups they are merged in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeVar

import torch

from ..storage.buffers import Buffers
from ..storage.safetensors_file import read_group
from . import Adapter, Module
from .dora import check_no_dora
from .stack import Kind, Stack, stack_of_one, stacks_of

__all__ = ["GPU_GROUP_BYTES", "GROUP_BYTES", "Kind", "Plan", "Stack"]

Value = TypeVar("Value")

GROUP_BYTES = 48 << 20
"""Factor bytes in a group of modules: small enough for the cache, large enough for all cores."""

GPU_GROUP_BYTES = 256 << 20
"""On a GPU: enough problems for all its multiprocessors, and several groups to overlap."""


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
        for adapter in adapters:
            check_no_dora(adapter)
        own = own or {}
        live = [i for i, weight in enumerate(weights) if weight != 0]
        first = adapters[live[0]].names if live else []
        if not own and all(adapters[i].names == first for i in live):
            alike = dict.fromkeys(first, tuple(live))
            return cls(adapters, weights, tuple(first), alike)
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
        own = self.names if self.own else ()
        return [*self.weights, *(w for name in own for w in self.own.get(name, ()))]

    def module(self, name: str) -> Module:
        """The module as its first owner describes it (rank and scaling are that adapter's)."""
        return self.adapters[self.owners[name][0]].modules[name]

    @cached_property
    def described(self) -> dict[str, Module]:
        """`module` of every name."""
        found: dict[str, Module] = {}
        for owners, names in self._by_owners.items():
            found |= zip(names, _of(self.adapters[owners[0]].modules, names))
        return found if len(self._by_owners) == 1 else {name: found[name] for name in self.names}

    def modules(self, name: str) -> list[Module]:
        return [self.adapters[i].modules[name] for i in self.owners[name]]

    def rank(self, name: str) -> int:
        """R, the stacked rank of a module."""
        return self.kinds[name].rank

    @property
    def ranks(self) -> dict[str, int]:
        """R of every module."""
        ranks = {kind: kind.rank for kind in self.every_kind}
        return {name: ranks[kind] for name, kind in self.kinds.items()}

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Of every module; those alike have the same one."""
        found: dict[str, Kind] = {}
        for owners, names in self._by_owners.items():
            of_adapters = [_of(self.adapters[i].alike, names) for i in owners]
            own = [self._own_weights(owners, names)] if self.own else []
            keys = [*zip(*of_adapters, *own)]
            made = {key: self._kind(owners, key) for key in dict.fromkeys(keys)}
            found |= zip(names, map(made.__getitem__, keys))
        return found

    @cached_property
    def every_kind(self) -> tuple[Kind, ...]:
        """Those that there are."""
        return tuple(dict.fromkeys(self.kinds.values()))

    def _kind(self, owners: tuple[int, ...], key: tuple) -> Kind:
        """key: what modules have in common in every owner, and their weights where some have own
        ones."""
        weights = key[-1] if self.own else tuple([self.weights[i] for i in owners])
        return Kind.of(owners, key[: len(owners)], weights)

    def _own_weights(
        self, owners: tuple[int, ...], names: Sequence[str]
    ) -> Iterator[tuple[float, ...]]:
        """Of the adapters that have these modules, by module."""
        rows = (self.own.get(name, self.weights) for name in names)
        return (tuple([row[i] for i in owners]) for row in rows)

    @cached_property
    def _by_owners(self) -> Mapping[tuple[int, ...], Sequence[str]]:
        """The modules that the same adapters have."""
        if len(every := set(self.owners.values())) == 1:
            return dict.fromkeys(every, self.names)
        found: dict[tuple[int, ...], list[str]] = {}
        for name, owners in self.owners.items():
            found.setdefault(owners, []).append(name)
        return found

    @property
    def wide(self) -> bool:
        """Whether a module's stacked rank exceeds what its update can have."""
        return any(kind.rank > min(kind.m, kind.n) for kind in self.every_kind)

    def dtype(self) -> torch.dtype:
        """The dtype that all factors share, or float32 where they differ."""
        dtypes = {dtype for kind in self.every_kind for dtype in kind.dtypes}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def factor_bytes(self, name: str) -> int:
        """Bytes of a module's factors, of all adapters."""
        return self.kinds[name].factor_bytes

    def dense_bytes(self, name: str) -> int:
        """Bytes of a module's ΔW in float32."""
        return self.kinds[name].dense_bytes

    def device_bytes(self, name: str, dtype: torch.dtype) -> int:
        """`Kind.device_bytes` of a module."""
        return self.kinds[name].device_bytes(dtype)

    def groups(
        self, shares: Mapping[str, float], names: Sequence[str] | None = None
    ) -> Iterator[Sequence[str]]:
        """Names in order, until their shares of a group add up to 1; at least one in a group.
        names: of some modules, None for all."""
        names = self.names if names is None else names
        begin, filled = 0, 0.0
        for k, part in enumerate(map(shares.__getitem__, names)):
            if k > begin and filled + part > 1:
                yield names[begin:k]
                begin, filled = k, 0.0
            filled += part
        if begin < len(names):
            yield names[begin:]

    def stack(self, name: str) -> Stack:
        """A module's factors from every adapter that has it, where they are."""
        a, b = zip(*(self.adapters[i].factors(name) for i in self.owners[name]))
        return stack_of_one(self.kinds[name], name, a, b)

    def read_bytes(self, names: Sequence[str]) -> int:
        """What a buffer for the factors of a group has to hold."""
        return sum(map(self.rooms.__getitem__, names))

    @cached_property
    def rooms(self) -> dict[str, int]:
        """What every module's factors take of a buffer."""
        found: dict[str, int] = {}
        for owners, names in self._by_owners.items():
            given = [rooms for i in owners if (rooms := self.adapters[i].rooms)]
            rows = zip(*(_of(rooms, names) for rooms in given))
            found |= zip(names, map(sum, rows)) if given else dict.fromkeys(names, 0)
        return found

    def stacks(self, portions: Sequence[Sequence[str]], buffers: Buffers) -> list[list[Stack]]:
        """Modules' factors from every adapter that has them, where they are; those of files are
        read into a buffer. Modules alike of a portion are one stack, in the order that the first of
        each has."""
        alike = [self._alike(portion) for portion in portions]
        sides = [side for own in alike for row in own.items() for side in self._of(*row)]
        if not all(adapter.in_place for adapter in self.adapters):
            found = iter(read_group([x for side in sides for x in side], buffers))
            sides = [[*islice(found, len(side))] for side in sides]
        rest = iter(sides)
        return [
            [s for row in own.items() for s in stacks_of(*row, next(rest), next(rest))]
            for own in alike
        ]

    def _alike(self, names: Sequence[str]) -> dict[Kind, list[str]]:
        """The modules by kind, in the order that the first of each has."""
        members: dict[Kind, list[str]] = {}
        for name, kind in zip(names, map(self.kinds.__getitem__, names)):
            members.setdefault(kind, []).append(name)
        return members

    def _of(self, kind: Kind, names: Sequence[str]) -> Iterator[list[Any]]:
        """A of every adapter, of one of these modules alike after the other; and B."""
        at = [self._places[name] for name in names]
        for side in zip(*(self._sides[i] for i in kind.owners)):
            yield [*chain.from_iterable(zip(*(map(own.__getitem__, at) for own in side)))]

    @cached_property
    def _places(self) -> dict[str, int]:
        """Which module has which name."""
        return {name: k for k, name in enumerate(self.names)}

    @cached_property
    def _sides(self) -> dict[int, tuple[Sequence[Any], Sequence[Any]]]:
        """`Adapter.sides` in the plan's order, of all adapters that have any of its modules."""
        found = {}
        for i in {i for owners in self._by_owners for i in owners}:
            adapter, names = self.adapters[i], [*self.names]
            a, b = adapter.sides
            if adapter.names != names:
                at = [adapter.places.get(name) for name in names]
                a, b = ([None if k is None else side[k] for k in at] for side in (a, b))
            found[i] = a, b
        return found


def _of(found: Mapping[str, Value], names: Sequence[str]) -> Iterable[Value]:
    """What is found by these names, one after the other."""
    if [*found] == [*names]:
        return found.values()  # in this order already: a look-up takes ten times as long
    return map(found.__getitem__, names)
