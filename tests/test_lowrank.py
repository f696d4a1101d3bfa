"""Cutting dense updates to a rank, beside the exact SVD in float64."""

from __future__ import annotations

import pytest
import torch
from support.close import assert_within
from support.merges import at_one
from support.shapes import random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast.algebra.lowrank import compress
from domerge_fast.formats import from_tensors

SHAPES = [(60, 40), (40, 60), (7, 90), (90, 7), (1, 5), (1, 1)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, m: int, n: int) -> Tensor:
    return gaussian(m, rank) @ gaussian(rank, n, seed=1)


def decaying(m: int, n: int) -> Tensor:
    """Singular values that fall as 1 / k."""
    values = 1 / torch.arange(1.0, min(m, n) + 1)
    u, v = (torch.linalg.qr(gaussian(d, len(values), seed=d)).Q for d in (m, n))
    return u * values @ v.T


def ties(m: int, n: int, count: int = 4) -> Tensor:
    """What TIES makes of random adapters: a few directions above a flat spectrum."""
    case = random_case((8,) * count, n, m)
    adapters = [
        from_tensors({"x": (case.a[i], case.b[i])}, name=f"adapter-{i}") for i in range(count)
    ]
    return at_one(adapters, "ties", form="deltas", backend="torch").delta("x")


def energies(delta: Tensor) -> Tensor:
    """The share of ||delta||_F^2 that the best approximation of every rank keeps."""
    squares = torch.linalg.svdvals(delta.double()).square()
    return squares.cumsum(0) / squares.sum()


def check(delta: Tensor, a: Tensor, b: Tensor, kept: float, total: float) -> None:
    """The factors' shapes and their balance, and that the report of them is true."""
    (m, n), k = delta.shape, len(a)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((k, n), (m, k), delta.dtype, delta.dtype)
    size = float(delta.double().square().sum())
    assert total == pytest.approx(size, rel=1e-12)
    lost = float((delta.double() - b.double() @ a.double()).square().sum())
    assert kept == pytest.approx(1 - lost / size, abs=2e-6)
    rows, columns = a.double() @ a.double().T, b.double().T @ b.double()
    assert_within(rows, columns, size**0.5)
    assert (rows - rows.diag().diag()).abs().max() <= 1e-5 * size**0.5


@every_shape
def test_an_update_of_low_rank_is_kept_whole(shape):
    rank = min(5, *shape)
    delta = of_rank(rank, *shape)
    for extra in (0, 3, 100):
        a, b, kept, total = compress(delta, rank + extra, None)
        assert len(a) == min(rank + extra, *shape)
        check(delta, a, b, kept, total)
        assert kept == pytest.approx(1.0, abs=1e-6)
        assert (b.double() @ a.double() - delta).norm() <= 2e-6 * delta.norm()


@every_shape
def test_all_of_the_rank_is_all_of_the_update(shape):
    delta = gaussian(*shape)
    for rank in (min(shape), 1000):
        a, b, kept, _ = compress(delta, rank, None)
        assert len(a) == min(shape)
        assert (b.double() @ a.double() - delta).norm() <= 2e-6 * delta.norm()
        assert kept == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("make", "least"),
    [(decaying, 0.9999), (ties, 0.995), (gaussian, 0.92)],
    ids=["decaying", "ties", "flat"],
)
def test_nearly_as_much_is_kept_as_can_be(make, least, turned):
    delta = make(300, 400).T if turned else make(300, 400)
    best = energies(delta)
    for rank in (1, 4, 16, 64):
        a, b, kept, total = compress(delta, rank, None)
        assert len(a) == rank
        check(delta, a, b, kept, total)
        assert least * best[rank - 1] <= kept <= best[rank - 1] + 1e-6


@pytest.mark.parametrize("make", [decaying, ties, gaussian])
@pytest.mark.parametrize("energy", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_an_energy_is_reached_with_hardly_more_than_the_least_rank(energy, make):
    delta = make(120, 150)
    best = energies(delta)
    least = 1 + int((best < energy * (1 - 1e-6)).sum())
    a, b, kept, total = compress(delta, None, energy)
    check(delta, a, b, kept, total)
    assert kept >= energy * (1 - 2e-6)
    assert least <= len(a) <= 1.05 * least + 1
    a, b, kept, total = compress(delta, 10, energy)
    check(delta, a, b, kept, total)
    assert len(a) == min(10, len(compress(delta, None, energy)[0]))


def test_all_the_energy_of_an_update_of_low_rank_takes_no_more_than_its_rank():
    a, _, kept, _ = compress(of_rank(40, 130, 110), None, 1.0)
    assert (len(a), kept) == (40, pytest.approx(1.0, abs=1e-6))


@every_shape
def test_nothing_stays_nothing(shape):
    delta = torch.zeros(shape)
    for rank, energy, k in ((3, None, min(3, *shape)), (None, 0.9, 1), (3, 1.0, 1)):
        a, b, kept, total = compress(delta, rank, energy)
        assert (a.shape, b.shape) == ((k, shape[1]), (shape[0], k))
        assert not a.any()
        assert not b.any()
        assert (kept, total) == (1.0, 0.0)


@pytest.mark.parametrize("size", [2.0**-80, 2.0**-34, 2.0**34, 2.0**56])
def test_size_does_not_matter(size):
    delta = of_rank(6, 50, 40)
    a, b, kept, total = compress(size * delta, 4, None)
    check(delta, a / size**0.5, b / size**0.5, kept, total / size**2)
    assert kept == pytest.approx(float(energies(delta)[3]), abs=1e-6)


def test_the_same_update_gives_the_same_factors_whatever_was_drawn_before():
    delta = gaussian(50, 60)
    first = compress(delta, 5, None)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = compress(delta.clone(), 5, None)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_and_the_merge_is_refused(value):
    delta = gaussian(5, 6)
    delta[1, 2] = value
    a, b, _, _ = compress(delta, 3, 0.5)
    assert a.isnan().all()
    assert b.isnan().all()
    adapter = from_tensors({"x": (torch.ones(1, 6), torch.ones(5, 1))})
    with pytest.raises(dm.DomergeError, match=r"module 'x': the merged update does not fit"):
        at_one([adapter], "ties", density=1.0, scale=3e98, weights=[2.0])
