"""The elementwise ops on the GPU backends, against plain PyTorch and the definition to the bit.

Factors of small integers have products and sums that are exact in float32 in any order.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support import on_device as ops
from support.on_device import GPU
from torch import Tensor

from domerge_fast.algebra.entry_rules import LOW_BITS, Draw, Election, Trim
from domerge_fast.algebra.side import Side

pytestmark = pytest.mark.usefixtures("nan_poison")

RULES = list(
    itertools.product(("none", "total", "frequency"), (False, True), ("sum", "count", "weight"))
)
RANKS = (3, 1, 2)
DRAW = Draw(0xFEDCBA9876543210 - (1 << 64), 7, (5, 0, 11))
TRIMS = (
    Trim(low=1.0, high=8.0, keep=0.5, gain=2.0, rescale=True),
    Trim(keep=0.25, gain=0.5),
    Trim(low=2.0),
)
WEIGHTS = (1.0, -0.5, 2.0)

every_backend = pytest.mark.parametrize("backend", GPU)
every_layout = pytest.mark.parametrize("layout", ["stored", "turned", "mixed"])


def integers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).to(torch.bfloat16)


def fine(*shape: int) -> Tensor:
    """Numbers whose products are no float32, and whose sums of products are exact in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8191, 8192, shape, generator=generator).float() / 4096


def module(m: int, n: int, make=integers, scales=(0.5, 2.0, -1.0)) -> tuple[Side, Side]:
    """Both sides as they are stored: rows of A, columns of B."""
    a = Side(tuple(make(r, n) for r in RANKS), (9.0,) * len(RANKS))
    return a, Side(tuple(make(m, r).T for r in RANKS), scales)


def turned(x: Tensor) -> Tensor:
    """The same matrix in the other memory layout."""
    return x.contiguous() if x.T.is_contiguous() else x.T.contiguous().T


def relaid(problem: Side, layout: str) -> Side:
    """In another memory layout; "mixed": every block in its own, and in its own dtype."""
    first, second, third = problem.blocks
    if layout == "turned":
        return Side(tuple(map(turned, problem.blocks)), problem.scales)
    if layout == "mixed":
        wide = third.double().repeat(2, 2)[: third.shape[0], : third.shape[1]]
        return Side((first.half(), turned(second), wide), problem.scales)
    return problem


def same(op: str, *args, backend: str) -> Tensor:
    """What the backend finds, which must be what plain PyTorch does."""
    expected = ops.call(op, *args, backend="torch")
    found = ops.call(op, *args, backend=backend)
    assert torch.equal(found, expected)
    return found


# entry_counts


@every_backend
@every_layout
def test_counts(layout, backend):
    a, b = (relaid(x, layout) for x in module(37, 75))
    counts = same("entry_counts", a, b, backend=backend)
    assert counts.sum(1).tolist() == [37 * 75] * 3
    prefixes = [1 + int(x) for x in counts[:, 1:].argmax(1)]
    behind = same("entry_counts", a, b, prefixes, backend=backend)
    assert behind.sum(1).tolist() == [int(c[p]) for c, p in zip(counts, prefixes)]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counts_of_other_dtypes(dtype, backend):
    a, b = module(5, 66, lambda *shape: integers(*shape).to(dtype))
    same("entry_counts", a, b, backend=backend)


@every_backend
def test_counts_of_sizes_that_are_not_usual(backend):
    """Subnormal numbers, huge ones and zeros."""
    a, b = module(9, 21, scales=(2.0**-130, 2.0**90, 0.0))
    counts = same("entry_counts", a, b, backend=backend)
    assert counts[2, 0] == 9 * 21
    assert counts[0, 1:256].sum() > 0
    behind = same("entry_counts", a, b, [16, 3, 0], backend=backend)
    assert behind[0].sum() == counts[0, 16] > 0
    assert behind[2].sum() == 9 * 21


@every_backend
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 1100), (65, 3), (64, 64)])
def test_counts_of_shapes_that_hurt(m, n, backend):
    a, b = module(m, n)
    assert same("entry_counts", a, b, backend=backend).sum() == 3 * m * n


# entry_sums


@every_backend
@every_layout
def test_sums(layout, backend):
    a, b = (relaid(x, layout) for x in module(37, 75))
    sums = same("entry_sums", a, b, TRIMS, DRAW, backend=backend)
    assert (sums[:, 1] > 0).all()
    assert (sums[:, 1] < sums[:, 0]).all()


@every_backend
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1100, 2), (65, 17)])
def test_sums_of_shapes_that_hurt(m, n, backend):
    same("entry_sums", *module(m, n), TRIMS, DRAW, backend=backend)


def uneven(problem: Side) -> Side:
    """With columns so different in size that sums over them depend on their order in float64."""
    generator = torch.Generator().manual_seed(problem.d)
    sizes = 2.0 ** torch.randint(-40, 20, (problem.d,), generator=generator)
    return Side(tuple(sizes * block for block in problem.blocks), problem.scales)


