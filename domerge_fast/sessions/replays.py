"""Factors of all modules, made of what coefficients make in R x R, as one CUDA graph.

On a GPU a merge is some ten launches a module, which take the host longer than the device. The
first merge of given shapes records them; others copy their numbers in and repeat them. The bits are
those of the same launches one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from ..algebra.full_precision import full_precision
from ..backends.gpu.graph import Cuda, Device, Graph
from .kinds.alike import Alike, Found, Inner
from .part import Bases

__all__ = ["Replayed", "Replays"]

LOG = logging.getLogger(__name__)

DEVICES: dict[str, type[Device]] = {"cuda": Cuda}
"""What runs graphs, by torch's type of device."""
SHARE = 0.5
"""Of the memory that is free, what a graph may take."""
PLAINLY = "the merge is launched plainly, without a CUDA graph: %s"
MOST = 4
"""Graphs that are kept; of more the first is freed."""
PARTS = ("gains", "left", "right", "columns")
"""Of an `Inner`: what factors are made of."""


@dataclass(frozen=True, eq=False)
class Results:
    """A [q, n] and B^T [q, m] by module; finite [modules]: whether both are."""

    factors: Mapping[str, Bases]
    finite: Tensor


@dataclass(eq=False)
class Replayed:
    """One merge by a graph that others use, too. inputs: what its coefficients make in R x R."""

    graph: Graph[Results]
    inputs: Sequence[Tensor]
    bases: Mapping[str, Bases]
    _finite: dict[str, bool] = field(default_factory=dict)

    def of(self, name: str) -> tuple[Tensor, Tensor, bool]:
        """A and B^T of a module, and whether they are finite; bases that stay as they are."""
        with self.graph.results(self.inputs) as made:
            if not self._finite:
                self._finite |= zip(made.factors, made.finite.tolist())
            pairs = zip(made.factors[name], self.bases[name])
            a, bt = (x if x.data_ptr() == base.data_ptr() else x.clone() for x, base in pairs)
        return a, bt, self._finite[name]


@dataclass(eq=False)
class Replays:
    """The graphs of what was prepared, which are freed with it."""

    alike: Sequence[Alike]
    bases: Mapping[str, Bases]
    graphs: dict[tuple, Graph[Results]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, inner: Sequence[Inner], dtype: torch.dtype) -> Replayed | None:
        """A merge in a dtype, before it is rounded where that has 16 bits; None where it is to be
        launched plainly, as the log says unless it is on a CPU."""
        place = next(iter(self.bases.values()))[0].device
        if place.type not in DEVICES:
            return None
        parts = [_parts(one) for one in inner]
        inputs = [x for own in parts for x in own.values()]
        if any(x.requires_grad for x in inputs):
            LOG.info(PLAINLY, "gradients are to reach coefficients")
            return None
        wide = torch.float64 if dtype == torch.float64 else full_precision(place)
        made = wide if dtype.itemsize < 4 else dtype
        key = (wide, made, *((name, x.dtype, x.shape) for own in parts for name, x in own.items()))
        with self._lock:
            if key not in self.graphs:
                device = DEVICES[place.type](place)
                needed, room = made.itemsize * self._numbers(inner), device.room()
                if needed > room * SHARE:
                    LOG.info(PLAINLY, f"its factors take {needed} bytes, of {room} that are free")
                    return None
                names = [(*own,) for own in parts]
                make = partial(_made, self.alike, self.bases, names, wide, made)
                while len(self.graphs) >= MOST:
                    self.graphs.pop(next(iter(self.graphs)))
                self.graphs[key] = Graph(make, inputs, device)
                LOG.info("a CUDA graph of the merge of %d modules is captured", len(self.bases))
            return Replayed(self.graphs[key], inputs, self.bases)

    def _numbers(self, inner: Sequence[Inner]) -> int:
        """Of the factors of all modules."""
        ranks = {name: _rank(one) for x, one in zip(self.alike, inner) for name in x.names}
        return sum(ranks[n] * (a.shape[1] + bt.shape[1]) for n, (a, bt) in self.bases.items())


def _made(
    alike: Sequence[Alike],
    bases: Mapping[str, Bases],
    parts: Sequence[Sequence[str]],
    wide: torch.dtype,
    made: torch.dtype,
    given: Sequence[Tensor],
) -> Results:
    """Products in `wide`, rounded to `made`. parts: the names of those that are given of every one
    of `alike`."""
    rest, found = iter(given), {}
    for x, names in zip(alike, parts):
        inner = Inner(**dict(zip(names, rest)))
        for at, name in enumerate(x.names):
            a, bt = Found.of(inner, at).factors(*(base.to(wide) for base in bases[name]))
            found[name] = a.to(made), bt.to(made)
    finite = [a.isfinite().all() & bt.isfinite().all() for a, bt in found.values()]
    return Results(found, torch.stack(finite))


def _parts(inner: Inner) -> dict[str, Tensor]:
    return {name: x for name in PARTS if (x := getattr(inner, name)) is not None}


def _rank(inner: Inner) -> int:
    """Of the factors."""
    whole = inner.gains if inner.gains is not None else inner.left
    assert whole is not None
    return whole.shape[-1]
