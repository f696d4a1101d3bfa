"""What the CUDA kernels compute on tensor cores, on the host's (csrc/cuda/warp.h): accuracy, bias,
and every way that factors can lie in memory. test_cuda_on_host.py runs it under sanitizers.

A tensor core does not round what it adds, it cuts: long sums of squares would come out small.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_ops
import torch
from support.close import assert_close, assert_within
from support.shapes import CASES, SIDES, exact, random_case
from test_cuda_on_host import inside, run_both_ways
from torch import Tensor

from domerge_fast import ops
from domerge_fast.algebra.side import Side
from domerge_fast.backends import reference
from domerge_fast.backends.gpu import host

pytestmark = [inside, pytest.mark.usefixtures("nan_poison")]

HALVES = (torch.bfloat16, torch.float16)
FORMATS = (*HALVES, torch.float32)
ALLOWED = 2e-6
"""A fifth of what an op may be off (gate of the benchmarks: 1e-5)."""
CUTS = (-1, 1, 2)
"""Exact sums, and tensor cores that keep so many bits more than a float32 has: those of compute
capability 8.0 are said to keep one, those of 9.0 two (arXiv 2403.00232)."""


@pytest.fixture(params=CUTS)
def bits(request) -> Iterator[int]:
    from domerge_fast import _cuda

    _cuda.set_extra_bits(request.param)
    yield request.param
    _cuda.set_extra_bits(-1)


def uniform(*shape: int, dtype: torch.dtype) -> Tensor:
    """As A is initialised; the mean of its products with itself is not zero."""
    generator = torch.Generator().manual_seed(shape[-1])
    return (torch.rand(*shape, generator=generator) - 0.5).to(dtype)


def errors(found: Tensor, x: Tensor) -> tuple[float, float]:
    """The largest error of a Gram, and the mean one of its diagonal with its sign: shares of
    the norms' products."""
    x = x.double()
    norms = x.norm(dim=1)
    relative = (found.double() - x @ x.T) / (norms[:, None] * norms)
    return float(relative.abs().max()), float(relative.diagonal().mean())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("d", [4096, 14336])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_long_grams_are_neither_off_nor_biased(layout, d, dtype, bits):
    x = uniform(16, d, dtype=dtype)
    block = x if layout == "rows" else x.T.contiguous().T
    (found,) = ops.gram([Side((block,), (1.0,))], backend="cuda")
    worst, bias = errors(found, x)
    assert worst <= ALLOWED
    assert abs(bias) <= ALLOWED


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rank", [32, 64, 128, 150])
def test_grams_of_every_size_are_within_a_fifth(rank, dtype, bits):
    x = uniform(rank, 520, dtype=dtype)
    (found,) = ops.gram([Side((x,), (1.0,))], backend="cuda")
    assert max(map(abs, errors(found, x))) <= ALLOWED


def alike() -> list[tuple[list[int], int]]:
    """Ranks and d, so that vectors of eight are whole, in halves, of several blocks, and cut."""
    ranks = [[8, 8], [4, 8, 12], [4, 4, 4, 4], [2, 6], [3, 5, 1], [16, 20, 7], [40, 50, 45]]
    return [(r, d) for r in ranks for d in (64, 72, 36, 41)]


