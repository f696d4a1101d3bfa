"""DOGE: what its correction keeps and leaves alone, and the authors' descent beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.close import assert_close, distance
from support.merges import adapters, at_one, dense
from support.shapes import CASES, Case, random_case
from torch import Tensor
from torch.nn.functional import normalize

import domerge_fast as dm

CASE = random_case((4, 5, 3), 41, 29)
DELTAS = CASE.deltas()


def merged(case: Case, **options: object) -> Tensor:
    return dense(at_one(adapters({"x": case}), "doge", dtype="float32", **options), "x")


def beginning(deltas: Sequence[Tensor], eta: float = 0.3) -> Tensor:
    """S: the updates at one norm, their mean norm times η."""
    mean = sum(d.norm() for d in deltas) / len(deltas)
    return sum(eta * mean * d / d.norm() for d in deltas)


def left_vectors(deltas: Sequence[Tensor], ranks: Sequence[int], count: int) -> Tensor:
    """The first left singular vectors of those of all updates, [m, count]."""
    all_of_them = [torch.linalg.svd(d)[0][:, :r] for d, r in zip(deltas, ranks)]
    return torch.linalg.svd(torch.cat(all_of_them, 1))[0][:, :count]


def kept(update: Tensor) -> Tensor:
    """How far the update goes along every row of every adapter, over the length of that row."""
    return torch.stack([(d * update).sum(1) / d.square().sum(1) for d in DELTAS])


def test_the_correction_is_off_the_shared_subspace():
    u = left_vectors(DELTAS, CASE.ranks, round(12 / 6))
    correction = merged(CASE) - beginning(DELTAS)
    assert correction.norm() > 0.1 * beginning(DELTAS).norm()
    assert (u.T @ correction).norm() < 1e-6 * correction.norm()
    everywhere = merged(CASE, subspace=0.0) - beginning(DELTAS)
    assert (u.T @ everywhere).norm() > 0.05 * everywhere.norm()


def test_with_little_damping_every_row_of_every_adapter_is_kept():
    one = torch.ones(3, 29, dtype=torch.float64)
    assert distance(kept(merged(CASE, subspace=0.0, damping=1e-4)), one) < 1e-2
    assert distance(kept(beginning(DELTAS)), one) > 0.2
    assert distance(kept(sum(DELTAS)), one) > 0.2
    assert distance(merged(CASE, damping=1e9), beginning(DELTAS)) < 1e-6


@pytest.mark.parametrize("name", ["one adapter", "one row"])
def test_one_adapter_comes_back(name):
    case = CASES[name]
    assert distance(merged(case, weights=[-3]), -3 * case.deltas()[0]) < 1e-6


def test_no_size_has_a_meaning_of_its_own():
    larger = Case([8 * a for a in CASE.a], [3 * b for b in CASE.b], CASE.scalings)
    assert_close(merged(larger), 24 * merged(CASE), 1e-6)
    assert_close(merged(CASE, weights=[2, 2, 2]), 2 * merged(CASE), 1e-6)


def test_the_order_of_adapters_does_not_matter():
    turned = Case(CASE.a[::-1], CASE.b[::-1], CASE.scalings[::-1])
    assert_close(merged(turned), merged(CASE), 1e-6)


def test_an_end_of_the_subspace_between_equal_values_is_before_them():
    """No left vector is shared by adapters that do not meet: none is left alone."""
    case = random_case((3, 3), 20, 16)
    case.b[0][8:], case.b[1][:8] = 0, 0
    assert_close(merged(case, subspace=0.5), merged(case, subspace=0.0), 1e-6)


def test_a_row_and_an_adapter_of_zeros_change_nothing():
    with_zeros = Case([*CASE.a, CASE.a[0]], [*CASE.b, 0 * CASE.b[0]], [*CASE.scalings, 1.0])
    assert_close(merged(with_zeros), merged(CASE), 1e-6)
    case = random_case((4, 5, 3), 41, 29)
    case.b[0][3] = 0
    found = merged(case)
    assert torch.isfinite(found).all()
    assert distance(found, merged(CASE)) > 1e-3


def test_the_authors_descent_goes_the_same_way():
    """Adam on a dense correction, 400 steps, at a rate that fits these updates' entries."""
    deltas = [d / d.norm() for d in DELTAS]
    begin = beginning(deltas, 0.07)
    sum_of_gains = 0.07 * len(deltas)
    u = left_vectors(deltas, CASE.ranks, 2)
    correction = torch.zeros_like(begin, requires_grad=True)
    optimizer = torch.optim.Adam([correction], 1e-3)

    def loss() -> Tensor:
        rows = [(d * (d - begin - sum_of_gains * correction)).sum(1) for d in deltas]
        return torch.stack(rows).square().sum()

    first = float(loss())
    for _ in range(400):
        optimizer.zero_grad()
        loss().backward()
        assert correction.grad is not None
        correction.grad -= u @ (u.T @ correction.grad)
        optimizer.step()
    assert float(loss()) < 0.2 * first
    case = Case(CASE.a, [b / d.norm() for b, d in zip(CASE.b, DELTAS)], CASE.scalings)
    ours = merged(case, eta=0.07) - begin
    theirs = sum_of_gains * correction.detach()
    alike = (normalize(ours.flatten(), dim=0) * normalize(theirs.flatten(), dim=0)).sum()
    assert alike > 0.6


def test_it_has_a_scale_of_its_own():
    found = dm.merge(adapters({"x": CASE}), "doge")
    assert found.report.scale == 1.0
