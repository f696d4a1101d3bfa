"""Takes a plan group by group through a method: read ahead, compute, write behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from . import ops, precision, transfer
from .errors import AdapterError, OptionError
from .finish import Result, finished, in_range
from .garbage import uncollected
from .interference import InterferenceSums, own_norms
from .methods.base import Run, grams
from .plan import GPU_GROUP_BYTES, GROUP_BYTES, Plan, Stack
from .report import ModuleReport
from .storage.buffers import Buffers
from .work import Work

MOST_COMPARED = 64
"""Adapters up to which every merge also measures their pairwise interference."""

DENSE_BYTES = 256 << 20
"""What the dense results of a group of modules may take; one module may take more."""

PORTION_CUBES, PORTION_ENTRIES = 1 << 26, 1 << 22
"""What a thread takes at once of R x R matrices (R^3), and all take of dense ones."""

Sink = Callable[..., None]
"""(name, A [R, n], B [m, R]) or (name, ΔW [m, n] in float32) of every module."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a merge runs, and how many bytes of that device's memory its groups may take."""

    device: torch.device
    most_bytes: int | None = None


@uncollected()
def run(
    plan: Plan,
    work: Work,
    place: Place,
    sums: InterferenceSums,
    sink: Sink,
    to_host: bool,
    progress: Progress,
) -> dict[str, ModuleReport]:
    """Merge every module of the plan and give it to the sink, which works in another thread.

    to_host: whether the sink wants the results in the host's memory. Raises AdapterError for a
    factor with NaN or Inf, before its module reaches the sink; OptionError for a module that is
    too large for the place; DomergeError for a result that the dtype cannot hold.
    """
    reports: dict[str, ModuleReport] = {}
    compare = len(plan.adapters) <= MOST_COMPARED
    backend = work.settings.backend
    streams = _streams(plan, place)
    scaled = _Scaled.of(plan, work)
    work = scaled.work
    method = work.method.prepared(_EveryGroup(plan, place, scaled, streams), work.inner)
    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "domerge-write") as writer:
        groups = _stacks(plan, place, work, streams)
        for stacks in (portion for group in groups for portion in _portions(group, work, place)):
            wanted = [compare or (not work.pre and method.wants_grams(s)) for s in stacks]
            group = _measured(plan, stacks, wanted, compare, backend)
            norms = sums.add(group.stacks, *group.exact) if compare else group.norms
            results = _merge(scaled, method, group)
            for s, result, own in zip(group.stacks, results, norms):
                reports[s.name] = _report(plan, s, result, own)
            if written:
                written.result()
            ready = transfer.ready_event(place.device) if to_host else None
            tensors = [r.tensors for r in results]
            written = writer.submit(_write, sink, [s.name for s in stacks], tensors, ready, streams)
            for done in range(len(reports) - len(stacks), len(reports)):
                progress(done + 1, len(plan.names))
        if written:
            written.result()
    return reports


@dataclass(frozen=True)
class _EveryGroup:
    """The model's groups of stacks as the method sees them, read once more on every pass."""

    plan: Plan
    place: Place
    scaled: _Scaled
    streams: Sequence[torch.cuda.Stream]

    def __iter__(self) -> Iterator[Sequence[Stack]]:
        work = self.scaled.work
        for stacks in _stacks(self.plan, self.place, work, self.streams):
            wanted = [False] * len(stacks)
            group = _measured(self.plan, stacks, wanted, False, work.settings.backend)
            yield work.before(self.scaled.weighted(group.stacks))


@dataclass(frozen=True)
class _Scaled:
    """Work without the powers of two of extreme weights and of an extreme λ."""

    work: Work
    of_weights: int
    of_scale: int

    @classmethod
    def of(cls, plan: Plan, work: Work) -> _Scaled:
        of_weights = precision.of_weights(plan.weights, work.by_ratio)
        return cls(work, of_weights, 0)._without(precision.extreme(work.settings.scale))

    def _without(self, power: int) -> _Scaled:
        scale = math.ldexp(self.work.settings.scale, -power)
        work = replace(self.work, settings=replace(self.work.settings, scale=scale))
        return _Scaled(work, self.of_weights, self.of_scale + power)

    @property
    def wide(self) -> _Scaled:
        """With λ near 1, and results in float32."""
        near_one = self._without(math.frexp(self.work.settings.scale)[1])
        return replace(near_one, work=near_one.work.wide)

    def weighted(self, stacks: Sequence[Stack]) -> list[Stack]:
        by_ratio = self.work.by_ratio
        return [precision.weighted(s, self.of_weights, by_ratio) for s in stacks]


