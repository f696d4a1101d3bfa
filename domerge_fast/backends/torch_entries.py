"""Elementwise ops in plain PyTorch, a tile of rows at a time. See ../entries.py for the rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ..algebra.full_precision import full_precision
from ..algebra.side import Side

__all__ = ["entry_counts", "entry_merge", "entry_sums"]

TILE_BYTES = 2 << 20
"""What a tile of rows of one τ_i may take in float32."""

LANES = 16
"""Interleaved parts in which a row is summed."""


def entry_counts(a: Side, b: Side, prefixes: Sequence[int] | None = None) -> Tensor:
    """Counts of the upper 16 bits of |τ_i|, or of the lower 15 behind a prefix: [T, bins]."""
    bins = 1 << (HIGH_BITS if prefixes is None else LOW_BITS)
    counts = torch.zeros(len(a.blocks), bins, dtype=torch.int64, device=a.device)
    for rows in tiles(a, b):
        for i in range(len(a.blocks)):
            bits = update(a, b, i, rows).view(torch.int32).flatten() & 0x7FFFFFFF
            if prefixes is None:
                counts[i] += torch.bincount(bits >> LOW_BITS, minlength=bins)
            else:
                chosen = bits[bits >> LOW_BITS == prefixes[i]]
                counts[i] += torch.bincount(chosen & (bins - 1), minlength=bins)
    return counts


def entry_sums(a: Side, b: Side, trims: Sequence[Trim], draw: Draw) -> Tensor:
    """sum |τ_i| over all entries and over those that are kept: [T, 2] in float64."""
    sums = torch.zeros(len(a.blocks), 2, dtype=torch.float64, device=a.device)
    for rows in tiles(a, b):
        for i, trim in enumerate(trims):
            sizes = update(a, b, i, rows).abs()
            kept = _kept(sizes, trim, _probabilities(sizes, trim), draw, i, rows)
            for k, entries in enumerate((sizes, sizes * kept)):
                for row in _row_sums(entries):
                    sums[i, k] += row
    return sums


def entry_merge(
    a: Side,
    b: Side,
    trims: Sequence[Trim],
    weights: Sequence[float],
    election: Election,
    draw: Draw,
    scale: float,
) -> Tensor:
    """The merged ΔW [m, n] in float32."""
    merged = torch.empty(b.d, a.d, device=a.device)
    for rows in tiles(a, b):
        values = [_trimmed(update(a, b, i, rows), t, draw, i, rows) for i, t in enumerate(trims)]
        merged[rows] = scale * elected(values, weights, election)
    return merged


def tiles(a: Side, b: Side) -> Iterator[slice]:
    """Rows of ΔW, in tiles of TILE_BYTES at most (or one row)."""
    count = max(1, TILE_BYTES // (4 * a.d))
    for begin in range(0, b.d, count):
        yield slice(begin, min(begin + count, b.d))


def update(a: Side, b: Side, i: int, rows: slice) -> Tensor:
    """τ_i [rows, n] in float32."""
    dtype = full_precision(a.device)
    product = b.blocks[i][:, rows].T.to(dtype) @ a.blocks[i].to(dtype)
    return b.scales[i] * product.float()


def elected(values: Sequence[Tensor], weights: Sequence[float], election: Election) -> Tensor:
    """The merge of the adapters' trimmed values v_i."""
    votes = [w * v if election.weighted else v for w, v in zip(weights, values)]
    agreeing = [torch.ones_like(v) for v in values]
    if election.sign != "none":
        total = torch.zeros_like(values[0])
        for vote in votes:
            total += vote if election.sign == "total" else vote.sign()
        sign = torch.where(total >= 0, 1.0, -1.0)
        agreeing = [(vote.sign() == sign).float() for vote in votes]
    merged = torch.zeros_like(values[0])
    divisor = torch.zeros_like(values[0])
    for w, v, agrees in zip(weights, values, agreeing):
        merged += w * v * agrees
        divisor += w * agrees if election.mean == "weight" else agrees
    if election.mean == "sum":
        return merged
    return merged / torch.where(divisor == 0, 1.0, divisor)


def _trimmed(tau: Tensor, trim: Trim, draw: Draw, i: int, rows: slice) -> Tensor:
    sizes = tau.abs()
    probabilities = _probabilities(sizes, trim)
    values = trim.gain * tau
    if trim.rescale:
        values = values / probabilities
    return torch.where(_kept(sizes, trim, probabilities, draw, i, rows), values, 0.0)


def _probabilities(sizes: Tensor, trim: Trim) -> Tensor:
    """The probability of every entry, or of all."""
    keep, spread = (torch.tensor(x, device=sizes.device) for x in (trim.keep, trim.spread))
    if not trim.spread:
        return keep
    n = sizes.shape[1]
    ranks = sizes.argsort(dim=1, stable=True).argsort(1)
    q = ranks.float() / (n - 1) if n > 1 else torch.full_like(sizes, 0.5)
    return ((2 * spread).double() * q.double() + (keep - spread).double()).float()


def _kept(
    sizes: Tensor, trim: Trim, probabilities: Tensor, draw: Draw, i: int, rows: slice
) -> Tensor:
    kept = (sizes >= trim.low) & (sizes <= trim.high)
    if trim.keep == 1.0 and not trim.spread:
        return kept
    return kept & (uniform(draw, i, rows, sizes.shape[1], sizes.device) < probabilities)


def uniform(draw: Draw, i: int, rows: slice, n: int, device: torch.device) -> Tensor:
    """The numbers in [0, 1) of adapter i's entries [rows, n]."""
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    group = torch.arange((n + 3) // 4, device=device)
    shape = (len(row), len(group))
    counter = (group, row, torch.tensor(draw.adapters[i]), torch.tensor(draw.module))
    words = philox([x.to(device).expand(shape) for x in counter], draw.seed)
    return (torch.stack(words, -1).flatten(1)[:, :n] >> 8).float() * 2.0**-24


def philox(counter: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The four words of Philox4x32-10 for counters and key of 32-bit words, all in int64."""
    word = 0xFFFFFFFF
    key = [seed & word, seed >> 32 & word]
    x = list(counter)
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, x[0])
        high1, low1 = _product(0xCD9E8D57, x[2])
        x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return x


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of factor x, for words in int64."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _row_sums(entries: Tensor) -> list[float]:
    """Sums of the rows in float64: LANES interleaved parts, then the parts in order."""
    parts = torch.zeros(len(entries), LANES, dtype=torch.float64, device=entries.device)
    for chunk in entries.double().split(LANES, 1):
        parts[:, : chunk.shape[1]] += chunk
    total = parts[:, 0]
    for k in range(1, LANES):
        total = total + parts[:, k]
    return total.tolist()
