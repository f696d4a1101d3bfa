"""Modules that are alike are merged as one batch, and come out as each does by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.close import assert_close
from support.make import Factors, random_factors
from support.merges import LEVELLING, at_one, dense

import domerge_fast as dm
from domerge_fast.adapters import Adapter
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE, applying, contract

RANK, COUNT = 4, 5
SHAPES = {f"layers.{k}.q": (40, 56) for k in range(COUNT)}
METHODS = [name for name, row in TABLE.items() if row.coefficients and not row.reduce]
"""Those that find coefficients module by module."""


def given(method: str, deficient: bool = True) -> list[Factors]:
    """Of three adapters, or two. deficient: the last has nothing in layer 1, and in layer 3 less
    than its rank."""
    found = [random_factors(SHAPES, RANK, seed=i) for i in range(2 if method == "slerp" else 3)]
    if deficient:
        found[-1]["layers.1.q"][1].zero_()
        found[-1]["layers.3.q"][1][:, 1:] = 0
    return found


def adapters(factors: list[Factors], *names: str) -> list[Adapter]:
    """With these modules alone."""
    return [
        from_tensors({name: own[name] for name in names}, 2.0, name=str(i))
        for i, own in enumerate(factors)
    ]


def check(method: str, options: dict[str, Any]) -> None:
    factors = given(method)
    weights = [1.0, -0.5, 2.0][: len(factors)]
    together = at_one(adapters(factors, *SHAPES), method, weights=weights, **options)
    for name in SHAPES:
        alone = at_one(adapters(factors, name), method, weights=weights, **options)
        assert_close(dense(together, name), dense(alone, name), 1e-5, name=name)
        found, expected = together.report[name], alone.report[name]
        assert found.rank == expected.rank == len(together.factors(name)[0])
        assert found.energy_kept == pytest.approx(expected.energy_kept, rel=1e-6)
        assert found.energy == pytest.approx(expected.energy, rel=1e-6)
        assert found.magnitudes == pytest.approx(expected.magnitudes)


@pytest.mark.parametrize("cut", [{}, {"rank": 2}, {"energy": 0.8}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_modules(method, cut, monkeypatch):
    if cut and method in LEVELLING:
        pytest.skip("its singular values are equal")
    check(method, cut)
    monkeypatch.setattr(contract, "PART_CUBES", 2 * (3 * RANK) ** 3)
    check(method, cut)  # in parts of two modules, of which some have lower ranks


@pytest.mark.parametrize("method", ["linear", "svd", "tsvm", "pico"])
def test_a_batch_is_applied_at_once(method, monkeypatch):
    sides: list[int | None] = []

    def apply(coefficients: Any, problems: Any, dtype: torch.dtype, **others: Any) -> Any:
        sides.extend(x.count for x in problems)
        return usual(coefficients, problems, dtype, **others)

    usual = applying.ops.apply
    monkeypatch.setattr(applying.ops, "apply", apply)
    at_one(adapters(given(method, deficient=False), *SHAPES), method)
    assert sides == [COUNT, COUNT]


def test_modules_of_several_ranks_are_applied_one_by_one():
    factors = given("svd")
    merged = at_one(adapters(factors, *SHAPES), "svd", energy=0.999)
    ranks = [merged.report[name].rank for name in SHAPES]
    assert len({*ranks}) > 1
    assert [len(merged.factors(name)[0]) for name in SHAPES] == ranks


def of(*shapes: tuple[int, ...]) -> contract.Coefficients:
    a, b = [None, *map(torch.ones, shapes)][-2:]
    return contract.Coefficients(a=a, b=b)


RETURNED = {
    "Tensor": torch.ones(COUNT, 3),
    "a None, b [5, 12]": of((COUNT, 12)),
    "a None, b [3]": of((3,)),
    "a [5, 2, 7], b [5, 2, 7]": of((COUNT, 2, 7), (COUNT, 2, 7)),
    "a [5, 2, 12], b [5, 3, 12]": of((COUNT, 2, 12), (COUNT, 3, 12)),
    "a [12], b [12]": of((12,), (12,)),
}


@pytest.mark.parametrize("call", ["merge", "prepare"])
@pytest.mark.parametrize("told", RETURNED)
def test_what_is_no_coefficients_of_the_batch_is_refused(told, call, monkeypatch):
    row = replace(TABLE["lego"], coefficients=lambda *given: RETURNED[told])
    monkeypatch.setitem(TABLE.own, "lego", row)
    sources = adapters(given("lego", deficient=False), *SHAPES)
    with pytest.raises(TypeError) as caught:
        dm.merge(sources, "lego") if call == "merge" else dm.prepare(sources, "lego").merge([1] * 3)
    wanted = "a and b [5, k, 12], or a None and b [5, 3]"
    start = "method 'lego' has to return Coefficients"
    assert str(caught.value) == f"{start}, {wanted}; it returned {told}"