def summed(x: Tensor) -> float:
    """The sum of a matrix in the order that is promised."""
    parts = torch.zeros(len(x), 16, dtype=torch.float64)
    for column in range(x.shape[1]):
        parts[:, column % 16] += x[:, column].double()
    total = 0.0
    for row in parts.tolist():
        total += sum(row[1:], row[0])
    return total


@every_backend
def test_sums_are_added_in_the_order_that_is_promised(backend):
    a, b = map(uneven, module(67, 83, fine))
    trims = (Trim(low=0.5), Trim(high=1.0), Trim(keep=0.5))
    sums = ops.call("entry_sums", a, b, trims, DRAW, backend=backend)
    for i, trim in enumerate(trims):
        tau = chain(a, b, i)
        assert sums[i, 0] == summed(tau.abs())
        if trim.keep == 1.0:
            kept = (tau.abs() >= trim.low) & (tau.abs() <= trim.high)
            assert sums[i, 1] == summed(tau.abs() * kept)


# entry_merge


@every_backend
@pytest.mark.parametrize(("sign", "weighted", "mean"), RULES)
def test_merge(sign, weighted, mean, backend):
    election = Election(sign, weighted, mean)
    merged = same(
        "entry_merge", *module(35, 70), TRIMS, WEIGHTS, election, DRAW, 0.75, backend=backend
    )
    assert 0.2 < merged.count_nonzero() / merged.numel() < 1.0


@every_backend
@every_layout
def test_merge_of_other_layouts(layout, backend):
    a, b = (relaid(x, layout) for x in module(37, 75))
    rule = (TRIMS, WEIGHTS, Election("total", True, "weight"), DRAW, 1.0)
    same("entry_merge", a, b, *rule, backend=backend)


@every_backend
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 131), (65, 3), (64, 64)])
def test_merge_of_shapes_that_hurt(m, n, backend):
    rule = (TRIMS, WEIGHTS, Election("frequency", False, "count"), DRAW, 1.0)
    same("entry_merge", *module(m, n), *rule, backend=backend)


@every_backend
def test_what_is_drawn_depends_on_every_number(backend):
    a, b = module(8, 12)
    trims = (Trim(keep=0.5),) * 3
    draws = [
        Draw(1, 2, (0, 1, 2)),
        Draw(1 | 1 << 40, 2, (0, 1, 2)),
        Draw(1, 3, (0, 1, 2)),
        Draw(1, 2, (0, 1, 3)),
    ]
    found = [
        same("entry_merge", a, b, trims, WEIGHTS, Election(), draw, 1.0, backend=backend)
        for draw in draws
    ]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(found, 2))


def chain(a: Side, b: Side, i: int) -> Tensor:
    """τ_i of fine factors to the bit."""
    x = torch.zeros(b.d, a.d)
    for row, column in zip(a.blocks[i].double(), b.blocks[i].double()):
        x = (x.double() + column[:, None] * row).float()
    return b.scales[i] * x


@every_backend
def test_updates_are_what_is_promised_to_the_bit(backend):
    a, b = module(40, 70, fine, scales=(0.7, -1.3, 2.1))
    for i, scale in enumerate(b.scales):
        one = Side((a.blocks[i],), (1.0,)), Side((b.blocks[i],), (scale,))
        rule = ([Trim()], [1.0], Election(), Draw(0, 0, (0,)), 1.0)
        merged = ops.call("entry_merge", *one, *rule, backend=backend)
        assert torch.equal(merged, chain(a, b, i))


@every_backend
def test_a_long_chain_is_summed_in_order(backend):
    a = Side((fine(70, 9),), (1.0,))
    b = Side((fine(6, 70).T,), (1.0,))
    rule = ([Trim()], [1.0], Election(), Draw(0, 0, (0,)), 1.0)
    merged = ops.call("entry_merge", a, b, *rule, backend=backend)
    assert torch.equal(merged, chain(a, b, 0))
    counts = ops.call("entry_counts", a, b, backend=backend)
    bits = chain(a, b, 0).view(torch.int32).flatten() & 0x7FFFFFFF
    assert torch.equal(counts[0], torch.bincount(bits >> LOW_BITS, minlength=1 << 16))


@every_backend
def test_trims_that_need_the_ranks_of_a_row_are_those_of_plain_pytorch(backend):
    a, b = module(8, 30)
    trims = (Trim(keep=0.5, spread=0.2), *TRIMS[1:])
    same("entry_sums", a, b, trims, DRAW, backend=backend)
    rule = (trims, WEIGHTS, Election("total"), DRAW, 1.0)
    same("entry_merge", a, b, *rule, backend=backend)


def run(backend: str) -> list[Tensor]:
    """Every op on factors whose sums depend on their order."""
    a, b = module(70, 1100, fine)
    counts = ops.call("entry_counts", a, b, backend=backend)
    prefixes = counts.argmax(1).tolist()
    return [
        counts,
        ops.call("entry_counts", a, b, prefixes, backend=backend),
        ops.call("entry_sums", a, b, TRIMS, DRAW, backend=backend),
        *(
            ops.call(
                "entry_merge", a, b, TRIMS, WEIGHTS, Election(*rule), DRAW, 0.3, backend=backend
            )
            for rule in RULES
        ),
    ]
