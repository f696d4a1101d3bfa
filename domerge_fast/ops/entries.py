"""Elementwise methods on updates τ_i = s_i B_i A_i [m, n] that are made tile by tile.

One call a module: a holds the blocks A_i [r_i, n] (its scales are ignored), b the blocks
B_i^T [r_i, m] with the scales s_i. entries.py says to the bit what is computed. No op holds more
than tiles of the τ_i; entry_merge returns the one [m, n] matrix that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.entry_rules import Draw, Election, Trim
from ..algebra.side import Side
from ._backend import implementation, op

__all__ = ["entry_counts", "entry_merge", "entry_sums"]


@op
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
    return implementation("entry_counts", backend, [a, b]).entry_counts(a, b, prefixes)


@op
def entry_sums(
    a: Side, b: Side, trims: Sequence[Trim], draw: Draw, *, backend: str = "auto"
) -> Tensor:
    """sum |τ_i| over all entries and over those that are kept: [T, 2] in float64.

    A row is summed in 16 interleaved parts (column % 16), which are added in order; rows in order.
    """
    _check(a, b)
    _check_rule(a, trims, draw)
    return implementation("entry_sums", backend, [a, b]).entry_sums(a, b, trims, draw)


@op
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
    _check_rule(a, trims, draw)
    module = implementation("entry_merge", backend, [a, b])
    return module.entry_merge(a, b, trims, weights, election, draw, scale)


def _check(a: Side, b: Side) -> None:
    if a.ranks != b.ranks:
        raise ValueError(f"ranks of A {a.ranks} and of B {b.ranks} differ")


def _check_rule(a: Side, trims: Sequence[Trim], draw: Draw) -> None:
    if not len(trims) == len(draw.adapters) == len(a.blocks):
        raise ValueError(
            f"{len(trims)} trims and {len(draw.adapters)} numbers for {len(a.blocks)} adapters"
        )
