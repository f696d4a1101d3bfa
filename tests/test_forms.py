"""Which form of the descent a side takes, and that either ends at the same optimum."""

from __future__ import annotations

import pytest
import torch
from support.merges import adapters, dense
from support.shapes import random_case

import domerge_fast as dm
from domerge_fast import _C, ops
from domerge_fast.backends import cpu, descent_rates
from domerge_fast.backends.descent_rates import CPU, LEAST, on_factors
from domerge_fast.costs import Shape
from domerge_fast.engine import first_pass
from domerge_fast.methods import do
from domerge_fast.storage.shelf import Shelf

TOL = do.DoOptions().tol


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_more_rows_than_columns_descend_on_the_factors_everywhere(backend):
    assert all(on_factors(d + 1, d, backend, TOL) for d in (1, 64, 5000))
    assert not any(on_factors(d, d, backend, TOL) for d in (1, 64, LEAST - 1))
    assert not on_factors(512, 4096, backend, TOL)
    assert on_factors(1024, 1024, backend, TOL) == (backend != "reference")


@pytest.mark.parametrize("isa", CPU)
def test_the_faster_form_is_that_of_the_rates_measured(isa, monkeypatch):
    """Shapes beside which neither form is far ahead: benchmarks/forms.py."""
    monkeypatch.setattr(_C, "isa", lambda: isa)
    monkeypatch.setattr(_C, "half_products", lambda: CPU[isa].half is not None)
    assert not on_factors(700, 1024, "cpu", 1e-4)
    assert on_factors(960, 1024, "cpu", 1e-4)
    assert on_factors(720, 1024, "cpu", TOL) == (CPU[isa].half is not None)
    assert not on_factors(384, 512, "cpu", TOL)
    assert not on_factors(256, 1024, "cpu", TOL)


def test_plans_count_with_the_same_rates_on_every_machine(monkeypatch):
    """And with the form that these choose, also where R is below d."""
    for isa in CPU:
        monkeypatch.setattr(_C, "isa", lambda isa=isa: isa)
        assert on_factors(1000, 1024)
        assert not on_factors(700, 1024)
    factors, squares = Shape(1024, 1024, (8,) * 125), Shape(1024, 1024, (8,) * 87)
    descent = 10.0 * 1000 * 1024**2 + 3 * 192 * 1000 * 1024
    assert factors.flops() == 2 * descent + 125 * 72 * 1024
    assert squares.flops() == 2 * (3.0 * 696**2 * 1024 + 17 * 696**3) + 87 * 72 * 1024


def test_every_instruction_set_has_rates():
    assert CPU.keys() >= {*_C.isas()}
    assert cpu.descent_rates(300, 300, TOL).factors > 0


def model() -> dict:
    """R = d on both sides of one module; of the other, less than would pay on either."""
    return {
        "square": random_case((LEAST // 4,) * 4, LEAST, LEAST),
        "long": random_case((4,) * 4, 40, 60),
    }


def test_both_forms_end_within_the_tolerance_of_one_optimum(monkeypatch):
    cases = model()
    found = dm.merge(adapters(cases), "do", backend="cpu").report
    monkeypatch.setattr(do, "on_factors", lambda *_: False)
    expected = dm.merge(adapters(cases), "do", backend="cpu").report
    for side, other in zip(
        *((r["square"].a, r["square"].b) for r in (found, expected)), strict=True
    ):
        assert side.scaled is not None
        assert other.scaled is None
        assert side.objective_after == pytest.approx(other.objective_after, rel=2 * TOL)
    assert found["long"].a.scaled is None
    scale, other = (next(iter(r.scales.values())) for r in (found, expected))
    assert scale == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("room", ["memory", "file", "none"])
def test_a_descent_on_factors_is_made_once_where_there_is_room(room, monkeypatch):
    """And its result is the same, bit by bit, where it has to be made again."""
    cases, calls = model(), []
    descend = ops.orthogonalize_factors

    def counted(problems, **rule):
        calls.extend(problems)
        return descend(problems, **rule)

    monkeypatch.setattr(ops, "orthogonalize_factors", counted)
    expected = dm.merge(adapters(cases), "do", backend="cpu")
    assert len(calls) == 2
    calls.clear()
    if room == "file":
        monkeypatch.setattr(first_pass, "Shelf", lambda: Shelf(0))
    if room == "none":
        monkeypatch.setattr(Shelf, "has_room", lambda self, size: False)
    found = dm.merge(adapters(cases), "do", backend="cpu")
    assert len(calls) == (4 if room == "none" else 2)
    for name in cases:
        assert torch.equal(dense(found, name), dense(expected, name))


def test_a_shelf_has_room_in_memory_and_in_its_file(monkeypatch):
    shelf = Shelf(100)
    shelf.put("a", torch.zeros(10), 60)
    assert shelf.has_room(40)
    assert shelf.has_room(200)
    monkeypatch.setattr("domerge_fast.storage.shelf.MOST_IN_FILE", 100)
    assert shelf.has_room(100)
    assert not shelf.has_room(101)


def test_seconds_count_what_the_forms_multiply():
    rates = descent_rates.Rates(1.0, 2.0, 4.0)
    assert descent_rates.seconds(10, 20, rates) == pytest.approx((17e-6 + 2e-6, 14e-6))


def test_an_estimated_line_saves_a_gram_a_step_and_the_last_both():
    exact = descent_rates.factor_flops(10, 600, 3, estimated=False)
    estimated = descent_rates.factor_flops(10, 600, 3, estimated=True)
    assert exact - estimated == 4 * 10 * 600**2 - 3 * 192 * 10 * 600
