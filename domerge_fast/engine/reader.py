"""Reads a plan's modules group by group, ahead of the work on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

import torch

from ..adapters.plan import (
    GPU_GROUP_BYTES,
    GPU_GROUP_BYTES_IN_PLACE,
    GROUP_BYTES,
    Kind,
    Plan,
    Stack,
)
from ..errors import OptionError
from ..storage.buffers import Buffers
from . import transfer
from .work import Work

__all__ = ["Budget", "Reader", "memory"]

DENSE_BYTES = 256 << 20
"""What the dense results of a group of modules may take; one module may take more."""

PORTION_CUBES, PORTION_ENTRIES = 1 << 26, 1 << 22
"""What a thread takes at once of R x R matrices (R^3), and all take of dense ones."""


@dataclass(frozen=True)
class Budget:
    """Where a merge runs, and how many bytes of that device's memory its groups may take."""

    device: torch.device
    most_bytes: int | None = None


def memory(plan: Plan, budget: Budget, work: Work) -> int:
    """Bytes that the largest group of the plan takes while another is read and one is written."""

    def needed(name: str) -> int:
        dense = 2 * plan.dense_bytes(name) if work.dense else 0
        return plan.device_bytes(name, work.settings.dtype) + dense

    (groups,) = _groups(plan, budget, work, [plan.names], plan.is_on(budget.device))
    return max(sum(map(needed, plan.names[at.start : at.stop])) for at in groups)


def _streams(plan: Plan, budget: Budget) -> list[torch.cuda.Stream]:
    """The caller's streams where the factors are and where the merge runs."""
    homes = set()
    if torch.cuda.is_initialized():  # else no factors are on a GPU
        homes = {device for adapter in plan.adapters for device in adapter.devices}
    return transfer.current_streams([budget.device, *homes])


@dataclass(frozen=True)
class Reader:
    """Reads the plan's groups in a thread that ends with the block it was opened for; without one,
    as each is asked for, where all factors lie where they are merged. An iterator that owned the
    thread, left where an error came, would end it when garbage is collected; that may be in a
    thread that is just starting and holds what this waits for."""

    plan: Plan
    budget: Budget
    streams: Sequence[torch.cuda.Stream]
    thread: ThreadPoolExecutor | None
    stays: bool

    @classmethod
    @contextlib.contextmanager
    def opened(cls, plan: Plan, budget: Budget, to_host: bool = False) -> Iterator[Reader]:
        """to_host: whether results leave the device."""
        streams = _streams(plan, budget)
        if plan.is_on(budget.device):
            yield cls(plan, budget, streams, None, not to_host)
            return
        with ThreadPoolExecutor(1, "domerge-read") as thread:
            yield cls(plan, budget, streams, thread, False)

    def groups(self, work: Work | None) -> Iterator[list[Stack]]:
        """The stacks of every group, each read and copied while the one before it is worked on."""
        for group, _ in self._read(work, False, [self.plan.names], [0]):
            yield from group
            del group  # before another is read

    def portions(
        self, work: Work, units: Sequence[Sequence[str]], chosen: Iterable[int], apart: bool = True
    ) -> Iterator[tuple[Sequence[Stack], int | None]]:
        """The groups of the chosen units in pieces of some tenths of a second, or of a module that
        takes longer: between them progress is told, and the merge can be stopped. A GPU takes a
        group at once, as it is taken where pieces are not to be apart. With the last piece of a
        unit comes its number. A unit is chosen while the one before it is worked on."""
        apart = apart and self.budget.device.type == "cpu"
        for group, unit in self._read(work, apart, units, chosen):
            for k, stacks in enumerate(group, 1):
                yield stacks, unit if k == len(group) else None
                del stacks
            del group  # before another is read

    def parts(self, plans: Iterable[Plan], room: int) -> Iterator[list[Stack]]:
        """The stacks of one plan after another, each read and copied while the one before it is
        worked on. room: what a buffer for the factors of any of them has to hold."""
        buffers = Buffers(room)
        ahead: Callable[[], _Read] | None = None
        for plan in plans:
            following = self._begun(plan, [range(len(plan.names))], buffers)
            if ahead:
                yield ahead().wait()[0]
            ahead = following
            del following
        if ahead:
            yield ahead().wait()[0]

    def _begun(
        self, plan: Plan, portions: Sequence[range], buffers: Buffers
    ) -> Callable[[], _Read]:
        """What gives the portions of a group, which the thread reads meanwhile."""
        read = partial(_read, plan, portions, buffers, self.budget.device, self.streams)
        return self.thread.submit(read).result if self.thread else read

    def _read(
        self,
        work: Work | None,
        apart: bool,
        units: Sequence[Sequence[str]],
        chosen: Iterable[int],
    ) -> Iterator[tuple[list[list[Stack]], int | None]]:
        """The groups in portions, if these are to be apart; with a unit's last group its number."""
        plan, dense = self.plan, work is not None and work.dense
        of_units = _groups(plan, self.budget, work, units, self.stays)
        buffers = Buffers(max(plan.read_bytes(group) for groups in of_units for group in groups))
        ahead: tuple[Callable[[], _Read], int | None] | None = None
        for unit in chosen:
            last = len(of_units[unit]) - 1
            for k, group in enumerate(of_units[unit]):
                portions = _portions(plan, group, dense) if apart else [group]
                following = self._begun(plan, portions, buffers)
                if ahead:
                    yield ahead[0]().wait(), ahead[1]
                ahead = following, unit if k == last else None
                del following
        if ahead:
            yield ahead[0]().wait(), ahead[1]


