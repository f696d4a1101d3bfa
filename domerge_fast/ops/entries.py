"""Elementwise methods on updates τ_i = s_i B_i A_i [m, n] that are made tile by tile.

One call a module: a holds the blocks A_i [r_i, n] (its scales are ignored), b the blocks
B_i^T [r_i, m] with the scales s_i. entries.py says to the bit what is computed. No op holds more
than tiles of the τ_i; entry_merge returns the one [m, n] matrix that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ..algebra.side import Side, check_sides
from . import _library


def entry_counts(
    a: Side, b: Side, prefixes: Sequence[int] | None = None, *, backend: str = "auto"
) -> Tensor:
    """How often each value occurs among the bits of |τ_i| (float32, so 31 of them).

    [T, 2^16] in int64: counts of the upper 16 bits; with prefixes, one for every adapter,
    [T, 2^15]: counts of the lower 15 bits of the entries whose upper 16 are the prefix.
    """
    _check(a, b)
    if prefixes is not None and len(prefixes) != len(a.blocks):
        raise ValueError(f"{len(prefixes)} prefixes for {len(a.blocks)} adapters")
    given = [] if prefixes is None else list(prefixes)
    return _entry_counts(*_flat(a, b), given, backend)


def entry_sums(
    a: Side, b: Side, trims: Sequence[Trim], draw: Draw, *, backend: str = "auto"
) -> Tensor:
    """sum |τ_i| over all entries and over those that are kept: [T, 2] in float64.

    A row is summed in 16 interleaved parts (column % 16), which are added in order; rows in order.
    """
    _check(a, b)
    return _entry_sums(*_flat(a, b), *_rules(a, trims, draw), backend)


def entry_merge(
    a: Side,
    b: Side,
    trims: Sequence[Trim],
    weights: Sequence[float],
    election: Election,
    draw: Draw,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """The merged ΔW [m, n] in float32: `scale` times the merge of the trimmed, elected entries."""
    _check(a, b)
    if len(weights) != len(a.blocks):
        raise ValueError(f"{len(weights)} weights for {len(a.blocks)} adapters")
    rule = [election.sign, election.weighted, election.mean]
    return _entry_merge(*_flat(a, b), *_rules(a, trims, draw), list(weights), *rule, scale, backend)


def _check(a: Side, b: Side) -> None:
    check_sides([a, b])
    if a.ranks != b.ranks:
        raise ValueError(f"ranks of A {a.ranks} and of B {b.ranks} differ")


def _flat(a: Side, b: Side) -> tuple[list[Tensor], list[Tensor], list[float]]:
    return list(a.blocks), list(b.blocks), list(b.scales)


def _rules(
    a: Side, trims: Sequence[Trim], draw: Draw
) -> tuple[list[float], list[bool], int, int, list[int]]:
    if not len(trims) == len(draw.adapters) == len(a.blocks):
        raise ValueError(
            f"{len(trims)} trims and {len(draw.adapters)} numbers for {len(a.blocks)} adapters"
        )
    numbers = [x for t in trims for x in (t.low, t.high, t.keep, t.spread, t.gain)]
    return numbers, [t.rescale for t in trims], draw.seed, draw.module, list(draw.adapters)


def _problems(
    a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Side, Side]:
    return Side(tuple(a), (1.0,) * len(a)), Side(tuple(b), tuple(scales))


def _rule(
    numbers: Sequence[float], rescales: Sequence[bool], seed: int, module: int, adapters: list[int]
) -> tuple[list[Trim], Draw]:
    rows = zip(*[iter(numbers)] * 5)
    trims = [
        Trim(low, high, keep, spread, gain, rescale)
        for (low, high, keep, spread, gain), rescale in zip(rows, rescales, strict=True)
    ]
    return trims, Draw(seed, module, tuple(adapters))


def _run_counts(a, b, scales, prefixes, backend):
    module = _library.implementation(backend, a)
    return module.entry_counts(*_problems(a, b, scales), prefixes or None)


def _fake_counts(a, b, scales, prefixes, backend):
    bins = 1 << (LOW_BITS if prefixes else HIGH_BITS)
    return a[0].new_empty(len(a), bins, dtype=torch.int64)


def _run_sums(a, b, scales, *rest):
    *rule, backend = rest
    module = _library.implementation(backend, a)
    return module.entry_sums(*_problems(a, b, scales), *_rule(*rule))


def _fake_sums(a, b, scales, *rest):
    return a[0].new_empty(len(a), 2, dtype=torch.float64)


def _run_merge(a, b, scales, numbers, rescales, seed, module, adapters, weights, *rest):
    sign, weighted, mean, scale, backend = rest
    trims, draw = _rule(numbers, rescales, seed, module, adapters)
    found = _library.implementation(backend, a)
    election = Election(sign, weighted, mean)
    return found.entry_merge(*_problems(a, b, scales), trims, weights, election, draw, scale)


def _fake_merge(a, b, scales, *rest):
    return a[0].new_empty(b[0].shape[1], a[0].shape[1], dtype=torch.float32)


_FACTORS = "Tensor[] a, Tensor[] b, float[] scales"
_RULE = "float[] trims, bool[] rescales, int seed, int module, int[] adapters"

_entry_counts = _library.define(
    "entry_counts",
    f"({_FACTORS}, int[] prefixes, str backend) -> Tensor",
    _run_counts,
    _fake_counts,
)
_entry_sums = _library.define(
    "entry_sums", f"({_FACTORS}, {_RULE}, str backend) -> Tensor", _run_sums, _fake_sums
)
_entry_merge = _library.define(
    "entry_merge",
    f"({_FACTORS}, {_RULE}, float[] weights, str sign, bool weighted, str mean, float scale, "
    "str backend) -> Tensor",
    _run_merge,
    _fake_merge,
)
