"""The oracle of the elementwise ops: ../entries.py literally, on dense updates in float64.

Only what decides whether an entry is kept is rounded to float32, as the definition has it: |τ|,
and the probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ..algebra.side import Side

__all__ = ["entry_counts", "entry_merge", "entry_sums"]

WORD = 0xFFFFFFFF


def entry_counts(a: Side, b: Side, prefixes: Sequence[int] | None = None) -> Tensor:
    """Counts of the upper 16 bits of |τ_i|, or of the lower 15 behind a prefix: [T, bins]."""
    counts = []
    for i, tau in enumerate(_updates(a, b)):
        bits = tau.abs().float().view(torch.int32).flatten()
        if prefixes is None:
            counts.append(torch.bincount(bits >> LOW_BITS, minlength=1 << HIGH_BITS))
        else:
            lower = bits[bits >> LOW_BITS == prefixes[i]] % (1 << LOW_BITS)
            counts.append(torch.bincount(lower, minlength=1 << LOW_BITS))
    return torch.stack(counts)


def entry_sums(a: Side, b: Side, trims: Sequence[Trim], draw: Draw) -> Tensor:
    """sum |τ_i| over all entries and over those that are kept: [T, 2]."""
    sums = []
    for i, (tau, trim) in enumerate(zip(_updates(a, b), trims)):
        kept = _kept(tau, trim, draw, i)
        sums.append(torch.stack([tau.abs().sum(), tau[kept].abs().sum()]))
    return torch.stack(sums)


def entry_merge(
    a: Side,
    b: Side,
    trims: Sequence[Trim],
    weights: Sequence[float],
    election: Election,
    draw: Draw,
    scale: float,
) -> Tensor:
    """The merged ΔW [m, n], rounded to float32."""
    values = []
    for i, (tau, trim) in enumerate(zip(_updates(a, b), trims)):
        value = trim.gain * tau
        if trim.rescale:
            value = value / _probabilities(tau, trim)
        values.append(torch.where(_kept(tau, trim, draw, i), value, 0.0))
    v = torch.stack(values)
    w = torch.tensor(weights, dtype=torch.float64, device=v.device)[:, None, None]
    votes = w * v if election.weighted else v
    agree = torch.ones_like(v, dtype=torch.bool)
    if election.sign != "none":
        total = (votes if election.sign == "total" else votes.sign()).sum(0)
        agree = votes.sign() == torch.where(total >= 0, 1.0, -1.0)
    divisor = torch.ones_like(v[0])
    if election.mean != "sum":
        divisor = (agree if election.mean == "count" else w * agree).sum(0)
    merged = (w * v * agree).sum(0) / torch.where(divisor == 0, 1, divisor)
    return (scale * merged).float()


def _updates(a: Side, b: Side) -> list[Tensor]:
    """Every τ_i [m, n]."""
    return [s * y.double().T @ x.double() for x, y, s in zip(a.blocks, b.blocks, b.scales)]


def _probabilities(tau: Tensor, trim: Trim) -> Tensor:
    """p of every entry [m, n]."""
    n = tau.shape[1]
    order = tau.abs().float().argsort(dim=1, stable=True)
    q = order.argsort(dim=1).double() / (n - 1) if n > 1 else torch.full_like(tau, 0.5)
    return trim.keep + trim.spread * (2 * q - 1)


def _kept(tau: Tensor, trim: Trim, draw: Draw, i: int) -> Tensor:
    """Whether each entry is kept [m, n]."""
    size = tau.abs().float()
    chosen = _random(draw, i, tau) < _probabilities(tau, trim).float()
    return (size >= trim.low) & (size <= trim.high) & chosen


def _random(draw: Draw, i: int, tau: Tensor) -> Tensor:
    """The numbers in [0, 1) of adapter i's entries [m, n]."""
    row, column = (torch.arange(size, device=tau.device) for size in tau.shape)
    x = [column // 4, row[:, None], torch.tensor(draw.adapters[i]), torch.tensor(draw.module)]
    words = _philox([part.to(tau.device).expand(tau.shape) for part in x], draw.seed)
    word = torch.stack(words).gather(0, (column % 4).expand(1, *tau.shape))[0]
    return (word >> 8).float() * 2.0**-24


def _philox(x: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10 of counters whose words are in int64, which keeps all bits of a product:
    what overflows wraps around."""
    for k in range(10):
        key0 = (seed + k * 0x9E3779B9) & WORD
        key1 = ((seed >> 32) + k * 0xBB67AE85) & WORD
        left, right = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        high_left, high_right = left >> 32 & WORD, right >> 32 & WORD
        x = [high_right ^ x[1] ^ key0, right & WORD, high_left ^ x[3] ^ key1, left & WORD]
    return x
