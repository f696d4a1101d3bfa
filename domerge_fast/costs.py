"""What a merge by `do` reads, writes and computes on many workers, from shapes alone.

Modules are merged on their own, so a job is units of whole modules that workers take, the most
costly first; no tensor moves between workers. A unit is read, computed and written at once, one
ahead of the other, so it takes the longer of its arithmetic and its bytes.

Where a module of all adapters at once would be too large, one worker reads them in batches, once a
pass (methods/streamed), and keeps d x d matrices of modules.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .adapters.plan import Plan
from .backends.descent_rates import ESTIMATED_COLUMNS, factor_flops, on_factors
from .engine.streamed import memory_of
from .methods.streamed.choice import is_large

__all__ = ["UNIT_BYTES", "Costs", "Shape", "Unit", "Workers", "costs", "cut", "shapes", "units"]

UNIT_BYTES = 64 << 20
"""Of factors: what is read from a file is then long enough for its size to count, not its place."""

FLOPS_A_BYTE = 40
"""That take about as long as to read a byte."""

SCRATCH = 256 << 20
"""Bytes of kernels' own memory, at most."""

STEPS = 3
"""Of a descent: 2 to 5 on sets of one size, more where norms are far apart; so are passes."""

BESIDE = 2
"""Times that batches are read besides: for what S starts from, and for ΔW."""

EIGENVECTORS = 9
"""Flops over d^3, with the values, of a symmetric matrix."""


@dataclass(frozen=True)
class Shape:
    """count modules alike: an update [m, n], adapters of these ranks, bytes of a number."""

    m: int
    n: int
    ranks: tuple[int, ...]
    itemsize: int = 2
    count: int = 1

    @property
    def rank(self) -> int:
        """R."""
        return sum(self.ranks)

    @property
    def read(self) -> int:
        """Bytes of a module's factors."""
        return self.rank * (self.m + self.n) * self.itemsize

    @property
    def written(self) -> int:
        """Bytes of a merged module's factors: of rank R, or of a whole matrix if that is less."""
        return min(self.rank, self.m, self.n) * (self.m + self.n) * self.itemsize

    @property
    def dense(self) -> int:
        """Bytes of the weights that it is an update of."""
        return self.m * self.n * self.itemsize

    def flops(self, steps: int = STEPS) -> float:
        """A multiply-add as two, a symmetric result once: both sides' descents, what applies them,
        and the columns' magnitudes."""
        squares = sum(r * (r + 1) for r in self.ranks)
        return sum(_side(self.rank, d, steps) for d in (self.m, self.n)) + squares * self.n

    def streamed_flops(self, passes: int = STEPS) -> float:
        """Where adapters are read in batches: both sides' passes, and ΔW."""
        sides = (6.0 * self.rank * d**2 + EIGENVECTORS * d**3 for d in (self.m, self.n))
        return passes * sum(sides) + 2.0 * self.rank * self.m * self.n

    @property
    def memory(self) -> int:
        """Bytes while it is merged: its factors, the next module's, results of either side, and the
        descent's own."""
        state = max(_state(self.rank, d) for d in (self.m, self.n))
        return 2 * self.read + 4 * self.rank * (self.m + self.n) + self.written + state


def _side(rank: int, d: int, steps: int) -> float:
    """A descent on the factors, or on R x R matrices with the Gram and C X."""
    if on_factors(rank, d):
        return float(factor_flops(rank, d, steps, estimated=d >= ESTIMATED_COLUMNS))
    return 3.0 * rank**2 * d + rank**3 * max(7.0 * steps - 4, 0)


def _state(rank: int, d: int) -> int:
    """Direction, gradient and two layouts of factors in 16 bits, and three triangles [d, d]; or
    twelve R x R matrices."""
    return 8 * rank * d + 6 * d**2 if on_factors(rank, d) else 48 * rank**2


@dataclass(frozen=True)
class Workers:
    """count workers of `flops` a second each, and what all of them together read and write: bytes a
    second."""

    count: int
    flops: float
    read: float
    write: float

    def seconds(self, flops: float, read: float, written: float) -> float:
        """Of one worker on one unit, while all others work, too."""
        share = 1 / self.count
        return max(flops / self.flops, read / (share * self.read) + written / (share * self.write))


