"""Which modules there are, which adapters have each, and the groups they are merged in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _C
from ..storage.buffers import Buffers, InTurn, bytes_of
from ..storage.safetensors_file import read_group
from . import Adapter, Module
from .adapter import parts_of
from .columns import OfKinds, Same, alike
from .dora import check_no_dora
from .parts import Parts
from .stack import Kind, Stack, stack_of_one, stacks_of

__all__ = ["GPU_GROUP_BYTES", "GPU_GROUP_BYTES_IN_PLACE", "GROUP_BYTES", "Kind", "Plan", "Stack"]

Value = TypeVar("Value")

GROUP_BYTES = 48 << 20
"""Factor bytes in a group of modules: small enough for the cache, large enough for all cores."""

GPU_GROUP_BYTES = 256 << 20
"""On a GPU: enough problems for all its multiprocessors, and several groups to overlap."""

GPU_GROUP_BYTES_IN_PLACE = 1 << 30
"""On a GPU that has the factors and keeps the results: there are no copies to overlap with, and a
group costs the host milliseconds."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The modules of a merge in order. Adapters of weight zero are left out of every stack. own:
    the weights of modules that have others. Columns have an entry a module, in this order."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    names: tuple[str, ...]
    owners: Mapping[str, tuple[int, ...]]
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
        first = adapters[live[0]] if live else None
        if first and not own and all(adapters[i].names == first.names for i in live):
            return cls(adapters, weights, tuple(first.names), Same(first.modules, tuple(live)))
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

    def is_on(self, device: torch.device) -> bool:
        """Whether all factors lie in the memory of a device."""
        return all(x.in_place and x.devices == {device} for x in self.adapters)

    @property
    def every_weight(self) -> list[float]:
        """The weights of all modules, in no order."""
        own = self.names if self.own else ()
        return [*self.weights, *(w for name in own for w in self.own.get(name, ()))]

    def module(self, name: str) -> Module:
        """The module as its first owner describes it (rank and scaling are that adapter's)."""
        return self.adapters[self.owners[name][0]].modules[name]

    @cached_property
    def described(self) -> Mapping[str, Module]:
        """`module` of every name."""
        if isinstance(self.owners, Same):
            return self.adapters[self.owners.value[0]].modules
        return {name: self.module(name) for name in self.names}

    @property
    def is_uniform(self) -> bool:
        """Whether all adapters that are merged have all modules, in this order."""
        return isinstance(self.owners, Same)

    @property
    def is_sliced(self) -> bool:
        """Whether a module is of a parameter that is adapted as it is."""
        return any(self.adapters[i].is_sliced for owners in self._by_owners for i in owners)

    @cached_property
    def parts(self) -> Parts:
        """Of what is adapted, by what the model calls it."""
        if isinstance(self.owners, Same):
            return self.adapters[self.owners.value[0]].parts
        return parts_of(self.described)

    def modules(self, name: str) -> list[Module]:
        return [self.adapters[i].modules[name] for i in self.owners[name]]

    def rank(self, name: str) -> int:
        """R, the stacked rank of a module."""
        return self.kinds[name].rank

    @property
    def ranks(self) -> OfKinds[Kind, int]:
        """R of every module."""
        return self.of_kinds({kind: kind.rank for kind in self.every_kind})

    def of_kinds(self, values: Mapping[Kind, Value]) -> OfKinds[Kind, Value]:
        """What is said of every kind, by module."""
        return OfKinds(self.kinds, values)

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """Of every module; those alike have the same one."""
        return Kinds(self)

    @property
    def every_kind(self) -> list[Kind]:
        """Those that there are."""
        return self._kinds[0]

    @property
    def which(self) -> Tensor:
        """Which of them every module has, as a column in int64."""
        return self._kinds[1]

    @cached_property
    def _kinds(self) -> tuple[list[Kind], Tensor]:
        found: list[Kind] = []
        which = torch.empty(len(self.names), dtype=torch.int64)
        for owners, at in self._by_owners.items():
            columns = [self._column(i, self.adapters[i].alike[1], at) for i in owners]
            counts = [len(self.adapters[i].alike[0]) for i in owners]
            weights = self._own_weights(owners, at)
            if weights:
                numbers = {row: k for k, row in enumerate(dict.fromkeys(weights))}
                columns.append(torch.tensor([numbers[row] for row in weights]))
                counts.append(len(numbers))
            first, kinds = alike(columns, counts)
            which[at] = kinds + len(found)
            for k in first:
                of_adapters = [self.adapters[i].alike[0][c[k]] for i, c in zip(owners, columns)]
                own = weights[k] if weights else tuple([self.weights[i] for i in owners])
                found.append(Kind.of(owners, of_adapters, own))
        return found, which

    def _column(self, i: int, column: Tensor, at: slice | list[int]) -> Tensor:
        """What an adapter says of its modules, of those at these places of the plan."""
        places = self._places[i]
        return column[at] if places is None else column[[places[k] for k in self._listed(at)]]

    def _listed(self, at: slice | list[int]) -> Sequence[int]:
        return at if isinstance(at, list) else range(len(self.names))

    def _own_weights(
        self, owners: tuple[int, ...], at: slice | list[int]
    ) -> list[tuple[float, ...]]:
        """Of the adapters that have the modules at these places, by module; [] where none has own
        ones."""
        if not self.own:
            return []
        rows = (self.own.get(self.names[k], self.weights) for k in self._listed(at))
        return [tuple([row[i] for i in owners]) for row in rows]

    @cached_property
    def _by_owners(self) -> Mapping[tuple[int, ...], slice | list[int]]:
        """The places of the modules that the same adapters have; a slice of all."""
        if isinstance(self.owners, Same):
            return {self.owners.value: slice(None)}
        found: dict[tuple[int, ...], list[int]] = {}
        for k, name in enumerate(self.names):
            found.setdefault(self.owners[name], []).append(k)
        return found

    @cached_property
    def _places(self) -> dict[int, list[int] | None]:
        """Where every adapter that is merged has the plan's modules, 0 where it has none; None
        where it has them in this order."""
        found: dict[int, list[int] | None] = {}
        for i in {i for owners in self._by_owners for i in owners}:
            adapter = self.adapters[i]
            if isinstance(self.owners, Same) or adapter.names == [*self.names]:
                found[i] = None
            else:
                found[i] = [adapter.places.get(name, 0) for name in self.names]
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

    def column(self, of_kinds: Sequence[float], within: range | None = None) -> Tensor:
        """What is said of every kind, of every module, or of those at some places, in float64."""
        which = self.which if within is None else self.which[within.start : within.stop]
        return torch.tensor(of_kinds, dtype=torch.float64)[which]

    def groups(self, shares: Tensor, within: range | None = None) -> list[range]:
        """Places in order, until their shares of a group add up to 1; at least one in a group.
        shares: a column in float64. within: of some places that follow each other, None for all."""
        within = range(len(self.names)) if within is None else within
        return _cut(shares[within.start : within.stop], within.start, 0)

    def portions(self, of_kinds: Sequence[float], within: range, least: int) -> list[range]:
        """Places with so many modules each that their kinds' shares add up to 1 at least, and with
        the least number of them, but for the last."""
        return _cut(self.column(of_kinds, within), within.start, least)

    def stack(self, name: str) -> Stack:
        """A module's factors from every adapter that has it, where they are."""
        a, b = zip(*(self.adapters[i].factors(name) for i in self.owners[name]))
        return stack_of_one(self.kinds[name], name, a, b)

    def read_bytes(self, within: range | None = None) -> int:
        """What a buffer for the factors of a group has to hold; of all modules, if none is
        given."""
        if within is None:
            return sum(self.rooms)
        return sum(self.rooms[within.start : within.stop])

    @cached_property
    def rooms(self) -> list[int]:
        """What every module's factors take of a buffer, as a column; [] where nothing is read."""
        found = torch.zeros(len(self.names), dtype=torch.int64)
        for owners, at in self._by_owners.items():
            for i in owners:
                if rooms := self.adapters[i].rooms:
                    found[at] += self._column(i, torch.tensor(rooms), at)
        return found.tolist() if any(adapter.rooms for adapter in self.adapters) else []

    def stacks(self, portions: Sequence[range], buffers: Buffers) -> list[list[Stack]]:
        """Modules' factors from every adapter that has them, where they are; those of files are
        read into a buffer. Modules alike of a portion are one stack, in the order that the first of
        each has. portions: of places in the plan."""
        members = [self._alike(portion) for portion in portions]
        sides: list[Sequence[Any]] = [
            InTurn([self._sides[i][side] for i in kind.owners], at)
            for own in members
            for kind, _, at in own
            for side in (0, 1)
        ]
        if not all(adapter.in_place for adapter in self.adapters):
            found = iter(read_group([x for side in sides for x in side], buffers))
            sides = [[*islice(found, len(side))] for side in sides]
        rest = iter(sides)
        return [
            [s for kind, names, _ in own for s in stacks_of(kind, names, next(rest), next(rest))]
            for own in members
        ]

    def _alike(self, within: range) -> list[tuple[Kind, tuple[str, ...], bytes]]:
        """The modules of some places by kind, in the order that the first of each has: the kind,
        their names, and the places."""
        found = _C.by_number(bytes_of(self.which), self.names, within.start, within.stop)
        return [(self.every_kind[number], names, at) for number, names, at in found]

    @cached_property
    def _sides(self) -> dict[int, tuple[list[Any], list[Any]]]:
        """`Adapter.sides` in the plan's order, of all adapters that have any of its modules."""
        found = {}
        for i, places in self._places.items():
            a, b = self.adapters[i].sides
            found[i] = (
                (a, b) if places is None else ([a[k] for k in places], [b[k] for k in places])
            )
        return found


def _cut(shares: Tensor, begin: int, least: int) -> list[range]:
    ends = _C.cut(bytes_of(shares), least)
    return [range(begin + k, begin + end) for k, end in zip([0, *ends], ends)]


class Kinds(Mapping[str, Kind]):
    """The kinds of a plan's modules by name: looked up only if somebody asks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    @cached_property
    def _found(self) -> dict[str, Kind]:
        every = self._plan.every_kind
        return dict(zip(self._plan.names, map(every.__getitem__, self._plan.which.tolist())))

    def __getitem__(self, name: str) -> Kind:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.names)

    def __len__(self) -> int:
        return len(self._plan.names)