@dataclass(frozen=True, eq=False)
class _Read:
    """The stacks of a group, and how many each portion of it has."""

    upload: transfer.Upload
    counts: Sequence[int]

    def wait(self) -> list[list[Stack]]:
        stacks = iter(self.upload.wait())
        return [list(islice(stacks, count)) for count in self.counts]


def _portions(plan: Plan, group: range, dense: bool) -> list[range]:
    threads = torch.get_num_threads()
    shares = [
        kind.rank**3 / (threads * PORTION_CUBES)
        + (kind.m * kind.n / PORTION_ENTRIES if dense else 0)
        for kind in plan.every_kind
    ]
    # A module is one thread's work.
    return plan.portions(shares, group, 1 if dense else threads)


def _groups(
    plan: Plan, budget: Budget, work: Work | None, units: Sequence[Sequence[str]], stays: bool
) -> list[list[range]]:
    """Of every unit, places in the plan. stays: whether factors are on the device, and results stay
    there."""
    usual = GROUP_BYTES
    if budget.device.type == "cuda":
        usual = GPU_GROUP_BYTES_IN_PLACE if stays else GPU_GROUP_BYTES
    dtype = work.settings.dtype if work else plan.dtype()
    dense = work is not None and work.dense
    most = budget.most_bytes
    if most is None and budget.device.type == "cuda":
        most = int(0.8 * transfer.free_bytes(budget.device))

    def needed(kind: Kind) -> int:
        """Of the device: two dense results, one computed while another is copied."""
        return kind.device_bytes(dtype) + (2 * kind.dense_bytes if dense else 0)

    def share(kind: Kind) -> float:
        part = max(kind.factor_bytes / usual, kind.dense_bytes / DENSE_BYTES if dense else 0.0)
        return part if most is None else max(part, needed(kind) / most)

    if most is not None and any(needed(kind) > most for kind in plan.every_kind):
        name = next(name for name in plan.names if needed(plan.kinds[name]) > most)
        size = needed(plan.kinds[name]) >> 20
        problem = f"module {name!r} alone takes {size} MiB, {most >> 20} are allowed"
        raise OptionError("max_device_memory", problem, "allow more, or merge on the CPU")

    shares = plan.column([share(kind) for kind in plan.every_kind])
    if plan.rooms:
        shares = shares.maximum(torch.tensor(plan.rooms, dtype=torch.float64) / usual)
    ends = [*accumulate(map(len, units))]
    return [plan.groups(shares, range(end - len(x), end)) for x, end in zip(units, ends)]


def _read(
    plan: Plan,
    portions: Sequence[range],
    buffers: Buffers,
    device: torch.device,
    streams: Sequence[torch.cuda.Stream],
) -> _Read:
    with transfer.on(streams):
        read = plan.stacks(portions, buffers)
        upload = transfer.upload([s for portion in read for s in portion], device)
        return _Read(upload, [len(portion) for portion in read])