@pytest.mark.parametrize("layout", SIDES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_blocks_of_any_rank_and_length_are_read_whole(dtype, layout):
    cases = [random_case(r, d, d + 3) for r, d in alike()]
    sides = [SIDES[layout](case, dtype) for case in cases]
    found = run_both_ways(lambda: ops.gram(sides, backend="cuda"))
    for side, gram in zip(sides, found, strict=True):
        assert errors(gram, torch.cat(exact(side)))[0] <= ALLOWED


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_factors_may_begin_anywhere_and_lie_in_larger_ones(shift, dtype):
    whole = uniform(24, 200, dtype=dtype)
    rows = whole[3:19, shift : shift + 80]
    columns = whole.T[shift : shift + 150, 4 + shift : 20 + shift].T
    for x in (rows, columns):
        (found,) = ops.gram([Side((x, x[:5]), (1.0, 1.0))], backend="cuda")
        assert errors(found, torch.cat([x, x[:5]]))[0] <= ALLOWED


BLOCKS = [[3, 8, 5], [16, 9], [17, 32], [64, 40], [65, 3], [130, 72]]
"""Ranks of the adapters, for each size of a tile, and of several tiles."""


@pytest.mark.parametrize("ranks", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("layout", SIDES)
def test_block_grams_are_those_of_float64(layout, dtype, ranks):
    sides = [SIDES[layout](random_case(ranks, d, d + 1), dtype) for d in (41, 264, 530)]
    found = run_both_ways(lambda: ops.block_gram(sides, backend="cuda"))
    for side, packed in zip(sides, found, strict=True):
        squares = packed.split([r * r for r in ranks])
        for x, r, gram in zip(exact(side), ranks, squares, strict=True):
            gram = gram.view(r, r)
            norms = x.norm(dim=1)
            off = (gram - x @ x.T) / (norms[:, None] * norms)
            assert float(off.abs().max()) <= 1e-14
            assert torch.equal(gram, gram.T)


def coefficients(rows: int, rank: int) -> Tensor:
    """Rows of very different sizes, as any C may have, entries too."""
    generator = torch.Generator().manual_seed(rank)
    c = torch.randn(rows, rank, generator=generator) * torch.rand(rows, rank, generator=generator)
    return c * 10.0 ** torch.randint(-9, 9, (rows, 1), generator=generator)


PRODUCTS = [([1], 1), ([8, 8], 16), ([4, 12], 30), ([3, 5, 1], 9), ([16] * 4, 64), ([40, 60], 128)]
PRODUCTS += [([128, 40], 200), ([100, 100, 90], 33), ([64] * 5, 20)]
"""Ranks of the adapters, and rows of C: also more than are in shared memory at a time."""


def products(layout: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Side]]:
    cases = [random_case(r, d, d, 7) for r, _ in PRODUCTS for d in (530, 77)]
    sides = [SIDES[layout](case, dtype) for case in cases]
    return [coefficients(rows, sum(r)) for r, rows in PRODUCTS for _ in range(2)], sides


def expected(cs: list[Tensor], sides: list[Side]) -> Iterator[tuple[Tensor, Tensor]]:
    """C X, and the size of what is added up to each of its entries."""
    for c, side in zip(cs, sides, strict=True):
        x = torch.cat(exact(side))
        yield c.double() @ x, c.double().abs() @ x.abs()


@pytest.mark.parametrize("layout", SIDES)
def test_products_of_float16_are_within_a_fifth_before_rounding(layout, bits):
    cs, sides = products(layout, torch.float16)
    found = ops.apply(cs, sides, torch.float32, backend="cuda")
    for result, (right, size) in zip(found, expected(cs, sides), strict=True):
        assert_within(result, right, size, ALLOWED)


@pytest.mark.parametrize("layout", SIDES)
@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_rounded_once(dtype, layout, bits):
    """Two parts of C in bfloat16 have 16 bits, which shows where one product is all there is."""
    cs, sides = products(layout, dtype)
    cs = [c / c.norm(dim=1, keepdim=True) for c in cs]
    found = run_both_ways(lambda: ops.apply(cs, sides, dtype, backend="cuda"))
    for result, (right, size) in zip(found, expected(cs, sides), strict=True):
        assert_within(result, right, size, 1e-5)


def test_bfloat16_to_float32_is_computed_in_float32():
    cs, sides = products("rows", torch.bfloat16)
    found = ops.apply(cs, sides, torch.float32, backend="cuda")
    for result, (right, size) in zip(found, expected(cs, sides), strict=True):
        assert_within(result, right, size, 1e-6)


DECOUPLED = [([16] * 8, 140), ([3, 5, 1], 30), ([4, 8, 12], 41), ([1] * 20, 33), ([40, 60], 33)]
DECOUPLED += [([100, 100, 50], 20), ([100, 100, 90], 20), ([270, 20], 9)]
"""Ranks and d: R in shared memory and beyond it, and r beyond what kernels find roots of."""


def decoupled(
    dtype: torch.dtype, out_dtype: torch.dtype, moved: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A', what it should be, and how much an error of all that is added up to it changes it."""
    cases = [random_case(r, d, sum(r) + 9, 11) for r, d in DECOUPLED]
    cs = [coefficients(sum(r), sum(r)).float() for r, _ in DECOUPLED]
    cs = [c / c.norm(dim=1, keepdim=True) for c in cs]
    sides, omegas = [case.rows(dtype) for case in cases], [case.omegas for case in cases]
    blocks = ops.block_gram([case.columns() for case in cases], backend="cuda")
    given = cs if moved else [None] * len(cs)
    found, norms = ops.apply_decouple(given, sides, blocks, omegas, 1.5, out_dtype, backend="cuda")
    for case, side, c, result, sizes in zip(cases, sides, cs, found, norms, strict=True):
        x = torch.cat(exact(side))
        c = c.double() if moved else torch.eye(len(x), dtype=torch.float64)
        ranks = list(case.ranks)
        a, added = (c @ x).split(ranks), (c.abs() @ x.abs()).split(ranks)
        mags = torch.stack([(b @ y).norm(dim=0) for b, y in zip(case.exact_b(), a)])
        off = torch.stack([(b.abs() @ y).norm(dim=0) for b, y in zip(case.exact_b(), added)])
        assert_within(sizes, mags.norm(dim=1), off.norm(dim=1), ALLOWED if moved else 5e-7)
        omega = torch.tensor(case.omegas, dtype=torch.float64)[:, None]
        factors = 1.5 * omega * (omega.abs() * mags).sum(0) / mags
        merged_off = (omega.abs() * off).sum(0) / (omega.abs() * mags).sum(0)
        right = torch.cat([f * y for f, y in zip(factors, a)])
        change = [
            f.abs() * (y + z.abs() * (own + merged_off))
            for f, y, z, own in zip(factors, added, a, off / mags, strict=True)
        ]
        yield result, right, torch.cat(change)


def test_decoupled_products_of_float16_are_within_a_fifth_before_rounding(bits):
    for result, right, change in decoupled(torch.float16, torch.float32):
        assert_within(result, right, change, ALLOWED)


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_decoupled_products_are_rounded_once(dtype, moved, bits):
    for result, right, change in decoupled(dtype, dtype, moved):
        assert_within(result, right, change, 1e-5)


def test_magnitudes_have_the_accuracy_of_float32(bits):
    """S a of float32 is made on tensor cores too, in parts of TF32."""
    for result, right, change in decoupled(torch.float32, torch.float32, moved=False):
        assert_within(result, right, change, 5e-7)


DESCENTS = [[8, 8], [20, 10], [16] * 4, [40, 50], [16] * 8, [90, 70], [120, 90], [3, 250, 1, 46]]
"""Ranks of the adapters, for each size that R is padded to, and for tiles."""


@pytest.mark.parametrize("ranks", DESCENTS, ids=sum)
def test_descents_are_within_a_fifth(ranks, bits):
    """Two steps, in which all products are made: each adapter's factors, and the objective."""
    x = exact(random_case(ranks, 300, 300, 5).rows())
    x = [block + 0.3 * x[0].abs().mean() for block in x]
    expected, (_, *objectives, _, _) = reference.descend(x, "squared", 1.0, 2, 0.0)
    found, (steps, *reached, _, _), _ = test_ops.descend(x, "cuda", steps=2, tol=0.0)
    assert steps == 2
    for result, right, block in zip(found, expected, x, strict=True):
        assert_close(result, right, ALLOWED, float(block.norm()))
    assert reached == pytest.approx(objectives, rel=ALLOWED)


def test_no_rank_is_left_to_library_calls(monkeypatch):
    monkeypatch.setattr(host, "library", None)
    case = random_case([100, 100, 90], 20, 30)
    blocks = ops.block_gram([case.columns()], backend="cuda")
    given = [None], [case.rows(torch.bfloat16)], blocks, [case.omegas]
    (found,), _ = ops.apply_decouple(*given, 1.0, torch.bfloat16, backend="cuda")
    assert found.isfinite().all()
    (found,), _ = ops.orthogonalize([torch.eye(290)], [case.ranks], steps=1, backend="cuda")
    assert torch.equal(found, torch.eye(290))


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_order_of_threads_has_no_influence(dtype):
    sides = [make(case, dtype) for case in CASES.values() for make in SIDES.values()]
    run_both_ways(lambda: ops.gram(sides, backend="cuda"))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_order_of_threads_has_no_influence_on_decoupled_products(dtype):
    run_both_ways(lambda: [x for x, *_ in decoupled(dtype, dtype)])
