"""Takes a plan group by group through a method: read ahead, compute, write behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import AdapterError, DomergeError
from .interference import InterferenceSums, own_norms
from .methods.base import Factors, Method, Settings
from .plan import Plan, Stack
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


def run(
    plan: Plan,
    method: Method,
    options: Any,
    settings: Settings,
    cut: Cut,
    device: torch.device,
    sums: InterferenceSums,
    sink: Sink,
    progress: Progress,
) -> dict[str, ModuleReport]:
    """Merge every module of the plan and give it to the sink, which works in another thread.

    Raises AdapterError for a factor with NaN, Inf or values too large, before its module reaches
    the sink.
    """
    reports: dict[str, ModuleReport] = {}
    compare = len(plan.adapters) <= MOST_COMPARED
    inner = Settings(settings.scale, torch.float32, settings.backend) if cut else settings
    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "domerge-write") as writer:
        for stacks in _stacks(plan, device):
            wanted = [compare or method.needs_grams(s, options) for s in stacks]
            grams_a, grams_b = grams(plan, stacks, wanted, settings.backend)
            merged = method.merge(stacks, grams_a, grams_b, options, inner)
            kept = [1.0] * len(stacks)
            energy = [0.0] * len(stacks)
            if cut:
                merged, kept, energy = _truncate(merged, cut, settings)
            _check_results(stacks, merged, settings.backend)
            if compare:
                norms = sums.add(stacks, _present(grams_a), _present(grams_b))
            else:
                norms = own_norms(stacks, settings.backend)
            for k, (s, f) in enumerate(zip(stacks, merged)):
                reports[s.name] = _report(plan, s, f, norms[k], kept[k], energy[k])
            if written:
                written.result()
            written = writer.submit(_give, sink, stacks, merged)
            progress(len(reports), len(plan.names))
        if written:
            written.result()
    return reports


def survey(
    plan: Plan, device: torch.device, backend: str, sums: InterferenceSums, progress: Progress
) -> None:
    """Only the Grams, only counted into `sums`."""
    done = 0
    for stacks in _stacks(plan, device):
        grams_a, grams_b = grams(plan, stacks, [True] * len(stacks), backend)
        sums.add(stacks, _present(grams_a), _present(grams_b))
        done += len(stacks)
        progress(done, len(plan.names))


def _stacks(plan: Plan, device: torch.device) -> Iterator[list[Stack]]:
    """The plan's groups, each read while the one before it is worked on."""
    with ThreadPoolExecutor(1, "domerge-read") as reader:
        ahead: Future[list[Stack]] | None = None
        for names in plan.groups():
            following = reader.submit(_read, plan, names, device)
            if ahead:
                yield ahead.result()
            ahead = following
        if ahead:
            yield ahead.result()


def _read(plan: Plan, names: Sequence[str], device: torch.device) -> list[Stack]:
    stacks = [plan.stack(name, device) for name in names]
    for adapter in plan.adapters:
        adapter.release()
    return stacks


def grams(
    plan: Plan, stacks: Sequence[Stack], wanted: Sequence[bool], backend: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Grams of both sides of the wanted stacks (None for the others), all inputs checked."""
    chosen = [s for s, want in zip(stacks, wanted) if want]
    found = ops.gram([*(s.a for s in chosen), *(s.b for s in chosen)], backend=backend)
    a, b = iter(found[: len(chosen)]), iter(found[len(chosen) :])
    pairs = [(next(a), next(b)) if want else (None, None) for want in wanted]
    for s, (gram_a, gram_b) in zip(stacks, pairs):
        if gram_a is None or gram_b is None:
            finite = all(ops.all_finite([*s.a.blocks, *s.b.blocks], backend=backend))
        else:
            finite = _finite(gram_a.diagonal()) and _finite(gram_b.diagonal())
        if not finite:
            raise _not_finite(plan, s)
    return [x for x, _ in pairs], [x for _, x in pairs]


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


def _give(sink: Sink, stacks: Sequence[Stack], merged: Sequence[Factors]) -> None:
    for s, f in zip(stacks, merged):
        sink(s.name, f.a, f.b)
