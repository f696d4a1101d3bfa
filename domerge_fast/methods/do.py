"""DO-Merging: orthogonalize the factors, then merge directions and magnitudes apart.

    1. Ahat, Bhat: descend on the overlap between adapters, each side on its own (ops.orthogonalize)
    2. ΔW_i = Bhat_i Ahat_i = D_i diag(mag_i), one magnitude a column (an input feature)
    3. ΔW = λ (sum_i ω_i D_i) diag(sum_i |ω_i| mag_i),  ω_i = w_i / sum |w| of the module's adapters

The result is exactly Bhat A' with A' [R, n]: a LoRA adapter of rank R, with no SVD. It follows
arXiv 2505.15875, for which no code was published; what the paper leaves open is an option here,
and docs/algorithm.md says which measurement chose each default.
Cost: two reads of the factors, 2 R^2 (m + n) flops and a few R x R products a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Kind, Stack
from ..algebra.host import Rows, gather
from ..algebra.side import Side
from ..backends.descent_rates import on_factors
from ..errors import OptionError
from ..ops.orthogonalize import PENALTIES
from ..options import option
from . import decoupled
from .base import Chosen, Halves, Merge, Method, Settings, grams
from .contract import Needs
from .groups import Groups, Through
from .made import Factors
from .moved import Descended, Moved, sized
from .nested import directions
from .side_report import SideReports
from .streamed import choice

__all__ = ["METHOD", "DoOptions", "moves_factors", "orthogonalize"]

LINEAR = "linear"
"""What merges the directions in DO-Merging itself: their weighted sum."""


@dataclass(frozen=True)
class DoOptions:
    orthogonalize: bool = option(True, "push the adapters' factors apart before merging")
    decouple: bool = option(True, "merge column magnitudes and directions apart")
    penalty: str = option("squared", "norm in the overlap's penalty", PENALTIES)
    gamma: float = option(1.0, "weight of staying close to the given factors", low=0.0)
    sides: str = option("both", "which factors to orthogonalize", ("both", "A", "B"))
    steps: int = option(50, "most steps of the descent", low=0)
    tol: float = option(1e-3, "share of the objective that may be left, as estimated", low=0.0)
    renormalize: bool = option(False, "bring the merged directions to unit length")
    directions: str = option(LINEAR, "the method that merges the directions")
    descent: str = option(choice.AUTO, "on all adapters, or batch after batch", choice.DESCENTS)


def find(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DoOptions,
    settings: Settings,
) -> list[Descended]:
    """The descents."""
    a, b = orthogonalize(stacks, grams_a, grams_b, options, settings.backend)
    kept = [(x.kept, y.kept) for x, y in zip(a, b)]
    sizes: Sequence[Sequence[float] | None] = [None] * len(stacks)
    if settings.order:
        rule = decoupled.Rule(settings.order, options.decouple, options.renormalize)
        known = grams_a, grams_b
        sizes = decoupled.of_moved(stacks, (a, b), known, rule, settings.backend)
    a, b = sized(stacks, a, b)
    return [
        Descended(own, sides=sides, a=x, b=y) for own, sides, (x, y) in zip(sizes, zip(a, b), kept)
    ]


def make(
    stacks: Sequence[Stack], found: Sequence[Descended], options: DoOptions, settings: Settings
) -> list[Factors]:
    """The factors, from the descents."""
    rest = [k for k, x in enumerate(found) if x.sides is None]
    again = _again([stacks[k] for k in rest], [found[k] for k in rest], options, settings.backend)
    sides = [x.sides or next(again) for x in found]
    return _merged(stacks, [a for a, _ in sides], [b for _, b in sides], options, settings)


MERGE = Halves(find, make)


def _merged(
    stacks: Sequence[Stack],
    a: Sequence[Moved],
    b: Sequence[Moved],
    options: DoOptions,
    settings: Settings,
) -> list[Factors]:
    backend = settings.backend
    finite: list[Tensor] = []
    b_hat = _formed(b, settings.dtype, backend, finite)
    if options.decouple:
        a_new, norms = _decouple(stacks, a, b_hat, options, settings, finite)
    else:
        a_new, norms = _weigh(stacks, a, settings, finite), [None] * len(stacks)
    known = {*map(id, finite)}
    return [
        Factors.of(an, bt, known, a_side=x.report, b_side=y.report, norms=n)
        for an, bt, x, y, n in zip(a_new, b_hat, a, b, norms)
    ]


def _formed(
    sides: Sequence[Moved], dtype: torch.dtype, backend: str, finite: list[Tensor]
) -> list[Tensor]:
    """Xhat of every side: that of a descent on the factors itself, where it needs no change."""
    known = [x.formed(dtype) for x in sides]
    rest = [x for x, own in zip(sides, known) if own is None]
    moved = [x.c for x in rest], [x.problem for x in rest], dtype
    made = iter(ops.apply(*moved, backend=backend, finite=finite))
    return [next(made) if own is None else own for own in known]


def both_sides(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DoOptions,
    backend: str,
) -> tuple[list[Moved], list[Moved]]:
    """Ahat and Bhat. Where adapters are far apart in size, that of their Ahat_i is in their Bhat_i:
    columns are measured in float32, and an update is the same with 2^-k Ahat_i and 2^k Bhat_i."""
    return sized(stacks, *orthogonalize(stacks, grams_a, grams_b, options, backend))


def _again(
    stacks: Sequence[Stack], found: Sequence[Descended], options: DoOptions, backend: str
) -> Iterator[tuple[Moved, Moved]]:
    """The sides of which C or Xhat is known, or there is none, or they descend once more."""
    rows = [
        *(("A", s.a, x.a) for s, x in zip(stacks, found)),
        *(("B", s.b, x.b) for s, x in zip(stacks, found)),
    ]
    rest = [(side, p, None) for side, p, kept in rows if kept is None]
    missing = iter(_moved(rest, options, backend))
    sides = [next(missing) if kept is None else Moved.of(p, kept) for _, p, kept in rows]
    return zip(*sized(stacks, sides[: len(stacks)], sides[len(stacks) :]))


def orthogonalize(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DoOptions,
    backend: str,
) -> tuple[list[Moved], list[Moved]]:
    """Xhat of all A and of all B sides, where the options do not leave them as they are.

    grams: float32 ones, None where `METHOD.needs_grams` is false.
    """
    given = [
        *(("A", s.a, g) for s, g in zip(stacks, grams_a)),
        *(("B", s.b, g) for s, g in zip(stacks, grams_b)),
    ]
    found = _moved(given, options, backend)
    return found[: len(stacks)], found[len(stacks) :]


def _moved(
    given: Sequence[tuple[str, Side, Tensor | None]], options: DoOptions, backend: str
) -> list[Moved]:
    """given: whether A or B, the side, and its Gram."""
    sides = [Moved(p, None, None) for _, p, _ in given]
    taken = (options.sides,) if options.sides != "both" else ("A", "B")
    if not options.orthogonalize:
        return sides
    chosen = [i for i, (side, _, _) in enumerate(given) if side in taken]
    rule: dict[str, Any] = {"gamma": options.gamma, "steps": options.steps, "tol": options.tol}
    problems = {i: given[i][1] for i in chosen}
    wide = [i for i, p in problems.items() if moves_factors(p.rank, p.d, options, backend)]
    square = sorted({*chosen} - {*wide})
    if square:
        c, stats = ops.orthogonalize(
            [g for i in square if (g := given[i][2]) is not None],
            [problems[i].ranks for i in square],
            penalty=options.penalty,
            backend=backend,
            **rule,
        )
        reports = _reports([problems[i] for i in square], stats)
        for i, matrix, report in zip(square, c, reports):
            sides[i] = Moved(problems[i], matrix, report)
    if wide:
        x, stats = ops.orthogonalize_factors([problems[i] for i in wide], backend=backend, **rule)
        reports = _reports([problems[i] for i in wide], stats)
        for i, moved, report in zip(wide, x, reports):
            sides[i] = Moved.of(problems[i], (None, moved, report))
    return sides


def _reports(problems: Sequence[Side], stats: Tensor) -> Iterator[SideReports]:
    """Of every side. stats: a row for every module."""
    rows = stats.cpu().split_with_sizes([p.modules for p in problems])
    return (SideReports(Rows(own)) for own in rows)


def moves_factors(rank: int, d: int, options: DoOptions, backend: str) -> bool:
    """Whether a side [R, d] descends on its factors, which has no Gram."""
    return options.penalty == "squared" and on_factors(rank, d, backend, options.tol)


def _needs_grams(stack: Stack, options: DoOptions, backend: str) -> bool:
    sides = stack.a, stack.b
    on_grams = [not moves_factors(x.rank, x.d, options, backend) for x in sides]
    return options.orthogonalize and any(on_grams)


def _decouple(
    stacks: Sequence[Stack],
    a: Sequence[Moved],
    b_hat: Sequence[Tensor],
    options: DoOptions,
    settings: Settings,
    finite: list[Tensor],
) -> tuple[list[Tensor], list[Sequence[Sequence[float]] | None]]:
    merged_b = [Side.split(x, s.b.ranks) for s, x in zip(stacks, b_hat)]
    full = None
    if options.renormalize:
        whole = [Side.split(x, (s.rank,)) for s, x in zip(stacks, b_hat)]
        full = ops.gram(whole, dtype=torch.float64, backend=settings.backend)
    a_new, norms = ops.apply_decouple(
        [x.c for x in a],
        [x.problem for x in a],
        ops.block_gram(merged_b, backend=settings.backend),
        [s.omegas for s in stacks],
        settings.scale,
        settings.dtype,
        full=full,
        backend=settings.backend,
        finite=finite,
    )
    return a_new, [Rows(n.view(-1, n.shape[-1]).contiguous()) for n in gather(norms)]


def _weigh(
    stacks: Sequence[Stack], a: Sequence[Moved], settings: Settings, finite: list[Tensor]
) -> list[Tensor]:
    """λ ω_i Ahat_i: task arithmetic on the orthogonalized factors."""
    weighed = [x.times([settings.scale * w for w in s.omegas]) for s, x in zip(stacks, a)]
    return ops.apply(
        [x.c for x in weighed],
        [x.problem for x in weighed],
        settings.dtype,
        backend=settings.backend,
        finite=finite,
    )


def prepare(
    groups: Groups[Sequence[Stack]], options: DoOptions, settings: Settings
) -> Merge | Halves:
    """`MERGE`, or another method for the directions."""
    if settings.inner is None or _plain(settings.inner):
        return MERGE
    if not options.decouple or options.renormalize:
        name, value = "directions", options.directions
        if value == LINEAR:
            name, value = "power", settings.inner.options.power
        problem = f"{value!r} needs decouple, and sets the norm of directions itself"
        raise OptionError(name, problem, "leave decouple and renormalize as they are")
    backend = settings.backend

    def take_apart(
        stacks: Sequence[Stack],
        grams_a: Sequence[Tensor | None],
        grams_b: Sequence[Tensor | None],
    ) -> list[directions.Apart]:
        a, b = both_sides(stacks, grams_a, grams_b, options, backend)
        sides = [*a, *b]
        hats = ops.apply(
            [x.c for x in sides], [x.problem for x in sides], torch.float32, backend=backend
        )
        rows = zip(stacks, hats, hats[len(stacks) :], a, b)
        return [directions.apart(s, x, yt, (p.report, q.report)) for s, x, yt, p, q in rows]

    def of_group(group: Sequence[Stack]) -> list[Stack]:
        found = grams(group, [METHOD.needs_grams(s, options, backend) for s in group], backend)
        return [x.stack for x in take_apart(group, *found)]

    return directions.prepare(Through(groups, of_group), take_apart, settings)


def streams(chosen: Chosen, kinds: Iterable[Kind], hindrance: str | None) -> bool:
    """Whether adapters are read in batches. OptionError."""
    if chosen.inner and not _plain(chosen.inner):
        power = " with a power" if chosen.options.directions == LINEAR else ""
        hindrance = f"directions {chosen.options.directions!r}{power}"
    return choice.streams(chosen.options, kinds, hindrance)


def _plain(inner: Chosen) -> bool:
    """Whether it merges the directions as DO-Merging itself does."""
    return inner.method.name == LINEAR and inner.options.power == 1


METHOD = Method(
    "do",
    "DO-Merging: orthogonalize, then merge directions and magnitudes apart",
    DoOptions,
    MERGE,
    needs_grams=_needs_grams,
    dense=None,
    inner="directions",
    by_ratio=lambda options: True,
    prepare=prepare,
    streams=streams,
    takes=lambda options: Needs(torch.float32),
    cost="two reads, 2 R^2 (m + n) flops, R x R steps",
    source="arXiv 2505.15875",
)
