"""Where a descent may have ended above `tol`, the report says so; where none did, it does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_descent import SHAPES, TOL, adapters, descend
from torch import Tensor

import domerge_fast as dm
from domerge_fast.formats import from_tensors

SAID = "do's descents may have ended above tol, which is estimated: "


def merged(x: Sequence[Tensor], alike: bool = False, **options: object) -> tuple[list[str], float]:
    """What the report says of the descent on B of adapters whose B^T are x, and how far above the
    optimum it ended, as a share. alike: with A that make the norms of their updates alike."""
    generator = torch.Generator().manual_seed(0)
    found = [
        from_tensors(
            {"x": (torch.randn(len(own), 24, generator=generator) / size, own.float().T)},
            1.0,
            name=str(i),
        )
        for i, own in enumerate(x)
        for size in [float(own.norm()) if alike else 1.0]
    ]
    report = dm.merge(found, "do", scale=1.0, **options).report
    b = report.modules["x"].b
    assert b
    _, best = descend(list(x), tol=1e-11, gamma=options.get("gamma", 1.0))
    return [note for note in report.notes if "tol" in note], b.objective_after / best - 1


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("report", ["full", "norms"])
def test_it_says_where_norms_are_far_apart(report, alike):
    """Three adapters whose gains fall ten times a step, and then no more, whatever their A are."""
    notes, left = merged(adapters(3, 4, 64, 0.6, 300, 0), alike, report=report)
    assert left > 2 * TOL
    assert notes == [f"{SAID}norms of adapters' A or B are up to 322 times apart"]


def test_it_says_nothing_of_norms_that_a_descent_makes():
    """Of a single output one of two adapters keeps nearly nothing."""
    generator = torch.Generator().manual_seed(4)
    found = [
        from_tensors(
            {"x": (torch.randn(r, 5, generator=generator), torch.randn(1, r, generator=generator))},
            1.0,
            name=str(r),
        )
        for r in (4, 2)
    ]
    report = dm.merge(found, "do", scale=1.0, gamma=1e-3).report
    left = report.modules["x"].magnitudes.values()
    assert max(left) > 1e5 * min(left)
    assert [note for note in report.notes if "tol" in note] == [f"{SAID}gamma is below 1"]


@pytest.mark.parametrize("seed", [0, 4])
def test_it_says_where_gamma_is_less_than_was_tried(seed):
    """Two steps gain nearly all, the third little, and later ones more than that."""
    x = adapters(*SHAPES["2 adapters"], 0.1, 36, seed)
    notes, left = merged(x, gamma=0.1)
    assert left > TOL
    assert notes == [f"{SAID}gamma is below 1"]


def test_it_says_where_tol_is_less_than_was_tried():
    notes, left = merged(adapters(*SHAPES["2 adapters"], 0.0, 6, 0), tol=1e-5)
    assert left > 2e-5
    assert notes == [f"{SAID}tol is below 0.001"]


def test_it_says_where_steps_ran_out():
    notes, left = merged(adapters(*SHAPES["8 adapters"], 0.9, 36), steps=3)
    assert left > TOL
    assert notes == [f"{SAID}some took all 3 steps"]


def test_it_says_so_of_the_other_penalty():
    notes, _ = merged(adapters(*SHAPES["2 adapters"], 0.3, 1), penalty="frobenius", tol=0.1)
    assert notes == [f"{SAID}the penalty is 'frobenius'"]


@pytest.mark.parametrize("spread", [1, 36])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_says_nothing_else(shape, spread):
    notes, left = merged(adapters(*SHAPES[shape], 0.6, spread))
    assert left < TOL
    assert notes == []


def test_it_says_nothing_where_none_descends():
    found = [
        from_tensors({"x": (torch.randn(4, 24), x.float().T)}, 1.0)
        for x in adapters(2, 4, 64, 0, 999)
    ]
    for options in ({"orthogonalize": False}, {"steps": 0}):
        assert not [x for x in dm.merge(found, "do", **options).report.notes if "tol" in x]
    assert not [x for x in dm.merge(found[:1], "do").report.notes if "tol" in x]