@dataclass(frozen=True)
class Costs:
    """modules and units: how many; read, written: bytes; memory: bytes a worker at most, beside
    Python and torch; largest: bytes of the largest unit; streamed: whether one worker reads
    adapters in batches, and the bytes are those of all passes. seconds: until the last worker ends,
    and compute and transfer: what of them arithmetic and bytes alone would take; None without
    rates."""

    modules: int
    units: int
    read: int
    written: int
    flops: float
    memory: int
    largest: int
    streamed: bool = False
    seconds: float | None = None
    compute: float | None = None
    transfer: float | None = None


def shapes(plan: Plan) -> list[Shape]:
    """Of all modules of a plan; headers are enough."""
    found = []
    for name in plan.names:
        module, ranks = plan.module(name), tuple(m.rank for m in plan.modules(name))
        found.append(Shape(module.m, module.n, ranks, module.dtype.itemsize))
    return found


def cut(plan: Plan, most: int = UNIT_BYTES) -> list[tuple[tuple[str, ...], float]]:
    """The units of a plan, as names of neighbours that have `most` bytes of factors together or
    more, with a number for what each costs beside the others."""
    found, at = [], 0
    for unit in units(shapes(plan), most=most):
        found.append((plan.names[at : at + unit.modules], unit.cost))
        at += unit.modules
    return found


def costs(
    modules: Iterable[Shape], workers: Workers | None, steps: int = STEPS, into_base: bool = False
) -> Costs:
    """Of a merge of these modules. into_base: they are added to weights, which are read and written
    instead of factors."""
    modules = list(modules)
    streamed = any(is_large(x.rank, x.m, x.n) for x in modules)
    found = list(units(modules, steps, into_base, streamed=streamed))
    read, written = sum(u.read for u in found), sum(u.written for u in found)
    flops = math.fsum(u.flops for u in found)
    total = Costs(
        modules=sum(u.modules for u in found),
        units=len(found),
        read=read,
        written=written,
        flops=flops,
        memory=max(u.memory for u in found) + SCRATCH,
        largest=max(u.read for u in found),
        streamed=streamed,
    )
    if workers is None:
        return total
    count = 1 if streamed else workers.count  # a worker has its share of what all read and write
    return replace(
        total,
        seconds=_ends([workers.seconds(u.flops, u.read, u.written) for u in found], count),
        compute=flops / (workers.flops * count),
        transfer=(read / workers.read + written / workers.write) * workers.count / count,
    )


@dataclass
class Unit:
    """Modules that a worker takes at once: how many; bytes read and written, and of memory."""

    modules: int = 0
    read: int = 0
    written: int = 0
    flops: float = 0.0
    memory: int = 0

    @property
    def cost(self) -> float:
        """What it takes beside other units, where no rates are known."""
        return self.read + self.written + self.flops / FLOPS_A_BYTE


def units(
    modules: Iterable[Shape],
    steps: int = STEPS,
    into_base: bool = False,
    most: int = UNIT_BYTES,
    streamed: bool = False,
) -> Iterator[Unit]:
    """Neighbours, until they have so many bytes of factors. streamed: the adapters are read in
    batches, `steps` passes of a descent."""
    unit, reads = Unit(), steps + BESIDE if streamed else 1
    for shape in modules:
        base = shape.dense if into_base else 0
        if streamed:
            flops, memory = shape.streamed_flops(steps), memory_of([(shape.m, shape.n)])
        else:
            flops, memory = shape.flops(steps), shape.memory
            flops += 2.0 * shape.m * shape.n * shape.rank if into_base else 0.0
        for _ in range(shape.count):
            unit.modules += 1
            unit.read += reads * shape.read + base
            unit.written += base or shape.written
            unit.flops += flops
            unit.memory = max(unit.memory, memory + 2 * base)
            if unit.read >= most:
                yield unit
                unit = Unit()
    if unit.modules:
        yield unit


def _ends(seconds: Sequence[float], count: int) -> float:
    """When the last of so many workers ends, if each takes the longest unit that is left."""
    free = [0.0] * count
    for unit in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)
