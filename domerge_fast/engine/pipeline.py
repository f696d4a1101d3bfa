"""Takes a plan group by group through a method: read ahead, compute, write behind."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import GPU_GROUP_BYTES, GROUP_BYTES, Plan, Stack
from ..algebra import powers
from ..algebra.host import gather
from ..errors import AdapterError, OptionError
from ..methods.base import Grams, grams, wide_grams
from ..methods.contract import Found
from ..methods.running import Run, prepared, stacked
from ..methods.spectral import calibrated
from ..results.report import ModuleReport
from ..storage.buffers import Buffers
from ..storage.garbage import uncollected
from . import precision, transfer
from .finish import Result, finished, in_range
from .first_pass import Diagonals, Whole
from .interference import InterferenceSums, own_norms
from .work import Work

__all__ = ["MOST_COMPARED", "Place", "Sink", "memory", "run", "survey"]

LOG = logging.getLogger(__name__)

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
) -> Outcome:
    """Merge every module of the plan and give it to the sink, which works in another thread.

    to_host: whether the sink wants the results in the host's memory. Raises AdapterError for a
    factor with NaN or Inf, before its module reaches the sink; OptionError for a module that is
    too large for the place; DomergeError for a result that the dtype cannot hold.
    """
    reports: dict[str, ModuleReport] = {}
    streams = _streams(plan, place)
    scaled = _Scaled.of(plan, work)
    work = scaled.work
    method = prepared(work.method, _EveryGroup(plan, place, scaled, streams), work.inner)
    total = len(plan.names) * (2 if work.twice else 1)
    whole = _gone_through(plan, place, scaled, method, sums, streams, progress)
    before = total - len(plan.names)
    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "domerge-write") as writer:
        groups = _stacks(plan, place, work, streams)
        for stacks in (portion for group in groups for portion in _portions(group, work, place)):
            norms: Sequence[Sequence[float]]
            if whole:
                group, norms = _seen_before(plan, stacks, whole)
            else:
                group, norms = _looked_at(plan, stacks, scaled, method, sums)
            results = _merge(scaled, method, group, whole)
            for s, result, own in zip(group.stacks, results, norms):
                reports[s.name] = _report(plan, s, result, own)
            if written:
                written.result()
            ready = transfer.ready_event(place.device) if to_host else None
            tensors = [r.tensors for r in results]
            written = writer.submit(_write, sink, [s.name for s in stacks], tensors, ready, streams)
            _log(plan, stacks, "merged", len(reports))
            for done in range(len(reports) - len(stacks), len(reports)):
                progress(before + done + 1, total)
        if written:
            written.result()
    return Outcome(reports, whole.scales if whole else {})


def _log(plan: Plan, stacks: Sequence[Stack], what: str, done: int) -> None:
    if LOG.isEnabledFor(logging.DEBUG):
        read = plan.read_bytes([s.name for s in stacks]) / 1e6
        counts = len(stacks), what, read, done, len(plan.names)
        LOG.debug("%d modules %s, %.1f MB of factors; %d of %d are done", *counts)


def _gone_through(
    plan: Plan,
    place: Place,
    scaled: _Scaled,
    method: Run,
    sums: InterferenceSums,
    streams: Sequence[torch.cuda.Stream],
    progress: Progress,
) -> Whole | None:
    """What only the whole model tells, where that is needed."""
    work = scaled.work
    if not work.twice:
        return None
    whole, done = Whole(work, method, scaled.of_weights), 0
    groups = _stacks(plan, place, work, streams)
    for stacks in (portion for group in groups for portion in _portions(group, work, place)):
        group, norms = _looked_at(plan, stacks, scaled, method, sums)
        given = scaled.weighted(group.stacks)
        seen = [(own, group.moved.get(k)) for k, own in enumerate(norms)]
        whole.add(work.before(given), given, group.grams, seen)
        _log(plan, stacks, "looked at", done + len(stacks))
        for _ in stacks:
            done += 1
            progress(done, 2 * len(plan.names))
    whole.settle()
    return whole


def _looked_at(
    plan: Plan, stacks: Sequence[Stack], scaled: _Scaled, method: Run, sums: InterferenceSums
) -> tuple[_Group, list[list[float]]]:
    """The group with its Grams, counted into the sums, and ||ΔW_i||_F."""
    work = scaled.work
    compare = len(plan.adapters) <= MOST_COMPARED
    wanted = [compare or (not work.pre and method.wants_grams(s)) for s in stacks]
    wide, bare = work.wide_grams(method), method.bare
    group = _measured(plan, stacks, wanted, compare, work.settings.backend, wide, bare)
    return group, sums.add(group.stacks, *group.exact) if compare else group.norms


def _seen_before(
    plan: Plan, stacks: Sequence[Stack], whole: Whole
) -> tuple[_Group, list[Sequence[float]]]:
    """The group as it was when the model was gone through, with what was found of it."""
    seen = [whole.take(s.name) for s in stacks]
    given = [
        s if x.diagonals is None else precision.centred(plan, s, x.diagonals)
        for s, x in zip(stacks, seen)
    ]
    nothing: list[Tensor | None] = [None] * len(given)
    group = _Group(given, (nothing, nothing), ([], []), [], {}, [x.found for x in seen])
    return group, [x.norms for x in seen]


@dataclass(frozen=True)
class Outcome:
    """The modules' reports, and the λ that was found, by the number of adapters a module has."""

    modules: dict[str, ModuleReport]
    scales: Mapping[int, float]


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
        of_weights = precision.of_weights(plan.every_weight, work.by_ratio)
        return cls(work, of_weights, 0)._without(powers.extreme(work.settings.scale))

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
    """Stacks near 1 with their Grams as the method takes them, and in the host's memory, exact,
    those that the report is made of; or, where those are not compared, ||ΔW_i||_F. moved: the
    diagonals of the Grams of stacks that were brought near 1. found: what the method found before,
    in place of Grams."""

    stacks: list[Stack]
    grams: Grams
    exact: tuple[list[Tensor], list[Tensor]]
    norms: list[list[float]]
    moved: dict[int, Diagonals]
    found: Sequence[Found | None] | None = None


