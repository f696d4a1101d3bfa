"""Takes a plan group by group through a method: read ahead, compute, write behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import ops, transfer
from .backends.torch import full_precision
from .errors import AdapterError, DomergeError, OptionError
from .garbage import uncollected
from .interference import InterferenceSums, own_norms
from .methods.base import Factors, Method, Settings
from .plan import GPU_GROUP_BYTES, GROUP_BYTES, Plan, Stack
from .report import ModuleReport

MOST_COMPARED = 64
"""Adapters up to which every merge also measures their pairwise interference."""

Sink = Callable[[str, Tensor, Tensor], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cut:
    """How far results are truncated; both None: not at all."""

    rank: int | None = None
    energy: float | None = None

    def __bool__(self) -> bool:
        return self.rank is not None or self.energy is not None


@dataclass(frozen=True)
class Place:
    """Where a merge runs, and how many bytes of that device's memory its groups may take."""

    device: torch.device
    most_bytes: int | None = None


@uncollected()
def run(
    plan: Plan,
    method: Method,
    options: Any,
    settings: Settings,
    cut: Cut,
    place: Place,
    sums: InterferenceSums,
    sink: Sink,
    to_host: bool,
    progress: Progress,
) -> dict[str, ModuleReport]:
    """Merge every module of the plan and give it to the sink, which works in another thread.

    to_host: whether the sink wants the results in the host's memory. Raises AdapterError for a
    factor with NaN, Inf or values too large, before its module reaches the sink; OptionError for
    a module that is too large for the place.
    """
    reports: dict[str, ModuleReport] = {}
    compare = len(plan.adapters) <= MOST_COMPARED
    inner = Settings(settings.scale, torch.float32, settings.backend) if cut else settings
    streams = _streams(plan, place)
    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "domerge-write") as writer:
        for stacks in _stacks(plan, place, settings.dtype, streams):
            wanted = [compare or method.needs_grams(s, options) for s in stacks]
            grams_a, grams_b = grams(stacks, wanted, settings.backend)
            host_a, host_b = transfer.gather(grams_a), transfer.gather(grams_b)
            _check_factors(plan, stacks, host_a, host_b, settings.backend)
            merged = method.merge(stacks, grams_a, grams_b, options, inner)
            kept = [1.0] * len(stacks)
            energy = [0.0] * len(stacks)
            if cut:
                merged, kept, energy = _truncate(merged, cut, settings)
            _check_results(stacks, merged, settings.backend)
            if compare:
                norms = sums.add(stacks, _present(host_a), _present(host_b))
            else:
                norms = own_norms(stacks, settings.backend)
            for k, (s, f) in enumerate(zip(stacks, merged)):
                reports[s.name] = _report(plan, s, f, norms[k], kept[k], energy[k])
            if written:
                written.result()
            ready = transfer.ready_event(place.device) if to_host else None
            written = writer.submit(_give, sink, [s.name for s in stacks], merged, ready, streams)
            progress(len(reports), len(plan.names))
        if written:
            written.result()
    return reports


def survey(
    plan: Plan, place: Place, backend: str, sums: InterferenceSums, progress: Progress
) -> None:
    """Only the Grams, only counted into `sums`."""
    done = 0
    for stacks in _stacks(plan, place, plan.dtype(), _streams(plan, place)):
        grams_a, grams_b = (
            transfer.gather(g) for g in grams(stacks, [True] * len(stacks), backend)
        )
        _check_factors(plan, stacks, grams_a, grams_b, backend)
        sums.add(stacks, _present(grams_a), _present(grams_b))
        done += len(stacks)
        progress(done, len(plan.names))


def _streams(plan: Plan, place: Place) -> list[torch.cuda.Stream]:
    """The caller's streams where the factors are and where the merge runs."""
    homes = (device for adapter in plan.adapters for device in adapter.devices)
    return transfer.current_streams([place.device, *homes])


def _stacks(
    plan: Plan, place: Place, dtype: torch.dtype, streams: Sequence[torch.cuda.Stream]
) -> Iterator[list[Stack]]:
    """The plan's groups, each read and copied while the one before it is worked on."""
    with ThreadPoolExecutor(1, "domerge-read") as reader:
        ahead: Future[transfer.Upload] | None = None
        for names in _groups(plan, place, dtype):
            following = reader.submit(_read, plan, names, place.device, streams)
            if ahead:
                yield ahead.result().wait()
            ahead = following
        if ahead:
            yield ahead.result().wait()


