"""Schatten norms from Grams, against singular values."""

from __future__ import annotations

import pytest
import torch
from support.shapes import CASES, random_case
from torch import Tensor

from domerge_fast.methods.spectral import schatten

ORDERS = (2, 6, 16)
SIZES = (1e-20, 1e-3, 1.0, 1e20)

every_order = pytest.mark.parametrize("order", ORDERS)


def norm(update: Tensor, order: int) -> float:
    """(sum_k σ_k^q)^(1/q), the largest σ taken out first."""
    s = torch.linalg.svdvals(update.double())
    return float(s[0] * (s / s[0]).pow(order).sum() ** (1 / order)) if s[0] > 0 else 0.0


def of_product(a: Tensor, b: Tensor, order: int) -> float:
    a, b = a.double(), b.double()
    return float(schatten.schatten((b.T @ b)[None], (a @ a.T)[None], order))


@every_order
@pytest.mark.parametrize("name", CASES)
def test_the_norm_of_every_adapter_is_that_of_its_singular_values(name, order):
    case = CASES[name]
    grams_a = torch.cat([(a.double() @ a.double().T).flatten() for a in case.a])
    grams_b = torch.cat([(b.T @ b).flatten() for b in case.exact_b()])
    found = schatten.of_adapters(grams_a[None], grams_b[None], case.ranks, order)
    assert found.shape == (1, len(case.ranks))
    expected = [norm(delta, order) for delta in case.deltas()]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-9)


@every_order
@pytest.mark.parametrize("of_a", SIZES)
@pytest.mark.parametrize("of_b", SIZES)
def test_no_size_is_too_small_or_too_large(of_a, of_b, order):
    case = random_case((4,), 9, 7)
    a, b = case.a[0].double() * of_a, case.b[0].double() * of_b
    assert of_product(a, b, order) == pytest.approx(norm(b @ a, order), rel=1e-9)


@every_order
def test_directions_that_depend_on_each_other_count_once(order):
    case = random_case((3,), 11, 9)
    a = torch.cat([case.a[0], 2 * case.a[0]])
    b = torch.cat([case.b[0], case.b[0]], 1)
    assert of_product(a, b, order) == pytest.approx(norm(b.double() @ a.double(), order), rel=1e-9)


@every_order
def test_the_norm_of_nothing_is_zero(order):
    a, b = torch.zeros(3, 5), torch.ones(4, 3)
    assert of_product(a, b, order) == 0
    assert of_product(b.T, a.T, order) == 0


@every_order
def test_opposite_halves_that_cancel_leave_rounding_noise_at_most(order):
    case = random_case((3,), 11, 9)
    a = torch.cat([case.a[0], case.a[0]])
    b = torch.cat([case.b[0], -case.b[0]], 1)
    size = norm(case.b[0] @ case.a[0], 2)
    assert 0 <= of_product(a, b, order) < 1e-6 * size


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@every_order
def test_norms_of_merged_factors(order, backend):
    cases = [random_case((r,), n, m, seed=r) for r, n, m in ((1, 5, 3), (4, 9, 7), (6, 4, 8))]
    pairs = [(case.a[0], case.b[0]) for case in cases]
    expected = [norm(b.double() @ a.double(), order) for a, b in pairs]
    assert schatten.of_products(pairs, order, backend) == pytest.approx(expected, rel=1e-6)


@every_order
def test_norms_of_singular_triplets_and_of_other_factors_in_one_batch(order):
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(4, 9, 7, generator=generator, dtype=torch.float64))
    left, right = u[..., :5] * s[:, None, :5], vh[:, :5].clone()
    left[1, :, 2:], left[2] = 0.0, 0.0
    right[3] = right[3].flip(1) + right[0]  # of which nothing is orthogonal
    right = 1e12 * right
    found = schatten.of_triplets(left, right, order)
    expected = [norm(x @ y, order) for x, y in zip(left, right, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_large_order_is_near_the_largest_singular_value_and_2_is_the_frobenius_norm():
    case = random_case((5,), 21, 17)
    delta = case.b[0].double() @ case.a[0].double()
    largest = float(torch.linalg.svdvals(delta)[0])
    assert largest < of_product(case.a[0], case.b[0], 64) < 1.03 * largest
    assert of_product(case.a[0], case.b[0], 2) == pytest.approx(float(delta.norm()), rel=1e-12)


def test_the_diagonal_blocks_of_a_gram_lie_one_after_the_other():
    gram = torch.arange(25.0).reshape(5, 5)
    expected = [*gram[:2, :2].flatten().tolist(), *gram[2:, 2:].flatten().tolist()]
    assert schatten.packed(gram, (2, 3)).tolist() == expected