@dataclass(frozen=True, eq=False)
class _Group:
    """Stacks near 1 with their float32 Grams as the method takes them, and in the host's memory,
    exact, those that the report is made of; or, where those are not compared, ||ΔW_i||_F."""

    stacks: list[Stack]
    grams: tuple[list[Tensor | None], list[Tensor | None]]
    exact: tuple[list[Tensor], list[Tensor]]
    norms: list[list[float]]


def _measured(
    plan: Plan, stacks: Sequence[Stack], wanted: Sequence[bool], compare: bool, backend: str
) -> _Group:
    """The group's Grams, of stacks that are brought near 1 where they are not."""
    stacks = list(stacks)
    found = grams(stacks, wanted, backend)
    host = transfer.gather(found[0]), transfer.gather(found[1])
    exact = _present(host[0]), _present(host[1])
    norms: list[list[float]] = []
    if compare:
        diagonals = [(a.diagonal(), b.diagonal()) for a, b in zip(*exact)]
    else:
        norms, diagonals = own_norms(stacks, backend)
    moved = []
    for k in precision.unusual(diagonals):
        centred = precision.centred(plan, stacks[k], diagonals[k])
        if centred is not stacks[k]:
            stacks[k] = centred
            moved.append(k)
    again = [side for k in moved for side in (stacks[k].a, stacks[k].b)]
    precise = ops.gram(again, dtype=torch.float64, backend=backend)
    for k, *pair in zip(moved, precise[::2], precise[1::2]):
        for side, gram in enumerate(pair):
            if wanted[k]:
                found[side][k] = gram.float()
                host[side][k] = gram.float().cpu()
            if compare:
                exact[side][k] = gram.cpu()
    _check_factors(plan, stacks, *host, backend)
    return _Group(stacks, found, exact, norms)


def _merge(scaled: _Scaled, method: Run, group: _Group) -> list[Result]:
    """What the sink takes of every module. Those that may have lost digits to the output's dtype,
    or have powers of two to come back, are merged again in float32."""
    stacks = scaled.weighted(group.stacks)
    chosen = list(range(len(stacks)))
    results = _results(scaled.work, method, stacks, group.grams, chosen)
    backend = scaled.work.settings.backend
    fits = precision.fits([r.tensors for r in results], backend)
    again = [
        k
        for k, (s, fit) in enumerate(zip(stacks, fits))
        if not fit or scaled.of_scale or s.far or any(s.powers)
    ]
    if again:
        wide = scaled.wide
        for k, result in zip(again, _results(wide.work, method, stacks, group.grams, again)):
            given = group.stacks[k].powers
            results[k] = in_range(result, stacks[k], given, wide.of_scale, scaled.work)
    return results


def _results(
    work: Work,
    method: Run,
    stacks: Sequence[Stack],
    found: tuple[Sequence[Tensor | None], Sequence[Tensor | None]],
    chosen: Sequence[int],
) -> list[Result]:
    """Of the chosen stacks."""
    given = [stacks[k] for k in chosen]
    grams_a, grams_b = ([side[k] for k in chosen] for side in found)
    known = None if work.pre else (grams_a, grams_b)
    return finished(work, given, method(work.before(given), work.inner, known))


def survey(
    plan: Plan, place: Place, backend: str, sums: InterferenceSums, progress: Progress
) -> None:
    """Only the Grams, only counted into `sums`."""
    done = 0
    for stacks in _stacks(plan, place, None, _streams(plan, place)):
        group = _measured(plan, stacks, [True] * len(stacks), True, backend)
        sums.add(group.stacks, *group.exact)
        for _ in stacks:
            done += 1
            progress(done, len(plan.names))


def _streams(plan: Plan, place: Place) -> list[torch.cuda.Stream]:
    """The caller's streams where the factors are and where the merge runs."""
    homes = (device for adapter in plan.adapters for device in adapter.devices)
    return transfer.current_streams([place.device, *homes])


def _stacks(
    plan: Plan, place: Place, work: Work | None, streams: Sequence[torch.cuda.Stream]
) -> Iterator[list[Stack]]:
    """The plan's groups, each read and copied while the one before it is worked on."""
    groups = list(_groups(plan, place, work))
    buffers = Buffers(max(map(plan.read_bytes, groups)))
    with ThreadPoolExecutor(1, "domerge-read") as reader:
        ahead: Future[transfer.Upload] | None = None
        for names in groups:
            following = reader.submit(_read, plan, names, buffers, place.device, streams)
            if ahead:
                yield ahead.result().wait()
            ahead = following
            del following
        if ahead:
            yield ahead.result().wait()