def _groups(plan: Plan, place: Place, dtype: torch.dtype) -> Iterator[list[str]]:
    usual = GPU_GROUP_BYTES if place.device.type == "cuda" else GROUP_BYTES
    most = place.most_bytes
    if most is None and place.device.type == "cuda":
        most = int(0.8 * transfer.free_bytes(place.device))

    def share(name: str) -> float:
        part = plan.factor_bytes(name) / usual
        return part if most is None else max(part, plan.device_bytes(name, dtype) / most)

    if most is not None:
        for name in plan.names:
            needed = plan.device_bytes(name, dtype)
            if needed > most:
                problem = (
                    f"module {name!r} alone takes {needed >> 20} MiB, {most >> 20} are allowed"
                )
                raise OptionError("max_device_memory", problem, "allow more, or merge on the CPU")
    return plan.groups(share)


def _read(
    plan: Plan, names: Sequence[str], device: torch.device, streams: Sequence[torch.cuda.Stream]
) -> transfer.Upload:
    with transfer.on(streams):
        found = transfer.upload([plan.stack(name) for name in names], device)
    for adapter in plan.adapters:
        adapter.release()
    return found


def grams(
    stacks: Sequence[Stack], wanted: Sequence[bool], backend: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Grams of both sides of the wanted stacks, None for the others."""
    chosen = [s for s, want in zip(stacks, wanted) if want]
    found = ops.gram([*(s.a for s in chosen), *(s.b for s in chosen)], backend=backend)
    a, b = iter(found[: len(chosen)]), iter(found[len(chosen) :])
    pairs = [(next(a), next(b)) if want else (None, None) for want in wanted]
    return [x for x, _ in pairs], [x for _, x in pairs]


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
        for i, block, scale in zip(stack.adapters, problem.blocks, problem.scales):
            adapter = plan.adapters[i].name
            if not _finite(block):
                what = "NaN" if bool(torch.isnan(block).any()) else "an infinite value"
                remedy = "train or download it again, or leave it out"
                return AdapterError(adapter, stack.name, f"{what} in lora_{side}", remedy)
            if not _finite((scale * block.float()).square().sum()):
                problem_text = f"lora_{side} has values too large for float32 sums"
                return AdapterError(adapter, stack.name, problem_text, "leave the adapter out")
    raise AssertionError(f"no factor of {stack.name} explains its Gram matrix")


def _truncate(
    merged: Sequence[Factors], cut: Cut, settings: Settings
) -> tuple[list[Factors], list[float], list[float]]:
    pairs = [(f.a, f.b) for f in merged]
    smaller, kept = ops.truncate(
        pairs,
        rank=cut.rank,
        energy=cut.energy,
        out_dtype=settings.dtype,
        backend=settings.backend,
    )
    energy = [_energy(a, b) for a, b in pairs]
    results = [Factors(a, b, f.a_side, f.b_side, f.norms) for (a, b), f in zip(smaller, merged)]
    return results, kept, energy


@full_precision()
def _energy(a: Tensor, b: Tensor) -> float:
    """||B A||_F^2 from the two Grams."""
    return float(((a @ a.T).double() * (b.T @ b).double()).sum())


def _check_results(stacks: Sequence[Stack], merged: Sequence[Factors], backend: str) -> None:
    results = [x for f in merged for x in (f.a, f.b)]
    for k, finite in enumerate(ops.all_finite(results, backend=backend)):
        if not finite:
            side, dtype = "AB"[k % 2], str(results[k].dtype).removeprefix("torch.")
            raise DomergeError(
                f"module {stacks[k // 2].name!r}: merged lora_{side} does not fit in {dtype}; "
                "write it with dtype='float32'"
            )


def _report(
    plan: Plan,
    stack: Stack,
    factors: Factors,
    norms: Sequence[float],
    kept: float,
    energy: float,
) -> ModuleReport:
    names = [plan.adapters[i].name for i in stack.adapters]
    magnitudes = dict(zip(names, factors.norms or norms))
    rank = factors.a.shape[0]
    return ModuleReport(stack.name, rank, factors.a_side, factors.b_side, magnitudes, kept, energy)


def _give(
    sink: Sink,
    names: Sequence[str],
    merged: Sequence[Factors],
    ready: torch.cuda.Event | None,
    streams: Sequence[torch.cuda.Stream],
) -> None:
    pairs = [x for f in merged for x in (f.a, f.b)]
    with transfer.on(streams):
        arrived = iter(transfer.download(pairs, ready) if ready else pairs)
        for name in names:
            sink(name, next(arrived), next(arrived))
