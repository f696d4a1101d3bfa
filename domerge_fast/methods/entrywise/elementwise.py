"""What the elementwise methods share: from a rule for entries to the merged ΔW of a module.

Updates are made tile by tile (ops/entries.py), never T dense matrices. Thresholds are exact order
statistics of |τ_i|: their 31 bits are counted in two passes, of a module or of the whole model.
Cost: 2 m n R flops a pass over a module; one pass for the merge, two more for a threshold (three
for two of them), one for rescaling to the L1 norm. Returns a dense ΔW, written as such or cut to
rank k by randomized SVD.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.entry_rules import LOW_BITS, Draw, Election, Trim
from ...errors import OptionError
from ...options import option
from ..base import Dense, Merge, Method, ScaleRule, Settings

__all__ = [
    "Rule",
    "conventions",
    "density",
    "largest",
    "majority_sign_method",
    "method",
    "scope",
    "seed",
]

CONVENTIONS = ("paper", "peft", "mergekit")
SIGNS = ("total", "frequency")
SCOPES = ("auto", "tensor", "model")
LEAST_NORM = 1e-7
"""An L1 norm below it is left alone, as mergekit does."""


def density(default: float) -> float:
    return option(default, "share of the entries of an update that is kept", low=0.0, high=1.0)


def conventions(known: tuple[str, ...] = CONVENTIONS, default: str = "peft") -> str:
    return option(default, "whose definition to follow where they differ", known)


def majority_sign_method() -> str:
    return option("total", "what elects a sign: the sum of values or of their signs", SIGNS)


def scope() -> str:
    return option("auto", "where the largest entries are sought: each tensor, or the model", SCOPES)


def seed() -> int:
    return option(0, "of the random choices", low=0, high=2**63 - 1)


Positions = Callable[[int], tuple[int, int]]
"""Of N entries by ascending |τ|: the first and the last that are kept; first > last: none."""


@dataclass(frozen=True)
class Rule:
    """How a method treats every entry. positions: None to keep all, by size. rescale: nothing, by
    the entry's probability, or to the L1 norm that the update had. whole: whether positions are
    those of the whole model."""

    election: Election
    positions: Positions | None = None
    whole: bool = False
    keep: float = 1.0
    spread: float = 0.0
    rescale: str = "nothing"
    seed: int = 0


def largest(density: float, least: int = 0) -> Positions | None:
    """The int(density N) largest entries, at least `least`; entries equal to the last one too."""
    if density == 1:
        return None
    return lambda count: (count - max(least, int(density * count)), count - 1)


def method(
    name: str,
    summary: str,
    options: type,
    rule: Callable[..., Rule],
    *,
    source: str,
    needs: str = "",
) -> Method:
    """The row of a method that is a rule for entries: rule(options) -> Rule."""

    def prepare(groups: Iterable[Sequence[Stack]], options: object, settings: Settings) -> Merge:
        found = rule(options)
        bands: Bands | None = None
        if found.whole and found.positions:
            modules = _Flat(groups)
            bands = _bands(modules, found.positions, settings.backend)
        return lambda stacks, grams_a, grams_b, options, settings: [
            Dense(_merged(s, found, bands, settings)) for s in stacks
        ]

    def merge(
        stacks: Sequence[Stack],
        grams_a: Sequence[Tensor | None],
        grams_b: Sequence[Tensor | None],
        options: object,
        settings: Settings,
    ) -> list[Dense]:
        """Of a model that consists of these modules."""
        prepared = prepare([stacks], options, settings)
        return prepared(stacks, grams_a, grams_b, options, settings)  # type: ignore[return-value]

    return Method(
        name,
        summary,
        options,
        merge,
        dense=True,
        by_ratio=lambda options: rule(options).election.mean == "weight",
        prepare=prepare,
        rule=lambda options, inner: ScaleRule(None, 1.25),
        cost="2 m n R flops a pass, 1 to 4 passes",
        source=source,
        needs=needs,
    )


Bands = dict[int, tuple[float, float]]
"""The least and the largest |τ_i| that is kept, by the adapter's position in the plan."""