def _portions(group: Sequence[Stack], work: Work, place: Place) -> Iterator[Sequence[Stack]]:
    """A group in pieces of some tenths of a second, or of a module that takes longer: between them
    progress is told, and the merge can be stopped. A GPU takes a group at once."""
    if place.device.type != "cpu":
        yield group
        return
    threads = torch.get_num_threads()
    portion: list[Stack] = []
    share = 0.0
    for stack in group:
        portion.append(stack)
        share += stack.a.rank**3 / (threads * PORTION_CUBES)
        share += stack.a.d * stack.b.d / PORTION_ENTRIES if work.dense else 0
        if share >= 1 and (work.dense or len(portion) >= threads):  # a module is one thread's work
            yield portion
            portion, share = [], 0.0
    if portion:
        yield portion


def _groups(plan: Plan, place: Place, work: Work | None) -> Iterator[list[str]]:
    usual = GPU_GROUP_BYTES if place.device.type == "cuda" else GROUP_BYTES
    dtype = work.settings.dtype if work else plan.dtype()
    dense = work is not None and work.dense
    most = place.most_bytes
    if most is None and place.device.type == "cuda":
        most = int(0.8 * transfer.free_bytes(place.device))

    def share(name: str) -> float:
        part = max(plan.factor_bytes(name), plan.read_bytes([name])) / usual
        if dense:
            part = max(part, plan.dense_bytes(name) / DENSE_BYTES)
        return part if most is None else max(part, needed(name) / most)

    def needed(name: str) -> int:
        """Of the device: two dense results, one computed while another is copied."""
        extra = 2 * plan.dense_bytes(name) if dense else 0
        return plan.device_bytes(name, dtype) + extra

    if most is not None:
        for name in plan.names:
            if needed(name) > most:
                problem = (
                    f"module {name!r} alone takes {needed(name) >> 20} MiB, "
                    f"{most >> 20} are allowed"
                )
                raise OptionError("max_device_memory", problem, "allow more, or merge on the CPU")
    return plan.groups(share)


def _read(
    plan: Plan,
    names: Sequence[str],
    buffers: Buffers,
    device: torch.device,
    streams: Sequence[torch.cuda.Stream],
) -> transfer.Upload:
    with transfer.on(streams):
        return transfer.upload(plan.stacks(names, buffers), device)


def _check_factors(
    plan: Plan,
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    backend: str,
) -> None:
    """AdapterError unless every factor is finite: the Grams tell, where there are any."""
    pairs = list(zip(grams_a, grams_b))
    unknown = [s for s, pair in zip(stacks, pairs) if pair[0] is None]
    blocks = iter(
        ops.all_finite([x for s in unknown for x in (*s.a.blocks, *s.b.blocks)], backend=backend)
    )
    whole = iter(ops.all_finite([g for pair in pairs for g in pair if g is not None]))
    for s, (a, b) in zip(stacks, pairs):
        if a is not None and b is not None:
            # A sum beside the diagonal can overflow alone, by rounding: no factor is to blame.
            finite = all(list(islice(whole, 2))) or (
                _finite(a.diagonal()) and _finite(b.diagonal())
            )
        else:
            finite = all(list(islice(blocks, len(s.a.blocks) + len(s.b.blocks))))
        if not finite:
            raise _not_finite(plan, s)


def _present(grams: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grams if g is not None]


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _not_finite(plan: Plan, stack: Stack) -> AdapterError:
    for side, problem in (("A", stack.a), ("B", stack.b)):
        for i, block in zip(stack.adapters, problem.blocks):
            adapter = plan.adapters[i].name
            if not _finite(block):
                what = "NaN" if bool(torch.isnan(block).any()) else "an infinite value"
                remedy = "train or download it again, or leave it out"
                return AdapterError(adapter, stack.name, f"{what} in lora_{side}", remedy)
    raise AssertionError(f"no factor of {stack.name} explains its Gram matrix")


def _report(plan: Plan, stack: Stack, result: Result, norms: Sequence[float]) -> ModuleReport:
    names = [plan.adapters[i].name for i in stack.adapters]
    made = result.made
    # Where sizes are far apart, the smallest may vanish in the method's float32 sums alone.
    magnitudes = dict(zip(names, [n or own for n, own in zip(made.norms or norms, norms)]))
    sides = made.a_side, made.b_side
    return ModuleReport(stack.name, result.rank, *sides, magnitudes, result.kept, result.energy)


def _write(
    sink: Sink,
    names: Sequence[str],
    results: Sequence[tuple[Tensor, ...]],
    ready: torch.cuda.Event | None,
    streams: Sequence[torch.cuda.Stream],
) -> None:
    tensors = [t for result in results for t in result]
    with transfer.on(streams):
        arrived = iter(transfer.download(tensors, ready) if ready else tensors)
        for name, result in zip(names, results):
            sink(name, *islice(arrived, len(result)))
