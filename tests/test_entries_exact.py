"""Counts, sums and merges of the entries of τ_i = s_i B_i A_i, against the letter of entries.py.

Factors of small whole numbers and scales and weights that are powers of two leave every backend
only one result: it must be that, to the bit. What rounds is tested on the backends with fused
arithmetic, to the bit too.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from support import on_device
from support.shapes import random_case
from torch import Tensor

from domerge_fast import _C
from domerge_fast.algebra.entry_rules import Draw, Election, Trim
from domerge_fast.algebra.side import Side

pytestmark = pytest.mark.usefixtures("nan_poison")

CPU = [f"cpu-{isa}" for isa in _C.isas()]
FUSED = [*CPU, *on_device.GPU]
BACKENDS = ["torch", *FUSED]
"""Instruction sets count as backends; names are those of on_device otherwise."""

SHAPES = {
    "one entry": (1, 1, (1,)),
    "ragged": (3, 17, (2, 1, 4)),
    "narrow": (17, 3, (5,)),
    "one column": (1000, 1, (3, 2)),
    "one row": (1, 1000, (1, 7)),
    "several panels": (37, 1000, (3, 40, 1, 5)),
    "many adapters": (19, 131, (2, 1) * 16),
}
TRIMS = {
    "all": Trim(),
    "band": Trim(low=2.0, high=9.0, gain=1.5),
    "above": Trim(low=3.0, rescale=True),
    "drawn": Trim(keep=0.5, rescale=True),
    "drawn from a band": Trim(low=1.0, high=20.0, keep=0.25, gain=-2.0),
    "by rank": Trim(keep=0.6, spread=0.2, gain=0.5, rescale=True),
    "by rank, the small ones": Trim(low=1.0, keep=0.5, spread=-0.5),
}
ELECTIONS = [
    Election(*rule)
    for rule in product(("none", "total", "frequency"), (False, True), ("sum", "count", "weight"))
]
SEED = -(2**62) + 0x1234567


@pytest.fixture
def run(monkeypatch):
    """run(backend, op, ...)"""

    def call(backend: str, op: str, *args) -> Tensor:
        name, _, isa = backend.partition("-")
        monkeypatch.setenv("DOMERGE_CPU_ISA", isa)
        return on_device.call(op, *args, backend=name)

    return call


def whole_numbers(shape: str, seed: int = 0) -> tuple[Side, Side]:
    """A and B, of every dtype and layout in turn, whose τ_i are exact in float32."""
    m, n, ranks = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def factor(i: int, *size: int) -> Tensor:
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        return torch.randint(-3, 4, size, generator=generator).to(dtype)

    a = [factor(i, r, n + 5)[:, :n] for i, r in enumerate(ranks)]
    b = [factor(i, m, r).T if i % 2 else factor(i, r, m) for i, r in enumerate(ranks)]
    if seed % 2:
        b = [x.T.contiguous().T for x in b]
    scales = [(0.5, 2.0, -1.0, 0.25)[i % 4] for i in range(len(ranks))]
    return Side(tuple(a), (1.0,) * len(a)), Side(tuple(b), tuple(scales))


def drawing(a: Side) -> Draw:
    return Draw(SEED, 3, tuple(7 * i + 1 for i in range(len(a.blocks))))


def rules(a: Side, first: int = 0) -> tuple[list[Trim], list[float]]:
    """Every trim in turn, and weights that may add up to 0."""
    trims, count = list(TRIMS.values()), len(a.blocks)
    chosen = [trims[(first + i) % len(trims)] for i in range(count)]
    return chosen, [(1.0, -1.0, 2.0, 0.25)[i % 4] for i in range(count)]


def updates(a: Side, b: Side) -> list[np.ndarray]:
    """Every τ_i in float32, exact."""
    pairs = zip(a.blocks, b.blocks, b.scales, strict=True)
    return [(s * (y.T.double() @ x.double())).float().numpy() for x, y, s in pairs]


def philox(counter: list, seed: int) -> list[np.ndarray]:
    """Four words for every counter of four words, in uint64."""
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(*counter))
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (p1 >> half) ^ x1 ^ np.uint64(key0),
            p1 & word,
            (p0 >> half) ^ x3 ^ np.uint64(key1),
            p0 & word,
        )
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return [x0, x1, x2, x3]


def uniform(draw: Draw, i: int, m: int, n: int) -> np.ndarray:
    """The numbers in [0, 1) of adapter i's entries."""
    row, column = np.arange(m)[:, None], np.arange(n)
    words = philox([column // 4, row, draw.adapters[i], draw.module], draw.seed)
    return (np.choose(column % 4, words) >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


def trimmed(tau: np.ndarray, trim: Trim, draw: Draw, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Which entries are kept, and v_i."""
    m, n = tau.shape
    size = np.abs(tau)
    keep, spread = np.float32(trim.keep), np.float32(trim.spread)
    p = np.full((m, n), keep)
    if spread:
        ranks = size.argsort(axis=1, kind="stable").argsort(axis=1).astype(np.float32)
        q = ranks / np.float32(n - 1) if n > 1 else np.full((m, n), np.float32(0.5))
        p = (np.float64(2 * spread) * q + np.float64(keep - spread)).astype(np.float32)
    kept = (size >= np.float32(trim.low)) & (size <= np.float32(trim.high))
    kept &= uniform(draw, i, m, n) < p
    values = np.float32(trim.gain) * tau
    if trim.rescale:
        values = np.divide(values, p, out=np.zeros_like(values), where=kept)
    return kept, np.where(kept, values, np.float32(0))


def merged(values: list[np.ndarray], weights: list[float], election: Election) -> np.ndarray:
    """The merge of the v_i, entry by entry, in float32."""
    w = [np.float32(x) for x in weights]
    votes = [x * v if election.weighted else v for x, v in zip(w, values, strict=True)]
    agree = [np.ones(v.shape, bool) for v in values]
    if election.sign != "none":
        ballots = votes if election.sign == "total" else [np.sign(u) for u in votes]
        positive = sum(ballots, np.zeros_like(values[0])) >= 0
        agree = [np.where(positive, u > 0, u < 0) for u in votes]
    total = sum((x * v * g for x, v, g in zip(w, values, agree)), np.zeros_like(values[0]))
    if election.mean == "sum":
        return total
    shares = w if election.mean == "weight" else [np.float32(1)] * len(w)
    divisor = sum((x * g for x, g in zip(shares, agree)), np.zeros_like(values[0]))
    return total / np.where(divisor == 0, np.float32(1), divisor)


def row_sums(entries: np.ndarray) -> float:
    """In float64: 16 interleaved parts a row, parts in order, rows in order."""
    m, n = entries.shape
    padded = np.zeros((m, -(-n // 16), 16))
    padded.reshape(m, -1)[:, :n] = entries
    parts = padded.cumsum(axis=1)[:, -1]
    return float(parts.cumsum(axis=1)[:, -1].cumsum()[-1])


def assert_same(result: Tensor, expected: np.ndarray | Tensor, name: str = "") -> None:
    expected = torch.as_tensor(expected)
    assert result.dtype == expected.dtype, name
    assert torch.equal(result, expected), f"{name}: {int((result != expected).sum())} differ"


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_knows_philox(counter, seed, words):
    assert [f"{int(x):08x}" for x in philox(counter, seed)] == words.split()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_counts(run, backend, shape):
    for seed in (0, 1):
        a, b = whole_numbers(shape, seed)
        bits = [np.abs(tau).view(np.int32).ravel() for tau in updates(a, b)]
        upper = np.stack([np.bincount(x >> 15, minlength=1 << 16) for x in bits])
        assert_same(run(backend, "entry_counts", a, b), upper)
        prefixes = [int(x[len(x) // 2]) >> 15 for x in bits]
        lower = np.stack(
            [
                np.bincount(x[x >> 15 == p] & 0x7FFF, minlength=1 << 15)
                for x, p in zip(bits, prefixes, strict=True)
            ]
        )
        assert_same(run(backend, "entry_counts", a, b, prefixes), lower)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums(run, backend, shape):
    a, b = whole_numbers(shape)
    draw = drawing(a)
    for first in range(len(TRIMS)):
        trims, _ = rules(a, first)
        expected = [
            [np.abs(tau).sum(dtype=float), (np.abs(tau) * trimmed(tau, t, draw, i)[0]).sum()]
            for i, (tau, t) in enumerate(zip(updates(a, b), trims, strict=True))
        ]
        assert_same(run(backend, "entry_sums", a, b, trims, draw), np.array(expected, float))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_merge(run, backend, shape):
    for seed in (0, 1):
        a, b = whole_numbers(shape, seed)
        draw = drawing(a)
        for first, election in enumerate(ELECTIONS):
            trims, weights = rules(a, first)
            taus = enumerate(zip(updates(a, b), trims, strict=True))
            values = [trimmed(tau, trim, draw, i)[1] for i, (tau, trim) in taus]
            expected = np.float32(0.5) * merged(values, weights, election)
            result = run(backend, "entry_merge", a, b, trims, weights, election, draw, 0.5)
            assert_same(result, expected, f"{election}, trims from {first}")


@pytest.mark.parametrize("trim", TRIMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_election_of_adapters_trimmed_alike(run, backend, trim):
    a, b = whole_numbers("ragged", 2)
    draw, (_, weights) = drawing(a), rules(a)
    trims = [TRIMS[trim]] * len(a.blocks)
    values = [trimmed(tau, TRIMS[trim], draw, i)[1] for i, tau in enumerate(updates(a, b))]
    for election in ELECTIONS:
        result = run(backend, "entry_merge", a, b, trims, weights, election, draw, 2.0)
        assert_same(result, np.float32(2) * merged(values, weights, election), str(election))


def gaussian(m: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float32):
    case = random_case(ranks, n, m)
    return case.rows(dtype), case.columns(dtype)


def as_it_is(run, backend: str, a: Side, b: Side) -> Tensor:
    """τ_0, as the backend's merge of nothing else has it."""
    one = [Side(p.blocks[:1], p.scales[:1]) for p in (a, b)]
    return run(backend, "entry_merge", *one, [Trim()], [1.0], Election(), Draw(0, 0, (0,)))


@pytest.mark.parametrize("backend", FUSED)
def test_an_entry_is_a_chain_of_fused_operations(run, backend):
    a, b = gaussian(13, 150, (21, 3))
    x, left, right = np.zeros((13, 150), np.float32), b.blocks[0].numpy(), a.blocks[0].numpy()
    for k in range(21):
        x = (np.float64(left[k, :, None]) * right[k] + x).astype(np.float32)
    assert_same(as_it_is(run, backend, a, b), np.float32(b.scales[0]) * x)


@pytest.mark.parametrize("backend", FUSED)
def test_a_merge_is_a_chain_of_fused_operations(run, backend):
    a, b = gaussian(13, 150, (4, 3, 2))
    weights = [0.3, 0.7, -1.1]
    total = np.zeros((13, 150), np.float32)
    for i, w in enumerate(weights):
        one = [Side(p.blocks[i : i + 1], p.scales[i : i + 1]) for p in (a, b)]
        total = (np.float64(np.float32(w)) * as_it_is(run, backend, *one).numpy() + total).astype(
            np.float32
        )
    rest = [Trim()] * 3, weights, Election(), Draw(0, 0, (0, 1, 2)), 0.1
    assert_same(run(backend, "entry_merge", a, b, *rest), np.float32(0.1) * total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 17, 300])
def test_the_order_of_sums(run, backend, n):
    a, b = gaussian(41, n, (9,))
    tau = as_it_is(run, backend, a, b).numpy()
    for trim in (Trim(low=0.5, high=3.0), Trim(keep=0.5)):
        draw = drawing(a)
        kept, _ = trimmed(tau, trim, draw, 0)
        expected = [[row_sums(np.abs(tau)), row_sums(np.abs(tau) * kept)]]
        assert_same(run(backend, "entry_sums", a, b, [trim], draw), np.array(expected))


def everything(run, backend: str, a: Side, b: Side) -> list[Tensor]:
    """The bits of all that the ops say."""
    draw, (trims, weights) = drawing(a), rules(a, 1)
    trims = [t if math.isinf(t.high) else Trim(low=0.7, high=5.0, gain=0.3) for t in trims]
    counts = run(backend, "entry_counts", a, b)
    found = [counts, run(backend, "entry_counts", a, b, counts.argmax(1).tolist())]
    found.append(run(backend, "entry_sums", a, b, trims, draw).view(torch.int64))
    for election in (Election(), Election("total", True, "weight"), Election("frequency")):
        result = run(backend, "entry_merge", a, b, trims, weights, election, draw, 0.7)
        found.append(result.view(torch.int32))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_agree(run, dtype):
    for shape in ((61, 407, (5, 33, 1, 16)), (9, 1500, (3,) * 20)):
        sides = gaussian(*shape, dtype)
        expected = everything(run, CPU[0], *sides)
        for other in CPU[1:]:
            for result, same in zip(everything(run, other, *sides), expected, strict=True):
                assert_same(result, same, other)


@pytest.mark.parametrize("backend", CPU)
def test_threads_change_nothing(run, backend, threads):
    sides = gaussian(1200, 70, (3, 9, 1), torch.bfloat16)
    threads(1)
    expected = everything(run, backend, *sides)
    for count in (2, 3, 7):
        threads(count)
        for result, same in zip(everything(run, backend, *sides), expected, strict=True):
            assert_same(result, same, f"{count} threads")


@pytest.mark.parametrize("backend", FUSED)
def test_neither_do_tiles(run, backend):
    """An entry is the same in a smaller module, and beside other adapters that weigh nothing."""
    a, b = gaussian(150, 1000, (4, 33, 2))
    draw, election = drawing(a), Election("total", True, "sum")
    trims, weights = [Trim(low=0.2), Trim(keep=0.4, rescale=True), Trim(gain=0.3)], [0.3, -0.7, 1.1]

    def merge(m: int, n: int, extra: int) -> Tensor:
        x = Side(
            tuple(p[:, :n] for p in a.blocks) + (a.blocks[1][:, :n],) * extra, (1.0,) * (3 + extra)
        )
        y = Side(
            tuple(p[:, :m] for p in b.blocks) + (b.blocks[1][:, :m],) * extra,
            b.scales + (1.0,) * extra,
        )
        more = Draw(draw.seed, draw.module, draw.adapters + (50,) * extra)
        given = trims + [Trim()] * extra, weights + [0.0] * extra
        return run(backend, "entry_merge", x, y, *given, election, more)

    whole = merge(150, 1000, 0)
    for m, n, extra in ((150, 1000, 30), (1, 1000, 0), (77, 95, 5), (9, 3, 0), (150, 97, 1)):
        assert_same(merge(m, n, extra), whole[:m, :n], f"{m} x {n}, {extra} more")
