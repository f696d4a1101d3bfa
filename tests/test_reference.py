"""The oracle's own proof: against autograd, against closed forms, against the formulas by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.close import assert_close
from support.shapes import CASES, SIDES, Case, exact, random_case

from domerge_fast.algebra.side import Side
from domerge_fast.backends import paper, reference
from domerge_fast.ops.orthogonalize import PENALTIES

SMALL = [name for name, case in CASES.items() if sum(case.ranks) < 65]


def factors(ranks=(3, 2, 4), d=17, seed=0) -> list[torch.Tensor]:
    return exact(random_case(ranks, d, 1, seed).rows())


def norm(blocks) -> float:
    return float(torch.cat(list(blocks)).norm())


@pytest.mark.parametrize("gamma", [0.0, 1.0, 7.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_gradient_is_that_of_the_loss(penalty, gamma):
    x = factors()
    x[1].zero_()
    x_hat = [(1.5 * xi + 0.3).requires_grad_() for xi in x]
    automatic = torch.autograd.grad(paper.loss(x_hat, x, penalty, gamma), x_hat)
    by_hand = paper.gradient([xi.detach() for xi in x_hat], x, penalty, gamma)
    for one, other in zip(by_hand, automatic, strict=True):
        assert_close(one, other, 1e-12)


def test_the_loss_by_hand():
    x = [torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[1.0, 0.0]]).double()]
    x_hat = [torch.tensor([[2.0, 4.0]]).double(), x[1]]
    assert float(paper.loss(x_hat, x, "squared", 10.0)) == pytest.approx(2 * 4 / 5 + 10)
    root = (4 + (1e-3 * 5) ** 2) ** 0.5
    assert float(paper.loss(x_hat, x, "frobenius", 10.0)) == pytest.approx(2 * root + 10)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_loss_falls_step_by_step_and_is_what_is_reported(penalty):
    x = factors()
    size = norm(x) ** 2
    losses = []
    for steps in range(8):
        x_hat, stats = paper.descend(x, penalty, 1.0, steps, tol=0.0)
        assert stats[0] == steps
        unit = (size / 9) ** 0.5
        scaled = paper.loss([xi / unit for xi in x_hat], [xi / unit for xi in x], penalty)
        assert stats[2] == pytest.approx(float(scaled) * unit**2, rel=1e-9)
        losses.append(stats[2])
    assert stats[1] == pytest.approx(losses[0], rel=1e-12)
    assert all(new < old for old, new in itertools.pairwise(losses))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_other_statistics_are_those_of_the_result(penalty):
    x = factors()
    x_hat, stats = paper.descend(x, penalty)
    moved = norm(xi - yi for xi, yi in zip(x_hat, x, strict=True)) / norm(x)
    assert stats[4] == pytest.approx(moved, rel=1e-9)

    def cross_energy(blocks):
        h = torch.cat(blocks) @ torch.cat(blocks).T
        own = torch.block_diag(*(b @ b.T for b in blocks))
        return float((h - own).square().sum())

    assert stats[3] == pytest.approx(cross_energy(x_hat) / cross_energy(x), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_scale_of_the_factors_has_no_influence(penalty, scale):
    x = factors()
    x_hat, stats = paper.descend(x, penalty)
    scaled, scaled_stats = paper.descend([scale * xi for xi in x], penalty)
    assert stats[0] == scaled_stats[0] > 3
    for one, other in zip(x_hat, scaled, strict=True):
        assert_close(other / scale, one, 1e-8)
    assert scaled_stats[2] / scale**2 == pytest.approx(stats[2], rel=1e-9)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_it_stops_at_tol(penalty):
    x = factors()
    _, loose = paper.descend(x, penalty, steps=300, tol=1e-2)
    _, last_but_one = paper.descend(x, penalty, steps=int(loose[0]) - 1, tol=0.0)
    _, tight = paper.descend(x, penalty, steps=300, tol=1e-8)
    assert 1 < loose[0] < tight[0] < 300
    assert last_but_one[2] - loose[2] <= 1e-2 * last_but_one[2]
    assert tight[2] < loose[2]


def test_a_converged_descent_has_no_gradient_left():
    x = factors()
    x_hat, _ = paper.descend(x, "squared", steps=300, tol=0.0)
    before = norm(paper.gradient(x, x))
    assert norm(paper.gradient(x_hat, x)) < 1e-6 * before


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_two_equal_rows_shrink_to_the_root_of_a_cubic(gamma):
    """Both become α x, and f / |x|^2 = 2 α^4 + 2 γ (α - 1)^2 is least at 2 α^3 = γ (1 - α)."""
    x = torch.tensor([[1.0, -2.0, 0.5]]).double()
    x_hat, _ = paper.descend([x, x.clone()], "squared", gamma, steps=200, tol=0.0)
    alpha = float(x_hat[0][0, 0])
    assert 2 * alpha**3 == pytest.approx(gamma * (1 - alpha), rel=1e-6)
    assert_close(torch.cat(x_hat), alpha * torch.cat([x, x]))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_nothing_moves_where_nothing_collides(penalty):
    alone, stats = paper.descend(factors(ranks=(5,)), penalty)
    assert_close(alone[0], factors(ranks=(5,))[0], 1e-15)
    assert len(alone) == 1
    assert stats[0] == stats[1] == stats[2] == stats[4] == 0
    axes = torch.eye(6).double().split([2, 4])
    apart, stats = paper.descend(axes, penalty)
    assert stats[0] == 0
    assert torch.equal(torch.cat(apart), torch.eye(6).double())


def test_two_updates_decoupled_by_hand():
    """Columns (3, 0) and (0, 4): the mean length 3.5 along the mean direction (1, 1) / 2."""
    a = [torch.ones(1, 1), torch.ones(1, 1)]
    b = [torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0], [4.0]])]
    merged = paper.do_merging(a, b, [0.5, 0.5], orthogonalize=False)
    assert_close(merged, torch.tensor([[1.75], [1.75]]).double(), 1e-15)
    unit = paper.do_merging(a, b, [0.5, 0.5], orthogonalize=False, renormalize=True, scale=2)
    assert_close(unit, 7 / 2**0.5 * torch.ones(2, 1).double(), 1e-15)


@pytest.mark.parametrize("renormalize", [False, True])
def test_decoupling_is_the_formula_column_by_column(renormalize):
    case = random_case((3, 2, 4), 13, 11)
    omega = [0.5, -0.2, 0.3]
    merged = paper.do_merging(
        case.a, case.exact_b(), omega, orthogonalize=False, renormalize=renormalize, scale=3
    )
    for c in range(13):
        columns = [delta[:, c] for delta in case.deltas()]
        length = sum(abs(w) * x.norm() for w, x in zip(omega, columns, strict=True))
        direction = sum(w * x / x.norm() for w, x in zip(omega, columns, strict=True))
        if renormalize:
            direction = direction / direction.norm()
        assert_close(merged[:, c], 3 * length * direction, 1e-12)


@pytest.mark.parametrize("sides", ["both", "A", "B"])
def test_orthogonalized_sides_enter_the_merge(sides):
    case = CASES["odd d"]
    a, b = [x.double() for x in case.a], case.exact_b()
    merged = paper.do_merging(a, b, case.omegas, sides=sides, decouple=False)
    if sides != "B":
        a, _ = paper.descend(a)
    if sides != "A":
        b = [x.T for x in paper.descend([x.T for x in b])[0]]
    expected = sum(w * bi @ ai for w, ai, bi in zip(case.omegas, a, b, strict=True))
    assert_close(merged, expected, 1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_adapter_comes_back_as_it_is(penalty):
    case = CASES["one adapter"]
    merged = paper.do_merging(case.a, case.exact_b(), [1.0], penalty=penalty)
    assert_close(merged, case.deltas()[0], 1e-13)


def test_zero_updates_add_nothing_and_no_nan():
    case = CASES["zero factors"]
    merged = paper.do_merging(case.a, case.exact_b(), case.omegas, orthogonalize=False)
    (alone,) = (i for i, delta in enumerate(case.deltas()) if delta.any())
    w = case.omegas[alone]
    assert_close(merged, abs(w) * w * case.deltas()[alone], 1e-12)


# The ops of the backend, each against the literal method or a property that defines it.


@pytest.mark.parametrize("layout", SIDES)
@pytest.mark.parametrize("name", SMALL)
def test_gram_and_block_gram_are_inner_products_of_rows(name, layout):
    problem: Side = SIDES[layout](CASES[name])
    rows = [row for block in exact(problem) for row in block]
    expected = torch.stack([torch.stack([(x * y).sum() for y in rows]) for x in rows])
    assert_close(reference.gram([problem])[0], expected, 1e-12)
    ends = itertools.accumulate(problem.ranks)
    own = [
        expected[end - r : end, end - r : end].flatten()
        for end, r in zip(ends, problem.ranks, strict=True)
    ]
    assert_close(reference.block_gram([problem])[0], torch.cat(own), 1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", ["odd d", "zero factors", "d below R", "rank 1 before 64"])
def test_orthogonalize_on_the_gram_is_the_descent_on_the_factors(name, penalty):
    problem = CASES[name].rows()
    expected, stats = paper.descend(exact(problem), penalty, steps=4, tol=0.0)
    c, found = reference.orthogonalize(
        reference.gram([problem]), [problem.ranks], penalty, steps=4, tol=0.0
    )
    assert_close(c[0] @ torch.cat(exact(problem)), torch.cat(expected))
    assert found[0].tolist() == pytest.approx(stats, rel=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_apply_decouple_times_b_is_the_literal_merge(name, renormalize):
    case: Case = CASES[name]
    a, b = case.rows(), case.columns()
    generator = torch.Generator().manual_seed(0)
    c = torch.eye(a.rank) + 0.1 * torch.randn(a.rank, a.rank, generator=generator)
    moved = (c.double() @ torch.cat(exact(a))).split(list(a.ranks))
    results, norms = reference.apply_decouple(
        [c],
        [a],
        reference.block_gram([b]),
        [case.omegas],
        1.5,
        torch.float64,
        reference.gram([b]) if renormalize else None,
    )
    expected = paper.do_merging(
        moved,
        case.exact_b(),
        case.omegas,
        orthogonalize=False,
        renormalize=renormalize,
        scale=1.5,
    )
    b_stacked = torch.cat(case.exact_b(), 1)
    assert_close(b_stacked @ results[0], expected)
    lengths = [float((bi @ ai).norm()) for ai, bi in zip(moved, case.exact_b(), strict=True)]
    assert norms[0].tolist() == pytest.approx(lengths, rel=1e-6, abs=1e-30)
