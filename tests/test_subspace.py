"""Directions of least and of most energy, against all eigenvalues in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from domerge_fast.algebra import subspace

N = 240


def spread(decay: float, rank: int = N) -> Tensor:
    """C [N, N] whose eigenvalues fall by this power, and are 0 from the rank on."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    values = torch.arange(1, N + 1, dtype=torch.float64) ** -decay
    values[rank:] = 0
    return (q * values) @ q.T


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned(c: Tensor) -> tuple[Tensor, Tensor]:
    """The same C in other coordinates, and these."""
    q = torch.linalg.qr(torch.randn(N, N, generator=generator(9), dtype=torch.float64))[0]
    return q @ c @ q.T, q


@pytest.fixture(params=["whole", "iterated"])
def solver(request, monkeypatch):
    if request.param == "iterated":
        monkeypatch.setattr(subspace, "WHOLE", 16)
        monkeypatch.setattr(subspace, "BLOCK", 16)
    return request.param


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 3.0])
def test_the_smallest_are_those_of_all_eigenvalues(decay, solver):
    c = spread(decay)
    rows = subspace.inside(subspace.smallest(c, 8, generator()), 8, generator())
    least = torch.linalg.eigvalsh(c)[:8].sum()
    assert (rows @ c @ rows.T).trace() <= 1.02 * least + 8e-6
    torch.testing.assert_close(rows @ rows.T, torch.eye(8).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [1, 100, N - 8, N - 3])
def test_without_full_rank_they_lie_off_the_range(rank, solver):
    """And are random there by the seed, where there is a choice."""
    c = spread(1.0, rank)
    first, same, other = (
        subspace.inside(subspace.smallest(c, 8, generator(k)), 8, generator(k)) for k in (0, 0, 1)
    )
    free = N - rank
    for rows in (first, other):
        held = (rows @ c @ rows.T).trace() / c.trace()
        assert held < (1e-6 if free >= 8 else 0.01)
    assert torch.equal(first, same)
    overlap = (first @ other.T).square().sum() / 8
    assert overlap < 0.3 if free > 100 else overlap > 0.5 if free < 9 else True


def test_directions_of_no_energy_are_no_eigensolver_s_choice():
    """Other coordinates, in which it returns others, give the same rows but for the seed's."""
    c = spread(1.0, 100)
    other, q = turned(c)
    basis, basis_of_other = (subspace.smallest(x, 8, generator()) for x in (c, other))
    torch.testing.assert_close(basis @ basis.T, q.T @ basis_of_other @ basis_of_other.T @ q)
    start = torch.randn(8, N, generator=generator(), dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(140, 140, generator=generator(3)).double())[0]
    rows = [subspace.orthonormal((start @ x) @ x.T) for x in (basis, basis @ mixed)]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize(("decay", "energy"), [(1.0, 0.6), (2.0, 0.99), (3.0, 0.999), (0.2, 0.9)])
def test_the_largest_hold_the_energy_and_are_the_fewest(decay, energy, solver):
    c = spread(decay)
    basis = subspace.largest(c, energy, None, generator())
    values = torch.linalg.eigvalsh(c).flip(0)
    fewest = int((values.cumsum(0) / c.trace() < energy).sum()) + 1
    assert fewest <= basis.shape[1] <= fewest + 1 + fewest // 50
    assert (basis.T @ c @ basis).trace() / c.trace() >= energy - 1e-5
    rows = subspace.off(basis, 8, generator())
    assert (rows @ basis).norm() < 1e-12
    torch.testing.assert_close(rows @ rows.T, torch.eye(8).double(), atol=1e-12, rtol=0)


def test_a_number_of_the_largest_takes_what_is_equal_to_the_last(solver):
    values = torch.ones(N, dtype=torch.float64)
    values[:3] = torch.tensor([9.0, 5.0, 5.0])
    c, _ = turned(values.diag())
    for count, found in ((1, 1), (2, 3), (3, 3)):
        assert subspace.largest(c, None, count, generator()).shape[1] == found


def test_what_is_seen_is_one_for_random_rows_and_holds_for_any_basis_of_them():
    c = spread(1.0)
    rows = torch.randn(N // 2, N, generator=generator(), dtype=torch.float64)
    assert subspace.seen(torch.eye(N).double(), c) == pytest.approx(1.0)
    assert subspace.seen(rows, c) == pytest.approx(1.0, abs=0.3)
    turn = torch.randn(N // 2, N // 2, generator=generator(), dtype=torch.float64)
    assert subspace.seen(turn @ rows, c) == pytest.approx(subspace.seen(rows, c))