def _measured(
    plan: Plan,
    stacks: Sequence[Stack],
    wanted: Sequence[bool],
    compare: bool,
    backend: str,
    wide: bool = False,
    bare: bool = False,
) -> _Group:
    """The group's Grams, of stacks that are brought near 1 where they are not. wide: the method
    takes `wide_grams`, of which those of the report are made too; bare: without scalings."""
    stacks = list(stacks)
    known = wide_grams(stacks, backend, bare) if wide else None
    found: tuple[list[Tensor | None], list[Tensor | None]]
    if known:
        both = [_with_scalings(s, a, b, bare) for s, a, b in zip(stacks, *known)]
        found = [a for a, _ in both], [b for _, b in both]
    else:
        found = grams(stacks, wanted, backend)
    here = gather(found[0]), gather(found[1])
    exact = _present(here[0]), _present(here[1])
    norms: list[list[float]] = []
    if compare:
        diagonals = [(a.diagonal(), b.diagonal()) for a, b in zip(*exact)]
    else:
        norms, diagonals = own_norms(stacks, backend)
    moved = {}
    for k in precision.unusual(diagonals):
        centred = precision.centred(plan, stacks[k], diagonals[k])
        if centred is not stacks[k]:
            a, b = diagonals[k]
            stacks[k], moved[k] = centred, (a.clone(), b.clone())
    bare = bare or not wide
    again = wide_grams([stacks[k] for k in moved], backend, bare)
    for k, *pair in zip(moved, *again):
        scaled = _with_scalings(stacks[k], pair[0], pair[1], bare, torch.float64)
        for side, (plain, gram) in enumerate(zip(pair, scaled)):
            if known:
                known[side][k] = plain
            if wanted[k]:
                found[side][k] = gram.float()
                here[side][k] = gram.float().cpu()
            if compare:
                exact[side][k] = gram.cpu()
    _check_factors(plan, stacks, *here, backend)
    return _Group(stacks, known or found, exact, norms, moved)


