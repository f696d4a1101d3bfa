"""Descents on the factors with products of bfloat16 numbers and float32 sums, as GPUs make them
(backends/factor_descent.py); those of csrc/cpu are tested with its kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from domerge_fast.backends import factor_descent
from domerge_fast.backends.factor_descent import HALF, HALF_TOL, SINGLE, _found, in_factor_form

RANKS, D = (8,) * 90, 512
"""720 rows of 512 columns."""


def factors(shared: float, spread: float) -> Tensor:
    """[R, D] in float32, rounded to bfloat16: rows of which `shared` of the energy lies in a space
    of 16 dimensions, and adapters whose norms go up to `spread` times the least."""
    generator = torch.Generator().manual_seed(3)
    rows = sum(RANKS)
    own = torch.randn(rows, D, generator=generator)
    common = torch.randn(rows, 16, generator=generator) @ torch.randn(16, D, generator=generator)
    sizes = torch.logspace(0, torch.tensor(spread).log10(), len(RANKS)).repeat_interleave(8)
    mixed = (1 - shared) ** 0.5 * own + (shared / 16) ** 0.5 * common
    return (sizes[:, None] * mixed).bfloat16().float()


@pytest.fixture
def emulated(monkeypatch) -> list[torch.Size]:
    """Such products on the CPU: those of numbers in bfloat16 are exact in float32. The shapes of
    what they made."""
    made = []

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == y.dtype == torch.bfloat16
        product = x.float() @ y.float()
        made.append(product.shape)
        return product

    monkeypatch.setattr(factor_descent, "HALF", dataclasses.replace(HALF, multiply=multiply))
    monkeypatch.setattr(factor_descent, "multiplies_half", lambda device: True)
    return made


def true_objective(x: Tensor, x_hat: Tensor) -> float:
    """In float64, for gamma = 1."""
    x, x_hat = x.double(), x_hat.double()
    norms = torch.stack([part.norm() for part in x.split(RANKS)])
    grams = x_hat @ x_hat.T
    blocks = grams.view(len(RANKS), 8, len(RANKS), 8).square().sum((1, 3))
    pairs = blocks / (norms[:, None] * norms)
    return float(pairs.sum() - pairs.trace() + (x_hat - x).square().sum())


@pytest.mark.parametrize("tol", [1e-3, HALF_TOL])
@pytest.mark.parametrize(("shared", "spread"), [(0.0, 1.0), (0.5, 1.0), (0.9, 1.0), (0.3, 36.0)])
def test_a_descent_ends_where_that_of_float32_does(emulated, shared, spread, tol):
    """Within half of tol: the stop itself is an estimate."""
    x = factors(shared, spread)
    found, stats = in_factor_form(x, RANKS, 1.0, 50, tol)
    assert torch.Size((sum(RANKS), D)) in emulated  # Y S
    assert torch.Size((D, D)) in emulated  # a Gram
    other, _, _ = _found(x, RANKS, 1.0, 50, tol, SINGLE)
    ends, usual = true_objective(x, found), true_objective(x, other)
    assert ends <= (1 + tol / 2) * usual
    assert float(stats[2]) == pytest.approx(ends, rel=tol)


@pytest.mark.parametrize(
    ("x", "tol"),
    [
        (torch.ones(720, D), HALF_TOL / 2),
        (torch.ones(720, D - 1), 1e-3),
        (torch.ones(504, D), 1e-3),
        (torch.ones(720, D, dtype=torch.float64), 1e-3),
    ],
    ids=["tolerance", "columns", "rows", "float64"],
)
def test_of_others_products_are_exact(emulated, x, tol):
    in_factor_form(x, (8,) * (len(x) // 8), 1.0, 1, tol)
    assert not emulated


def test_where_one_adapter_dominates_all_is_done_again_in_float32(emulated):
    x = factors(0.0, 1.0)
    x[:8] *= 50
    found, stats = in_factor_form(x, RANKS, 1.0, 50, 1e-3)
    assert emulated
    expected, wanted, _ = _found(x, RANKS, 1.0, 50, 1e-3, SINGLE)
    assert torch.equal(found, expected)
    assert torch.equal(stats, wanted)


def test_a_cpu_has_none_of_the_librarys():
    assert not factor_descent.multiplies_half(torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_ends_within_tol():
    device = torch.device("cuda")
    if not factor_descent.multiplies_half(device):
        pytest.skip("this torch or this GPU has no products of bfloat16 with float32 sums")
    x = factors(0.5, 1.0)
    sides = (x.bfloat16().to(device), x[:64].bfloat16().T.contiguous().T.to(device))
    for side in sides:
        product = HALF.multiply(side, side.T)
        assert product.dtype == torch.float32
        assert torch.allclose(product.cpu(), (side.float() @ side.float().T).cpu(), rtol=1e-4)
    found, _ = in_factor_form(x.to(device), RANKS, 1.0, 50, 1e-3)
    _, best = in_factor_form(x.double(), RANKS, 1.0, 300, 1e-13)
    assert true_objective(x, found.cpu()) <= (1 + 1e-3) * float(best[2])
