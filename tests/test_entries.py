"""The elementwise ops on every backend, entry by entry: the rules of entries.py in Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from support import on_device as ops
from support.close import assert_within
from support.on_device import AVAILABLE
from support.shapes import CASES, Case, random_case

from domerge_fast.algebra.entry_rules import LOW_BITS, Draw, Election, Trim
from domerge_fast.algebra.side import Side
from domerge_fast.backends import reference_entries
from domerge_fast.backends import torch_entries as entries

WORD = 0xFFFFFFFF
ADAPTERS, MODULE, SEED = (7, 0, 3), 0xFEDCBA98, 0x0123456789ABCDEF
DRAW = Draw(SEED, MODULE, ADAPTERS)
SMALL = random_case((3, 1, 2), 11, 5)
LARGEST = max(float(delta.abs().max()) for delta in SMALL.deltas())
WEIGHTS = (1.0, -0.5, 2.0)

every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def philox(counter: Sequence[int], seed: int) -> tuple[int, ...]:
    """Philox4x32-10 as printed."""
    x, key = tuple(counter), (seed & WORD, seed >> 32)
    for _ in range(10):
        left, right = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = (right >> 32 ^ x[1] ^ key[0], right & WORD, left >> 32 ^ x[3] ^ key[1], left & WORD)
        key = (key[0] + 0x9E3779B9 & WORD, key[1] + 0xBB67AE85 & WORD)
    return x


@cache
def numbers(seed: int, module: int, adapter: int, m: int, n: int) -> torch.Tensor:
    """The number in [0, 1) of every entry [m, n]."""
    rows = [
        [w for group in range((n + 3) // 4) for w in philox((group, row, adapter, module), seed)]
        for row in range(m)
    ]
    return (torch.tensor(rows)[:, :n] >> 8).float() / (1 << 24)


# Of Random123's kat_vectors.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [
    ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "seed", "expected"), KNOWN)
def test_random_numbers_are_philox(counter, seed, expected):
    assert philox(counter, seed) == expected
    x = [torch.tensor([word]) for word in counter]
    for implementation in (entries.philox, reference_entries._philox):
        assert tuple(int(word) for word in implementation(x, seed)) == expected


def updates(case: Case) -> list[list[list[float]]]:
    return [delta.float().tolist() for delta in case.deltas()]


def probability(row: list[float], column: int, trim: Trim) -> float:
    sizes = [abs(x) for x in row]
    smaller = [k for k, x in enumerate(sizes) if (x, k) < (sizes[column], column)]
    q = len(smaller) / (len(row) - 1) if len(row) > 1 else 0.5
    return trim.keep + trim.spread * (2 * q - 1)


def kept(tau: list[list[float]], i: int, r: int, c: int, trim: Trim) -> bool:
    drawn = float(numbers(SEED, MODULE, ADAPTERS[i], len(tau), len(tau[0]))[r, c])
    inside = trim.low <= abs(tau[r][c]) <= trim.high
    return inside and drawn < probability(tau[r], c, trim)


def trimmed(tau: list[list[float]], i: int, r: int, c: int, trim: Trim) -> float:
    if not kept(tau, i, r, c, trim):
        return 0.0
    return trim.gain * tau[r][c] / (probability(tau[r], c, trim) if trim.rescale else 1.0)


def merged(values: Sequence[float], election: Election) -> float:
    votes = [w * v if election.weighted else v for w, v in zip(WEIGHTS, values, strict=True)]
    signs = [math.copysign(1, u) if u else 0 for u in votes]
    agreeing = list(zip(WEIGHTS, values, strict=True))
    if election.sign != "none":
        elected = 1 if sum(votes if election.sign == "total" else signs) >= 0 else -1
        agreeing = [pair for pair, sign in zip(agreeing, signs, strict=True) if sign == elected]
    total = sum(w * v for w, v in agreeing)
    divisors = {"sum": 1, "count": len(agreeing), "weight": sum(w for w, _ in agreeing)}
    return total / (divisors[election.mean] or 1)


TRIMS = [
    (Trim(), Trim(), Trim()),
    (Trim(low=0.5, high=2.0), Trim(low=math.inf, high=math.inf), Trim(gain=3.0)),
    (Trim(keep=0.5, rescale=True), Trim(low=0.3, keep=0.25, gain=0.5), Trim(keep=0.0)),
    (
        Trim(keep=0.5, spread=0.375, rescale=True),
        Trim(keep=0.25, spread=0.125, gain=2.0),
        Trim(keep=0.75, spread=0.125, low=0.25, rescale=True),
    ),
]
ELECTIONS = [
    Election(*rule)
    for rule in itertools.product(
        ("none", "total", "frequency"), (False, True), ("sum", "count", "weight")
    )
]


@every_backend
@pytest.mark.parametrize("trims", TRIMS)
def test_merge_is_the_rule_entry_by_entry(trims, backend):
    a, b, taus = SMALL.rows(), SMALL.columns(), updates(SMALL)
    for election in ELECTIONS:
        found = ops.call("entry_merge", a, b, trims, WEIGHTS, election, DRAW, -1.5, backend=backend)
        assert found.dtype == torch.float32
        expected = [
            [
                -1.5 * merged([trimmed(taus[i], i, r, c, trims[i]) for i in range(3)], election)
                for c in range(a.d)
            ]
            for r in range(b.d)
        ]
        assert_within(found, torch.tensor(expected).double(), LARGEST, 2e-6)


@every_backend
@pytest.mark.parametrize("trims", TRIMS)
def test_sums_are_of_all_entries_and_of_those_kept(trims, backend):
    a, b, taus = SMALL.rows(), SMALL.columns(), updates(SMALL)
    found = ops.call("entry_sums", a, b, trims, DRAW, backend=backend)
    assert found.dtype == torch.float64
    places = list(itertools.product(range(b.d), range(a.d)))
    for i, trim in enumerate(trims):
        sizes = {(r, c): abs(taus[i][r][c]) for r, c in places}
        left = [size for (r, c), size in sizes.items() if kept(taus[i], i, r, c, trim)]
        expected = torch.tensor([sum(sizes.values()), sum(left)]).double()
        assert_within(found[i], expected, sum(sizes.values()), 1e-6)


def alone(problem: Side, i: int) -> Side:
    return Side((problem.blocks[i],), (problem.scales[i],))


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_counts_are_of_the_update_and_exact(name, backend):
    """Both passes see the values that are merged, to the bit."""
    case = CASES[name]
    a, b = case.rows(), case.columns()
    upper = ops.call("entry_counts", a, b, backend=backend)
    assert upper.shape == (len(case.a), 1 << 16)
    assert upper.sum(1).tolist() == [a.d * b.d] * len(case.a)
    for i in range(len(case.a))[:4]:
        one = alone(a, i), alone(b, i)
        everything = ([Trim()], [1.0], Election(), Draw(0, 0, (0,)), 1.0)
        values = ops.call("entry_merge", *one, *everything, backend=backend)
        size = float(case.deltas()[i].abs().max())
        assert_within(values, case.deltas()[i], size, 1e-5)
        bits = values.flatten().abs().view(torch.int32)
        assert torch.equal(upper[i], torch.bincount(bits >> LOW_BITS, minlength=1 << 16))
        prefix = int(bits[len(bits) // 2]) >> LOW_BITS
        lower = ops.call("entry_counts", *one, [prefix], backend=backend)[0]
        behind = bits[bits >> LOW_BITS == prefix] & (1 << LOW_BITS) - 1
        assert torch.equal(lower, torch.bincount(behind, minlength=1 << LOW_BITS))
