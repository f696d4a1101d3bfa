"""Descents on the factors whose lines are estimated: what that saves, and what is done where it
fails."""

from __future__ import annotations

import math

import pytest
import torch
from support.close import assert_close
from torch import Tensor

from domerge_fast import _C, ops
from domerge_fast.algebra.side import Side
from domerge_fast.backends import factor_descent
from domerge_fast.backends.factor_descent import in_factor_form

COUNT, RANK, D = 65, 8, 512
TOL = 1e-3
SETS = {
    "at random": (D // 8, 0.0, 1.0, 0),
    "half shared, uneven": (D // 8, 0.5, 36.0, 0),
    "two directions shared, uneven": (2, 0.7, 36.0, 1),
    "four directions shared": (4, 0.95, 1.0, 0),
}


@pytest.fixture(params=_C.isas())
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("DOMERGE_CPU_ISA", request.param)
    return request.param


def rows(name: str) -> Tensor:
    """Adapters with a share of their energy in common directions, logarithms of norms even."""
    dims, shared, spread, seed = SETS[name]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    common = torch.linalg.qr(normal(D, dims))[0].T
    order = torch.randperm(COUNT, generator=generator)
    sizes = torch.logspace(0, math.log10(spread), COUNT)[order]
    blocks = []
    for size in sizes:
        own, along = normal(RANK, D), normal(RANK, dims) @ common
        own, along = own / own.norm(), along / along.norm()
        blocks.append(size * (math.sqrt(shared) * along + math.sqrt(1 - shared) * own))
    return torch.cat(blocks)


def descend(x: Tensor, tol: float = TOL, steps: int = 50) -> tuple[Tensor, list[float]]:
    x_hat, stats = in_factor_form(x, (RANK,) * COUNT, 1.0, steps, tol)
    return x_hat, stats.tolist()


@pytest.fixture
def grams(monkeypatch) -> list[int]:
    """How many sums [d, d] were made."""
    made = [0]
    squares = factor_descent._squares

    def counted(y: Tensor, way: factor_descent.Products) -> factor_descent._Sums:
        made[0] += 1
        return squares(y, way)

    monkeypatch.setattr(factor_descent, "_squares", counted)
    return made


def exactly(x: Tensor, monkeypatch, **rule: float) -> tuple[Tensor, list[float]]:
    with monkeypatch.context() as changed:
        changed.setattr(factor_descent, "ESTIMATED_COLUMNS", D + 1)
        return descend(x, **rule)


@pytest.mark.parametrize("name", SETS)
def test_the_optimum_is_as_near_as_the_tolerance_says(name, monkeypatch):
    x = rows(name).double()
    _, best = exactly(x, monkeypatch, tol=1e-11, steps=400)
    x_hat, stats = descend(x)
    # Without a step f at a place is that of its start.
    form = factor_descent._Factors(x, (RANK,) * COUNT, 1.0, factor_descent.DOUBLE)
    form.h = factor_descent._squares(form.root * x_hat.view_as(form.x), form.way)
    reached = form.overlap() + float((x_hat - x).square().sum())
    assert best[2] * (1 - 1e-9) <= reached <= (1 + TOL) * best[2]
    assert stats[2] == pytest.approx(reached, rel=0.1 * TOL)


def test_a_step_has_one_gram_and_the_last_none(grams):
    _, stats = descend(rows("at random"))
    assert stats[0] >= 3
    assert grams[0] == 2 + stats[0] - 1


def test_below_some_tolerance_lines_are_exact(grams, monkeypatch):
    _, stats = descend(rows("at random"), tol=0.99 * factor_descent.ESTIMATED_TOL)
    assert grams[0] == 2 + 2 * stats[0]
    _, same = exactly(rows("at random"), monkeypatch, tol=0.99 * factor_descent.ESTIMATED_TOL)
    assert stats == same


@pytest.mark.parametrize("name", ["at random", "two directions shared, uneven"])
def test_estimates_that_fail_are_followed_by_exact_lines(name, grams, monkeypatch):
    """After one Gram more, of the direction: as many as an exact line has."""
    x = rows(name).double()
    monkeypatch.setattr(factor_descent, "DISAGREEMENT", -1.0)
    monkeypatch.setattr(factor_descent, "LITTLE", 0.0)
    x_hat, stats = descend(x, steps=3)
    assert stats[0] == 3
    assert grams[0] == 2 + 2 * 3
    expected, found = exactly(x, monkeypatch, steps=3)
    assert_close(x_hat, expected, 1e-9)
    assert stats == pytest.approx(found, rel=1e-9)


def test_where_no_estimate_is_sure_nothing_changes(monkeypatch):
    x = rows("half shared, uneven")
    expected, found = exactly(x, monkeypatch)
    monkeypatch.setattr(factor_descent, "DEVIATIONS", math.inf)
    x_hat, stats = descend(x)
    assert torch.equal(x_hat, expected)
    assert stats == found


def test_some_sets_have_estimates_that_fail_and_some_that_are_not_sure(grams):
    """Those on which the kernels are compared."""
    for name in ("two directions shared, uneven", "four directions shared"):
        grams[0] = 0
        _, stats = descend(rows(name))
        assert 2 + stats[0] - 1 < grams[0] < 2 + 2 * stats[0]


@pytest.mark.parametrize("name", SETS)
def test_the_kernels_take_the_same_steps(name, isa):
    if isa == "baseline" and name != "at random":
        pytest.skip("takes long")
    x = rows(name)
    (x_hat,), stats = ops.orthogonalize_factors([Side.split(x, (RANK,) * COUNT)], backend="cpu")
    expected, found = descend(x.double())
    assert_close(x_hat.double(), expected, 1e-5)
    assert stats[0].tolist() == pytest.approx(found, rel=1e-4)