def _with_scalings(
    stack: Stack, gram_a: Tensor, gram_b: Tensor, bare: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`wide_grams` with the scalings s_i in that of B."""
    if not bare:
        return gram_a.to(dtype), gram_b.to(dtype)
    pairs = zip(stack.b.scales, stack.b.ranks)
    gains = torch.cat([torch.full((r,), c, dtype=torch.float64) for c, r in pairs]).to(gram_b)
    return gram_a.to(dtype), (gains[:, None] * gram_b * gains).to(dtype)


def _merge(scaled: _Scaled, method: Run, group: _Group, whole: Whole | None) -> list[Result]:
    """What the sink takes of every module. Those that may have lost digits to the output's dtype,
    or have powers of two to come back, are merged again in float32."""
    stacks = scaled.weighted(group.stacks)
    work = scaled.work
    lost = scaled.of_weights if work.by_ratio else 0
    alone = lost if work.alone else None
    part = _Part(method, stacks, group.grams, group.found, whole, alone)
    results = part.merged(work, range(len(stacks)))
    backend = work.settings.backend
    fits = precision.fits([r.tensors for r in results], backend)
    again = [
        k
        for k, (s, fit, (_, power)) in enumerate(zip(stacks, fits, part.scales))
        if not fit or scaled.of_scale or power or s.far or any(s.powers)
    ]
    if again:
        wide = scaled.wide
        for k, result in zip(again, part.merged(wide.work, again)):
            given = group.stacks[k].powers
            of_scale = wide.of_scale + part.scales[k][1]
            results[k] = in_range(result, stacks[k], given, of_scale, work)
    return results


@dataclass(frozen=True, eq=False)
class _Part:
    """A group with weights, of which a power of two was taken, what is known of it, and how it is
    merged. alone: None, or that modules of one adapter are its update, and the power of two to come
    back to these."""

    method: Run
    stacks: Sequence[Stack]
    grams: Grams
    found: Sequence[Found | None] | None
    whole: Whole | None
    alone: int | None

    @cached_property
    def scales(self) -> list[tuple[float, int]]:
        """(x, p): λ is multiplied by x 2^p, of which 2^p comes back later."""
        return [self._scale(s) for s in self.stacks]

    def merged(self, work: Work, chosen: Sequence[int]) -> list[Result]:
        """The chosen stacks, those with one λ together."""
        by_scale: dict[float | None, list[int]] = {}
        for k in chosen:
            lone = self.alone is not None and len(self.stacks[k].adapters) == 1
            by_scale.setdefault(None if lone else self.scales[k][0], []).append(k)
        results: dict[int, Result] = {}
        for key, members in by_scale.items():
            found = self._alone(work, members) if key is None else self._at(key, work, members)
            results |= zip(members, found)
        return [results[k] for k in chosen]

    def _scale(self, stack: Stack) -> tuple[float, int]:
        if self.alone is not None and len(stack.adapters) == 1:
            return 1.0, self.alone
        return self.whole.scale(stack) if self.whole else (1.0, 0)

    def _alone(self, work: Work, chosen: Sequence[int]) -> list[Result]:
        """λ w τ of stacks of one adapter, with λ = 1 where another is looked for."""
        given = [self.stacks[k] for k in chosen]
        return finished(work, given, stacked(given, work.inner))

    def _at(self, scale: float, work: Work, chosen: Sequence[int]) -> list[Result]:
        given = [self.stacks[k] for k in chosen]
        projection = self.whole.projection if self.whole else 1.0
        settings = replace(work.inner, scale=scale * work.settings.scale, projection=projection)
        stacks = work.before(given)
        found = [x for k in chosen if self.found and (x := self.found[k]) is not None]
        cut = work.at_cut, work.cut_dtype
        if work.calibrates_factors:
            merged = self.method(stacks, replace(settings, scale=1.0))
            return finished(
                work, given, merged, lambda x: calibrated.make(stacks, x, found, settings)
            )
        if found:
            return finished(work, given, self.method.make(stacks, found, settings, *cut))
        known = None
        if not work.pre and not self.whole:
            known = [self.grams[0][k] for k in chosen], [self.grams[1][k] for k in chosen]
        return finished(work, given, self.method(stacks, settings, known, *cut))


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


def memory(plan: Plan, place: Place, work: Work) -> int:
    """Bytes that the largest group of the plan takes while another is read and one is written."""

    def needed(name: str) -> int:
        dense = 2 * plan.dense_bytes(name) if work.dense else 0
        return plan.device_bytes(name, work.settings.dtype) + dense

    return max(sum(map(needed, group)) for group in _groups(plan, place, work))


def _streams(plan: Plan, place: Place) -> list[torch.cuda.Stream]:
    """The caller's streams where the factors are and where the merge runs."""
    homes = set()
    if torch.cuda.is_initialized():  # else no factors are on a GPU
        homes = {device for adapter in plan.adapters for device in adapter.devices}
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
