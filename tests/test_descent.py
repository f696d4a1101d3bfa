"""The rule of the descent on R x R matrices, in float64: where it ends, and in how many steps."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from domerge_fast.backends import descent, paper

TOL = 1e-3
SHARED = (0.0, 0.3, 0.6, 0.9)
SPREADS = (1, 6, 36)
SHAPES = {"2 adapters": (2, 8, 512), "8 adapters": (8, 8, 512), "16 adapters": (16, 4, 256)}


def adapters(
    count: int, rank: int, d: int, shared: float, spread: float, seed: int | None = None
) -> list[Tensor]:
    """X_i at random, a share of whose energy lies in the same `rank` directions, and whose norms
    spread over a factor, in no order."""
    generator = torch.Generator().manual_seed(count if seed is None else seed)
    common = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, math.log10(spread), count, dtype=torch.float64)
    blocks = []
    for i in torch.randperm(count, generator=generator).tolist():
        own = torch.randn(rank, d, generator=generator, dtype=torch.float64)
        mixture = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        x = math.sqrt(1 - shared) * own + math.sqrt(shared / rank) * mixture @ common
        blocks.append(sizes[i] * x)
    return blocks


def descend(x: list[Tensor], **rule: float) -> tuple[int, float]:
    """Steps taken and f at the end, in float64."""
    stacked = torch.cat(x)
    ranks = tuple(len(block) for block in x)
    given = {"gamma": 1.0, "steps": 300, "tol": TOL, **rule}
    _, stats = descent.in_gram_form((stacked @ stacked.T)[None], ranks, "squared", **given)
    return int(stats[0, 0]), float(stats[0, 2])


@functools.cache
def ends(shape: str, shared: float, spread: float, gamma: float = 1.0) -> tuple[int, float]:
    """Steps to the default tolerance, and the share of the optimum's f that is left there."""
    x = adapters(*SHAPES[shape], shared, spread)
    steps, found = descend(x, gamma=gamma)
    _, best = descend(x, gamma=gamma, tol=1e-11)
    assert found >= best * (1 - 1e-9)
    return steps, found / best - 1


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_ends_within_tol_of_the_converged_optimum(shape, shared, spread):
    steps, gap = ends(shape, shared, spread)
    assert gap <= TOL
    assert steps <= 9


@pytest.mark.parametrize("gamma", [0.1, 10.0])
@pytest.mark.parametrize("shared", [0.0, 0.9])
@pytest.mark.parametrize("spread", [1, 36])
def test_it_ends_within_tol_whatever_gamma(shared, spread, gamma):
    assert ends("8 adapters", shared, spread, gamma)[1] <= TOL


def test_sixty_four_adapters_that_overlap():
    for spread, most in ((1, 6), (36, 8)):
        x = adapters(64, 4, 1024, 0.5, spread)
        steps, found = descend(x)
        _, best = descend(x, steps=60, tol=1e-9)
        assert found <= (1 + TOL) * best
        assert steps <= most


@pytest.mark.parametrize("seed", range(4))
def test_gains_that_fall_less_and_less_end_no_descent_early(seed):
    """Steps along the directions that all share gain a thousand times what is left after them."""
    x = adapters(64, 8, 1024, 0.7, 1, seed)
    steps, found = descend(x)
    assert found <= (1 + TOL) * descend(x, steps=60, tol=1e-9)[1]
    assert steps <= 5


def test_even_sets_take_no_more_steps_than_they_need():
    """Three: two ratios of gains are known from then on."""
    assert [ends(shape, 0.0, 1)[0] for shape in SHAPES] == [3, 3, 3]


@pytest.mark.parametrize("spread", [100, 1000])
def test_norms_far_apart_cost_few_steps(spread):
    x = adapters(8, 4, 256, 0.6, spread)
    steps, found = descend(x)
    assert steps <= 12
    assert found <= (1 + TOL) * descend(x, tol=1e-11)[1]


def test_it_says_where_it_had_too_few_steps():
    x = adapters(*SHAPES["8 adapters"], 0.9, 36)
    steps, found = descend(x, steps=3)
    assert steps == 3
    assert found > (1 + TOL) * descend(x, tol=1e-11)[1]


def test_adapters_that_hardly_overlap_hold_nobody_up():
    """Without gamma, the curvature along their rows is next to nothing."""
    x = adapters(4, 4, 64, 0.5, 1)
    width = x[0].shape[1]
    far = torch.zeros(4, 2 * width, dtype=torch.float64)
    far[:, width:] = adapters(1, 4, width, 0.0, 1)[0]
    far[:, 0] = 1e-9
    wide = [torch.nn.functional.pad(block, (0, width)) for block in x]
    rule = {"gamma": 0.0, "steps": 12, "tol": 0.0}
    before = float(paper.loss(x, x, gamma=0.0))
    _, alone = descend(x, **rule)
    _, together = descend([*wide, far], **rule)
    assert alone < 0.1 * before
    assert together < 0.1 * before


def gains(*numbers: float) -> list[Tensor]:
    return [torch.tensor([x], dtype=torch.float64) for x in numbers]


def test_what_is_left_is_judged_by_the_worse_of_two_ratios():
    allowed = torch.tensor([1.0], dtype=torch.float64)
    # 3 * .4 * .4 / .6 = .8, and with the ratio before that, .5, it is 1.2
    assert descent.enough(gains(2.5, 1.0, 0.4), allowed)
    assert not descent.enough(gains(2.0, 1.0, 0.4), allowed)
    assert not descent.enough(gains(1.0, 0.4), allowed)
    assert not descent.enough(gains(1.0, 1.0, 1.0), allowed)
    assert descent.enough(gains(0.1), allowed)
    assert not descent.enough(gains(0.11), allowed)


def test_what_is_left_is_judged_problem_by_problem():
    found = descent.enough(
        [torch.tensor([2.5, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.4, 0.4])],
        torch.tensor([1.0, 1.0]),
    )
    assert found.tolist() == [True, False]