@dataclass(frozen=True)
class _Flat:
    """The modules of groups, one after the other, as often as they are wanted."""

    groups: Iterable[Sequence[Stack]]

    def __iter__(self) -> Iterator[Stack]:
        return (stack for group in self.groups for stack in group)


def _merged(stack: Stack, rule: Rule, bands: Bands | None, settings: Settings) -> Tensor:
    if bands is None and rule.positions:
        bands = _bands([stack], rule.positions, settings.backend)
    divided = rule.rescale == "probability"
    ends = [bands[i] if bands else (0.0, math.inf) for i in stack.adapters]
    trims = [Trim(*band, rule.keep, rule.spread, rescale=divided) for band in ends]
    draw = Draw(rule.seed, zlib.crc32(stack.name.encode()), stack.adapters)
    if rule.rescale == "norm":
        sums = ops.entry_sums(stack.a, stack.b, trims, draw, backend=settings.backend)
        least = LEAST_NORM * 2.0 ** -sum(stack.powers)
        pairs = zip(trims, sums.tolist())
        trims = [replace(t, gain=_gain(old, new, least)) for t, (old, new) in pairs]
    return ops.entry_merge(
        stack.a,
        stack.b,
        trims,
        stack.weights,
        rule.election,
        draw,
        settings.scale,
        backend=settings.backend,
    )


def _gain(before: float, after: float, least: float) -> float:
    return before / after if min(before, after) >= least else 1.0


def _bands(stacks: Iterable[Stack], positions: Positions, backend: str) -> Bands:
    """Over all entries of the stacks, which are gone through two or three times."""
    upper = _counts(stacks, None, backend)
    totals = {i: int(row.sum()) for i, row in upper.items()}
    wanted = {i: positions(count) for i, count in totals.items()}
    low = _values(stacks, upper, {i: min(w[0], totals[i] - 1) for i, w in wanted.items()}, backend)
    high = dict.fromkeys(totals, math.inf)
    if any(last < totals[i] - 1 for i, (_, last) in wanted.items()):
        high = _values(stacks, upper, {i: max(w[1], 0) for i, w in wanted.items()}, backend)
    return {
        i: (low[i], high[i]) if first <= last else (math.inf, math.inf)
        for i, (first, last) in wanted.items()
    }


def _counts(
    stacks: Iterable[Stack], prefixes: dict[int, int] | None, backend: str
) -> dict[int, Tensor]:
    """Counts of the upper bits, or of the lower ones behind a prefix, by adapter."""
    found: dict[int, Tensor] = {}
    power: int | None = None
    for s in stacks:
        if power not in (None, sum(s.powers)):
            problem = f"module {s.name!r} is larger or smaller than others beyond float32"
            raise OptionError("scope", problem, "seek the largest entries in each tensor")
        power = sum(s.powers)
        chosen = None if prefixes is None else [prefixes[i] for i in s.adapters]
        counts = ops.entry_counts(s.a, s.b, chosen, backend=backend).cpu()
        for i, row in zip(s.adapters, counts):
            found[i] = found[i] + row if i in found else row
    return found


def _values(
    stacks: Iterable[Stack], upper: dict[int, Tensor], at: dict[int, int], backend: str
) -> dict[int, float]:
    """The |τ_i| at position at[i] of the ascending ones."""
    places = {i: _place(row, at[i]) for i, row in upper.items()}
    lower = _counts(stacks, {i: prefix for i, (prefix, _) in places.items()}, backend)
    values = {}
    for i, (prefix, rest) in places.items():
        bits = prefix << LOW_BITS | _place(lower[i], rest)[0]
        values[i] = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    return values


def _place(counts: Tensor, position: int) -> tuple[int, int]:
    """The bin that holds a position, and the position within the bin."""
    before = counts.cumsum(0)
    at = int(torch.searchsorted(before, position, right=True))
    return at, position - (int(before[at - 1]) if at else 0)
