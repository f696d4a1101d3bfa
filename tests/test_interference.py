"""The interference tables against their dense formulas."""

from __future__ import annotations

import gc
import statistics

import pytest
import torch
from support.merges import at_one
from support.shapes import random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter
from domerge_fast.backends import registry
from domerge_fast.engine.interference import InterferenceSums
from domerge_fast.formats import from_tensors

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
every_backend = pytest.mark.parametrize("backend", AVAILABLE)

MODULES = {
    "first": random_case((3, 5, 2), 61, 33),
    "alike": random_case((3, 5, 2), 61, 33, seed=1),
    "narrow": random_case((3, 5, 2), 6, 7, seed=2),
    "of two": random_case((4, 6), 19, 23, seed=3),
    "of one": random_case((2,), 9, 8, seed=4),
}
"""Modules of three adapters; the last ones lack some."""

Dense = dict[str, tuple[Tensor, Tensor, float]]


def owned(i: int) -> Dense:
    """A, B and scaling of adapter i's modules."""
    return {
        name: (case.a[i], case.b[i], case.scalings[i])
        for name, case in MODULES.items()
        if i < len(case.ranks)
    }


def adapter(modules: Dense, name: str) -> Adapter:
    factors = {key: (a, b) for key, (a, b, _) in modules.items()}
    return from_tensors(factors, {key: s for key, (_, _, s) in modules.items()}, name=name)


def inner(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum())


def cosine(x: Tensor, y: Tensor) -> float:
    sizes = float(x.norm() * y.norm())
    return inner(x, y) / sizes if sizes else 0.0


def overlap(x: Dense, y: Dense, side: int) -> float:
    """Mean over shared modules of the cosine between A^T A (side 0), or B B^T (side 1)."""
    values = []
    for key in x.keys() & y.keys():
        one, other = x[key][side].double(), y[key][side].double()
        if side == 0:
            values.append(cosine(one.T @ one, other.T @ other))
        else:
            values.append(cosine(one @ one.T, other @ other.T))
    return statistics.fmean(values) if values else 0.0


def deltas(x: Dense) -> dict[str, Tensor]:
    return {key: s * b.double() @ a.double() for key, (a, b, s) in x.items()}


def assert_table(table, expected) -> None:
    for row, values in zip(table, expected, strict=True):
        assert list(row) == pytest.approx(values, rel=1e-5, abs=1e-6)


@every_backend
def test_every_table_is_its_dense_formula(backend):
    modules = [owned(i) for i in range(3)]
    found = dm.inspect([adapter(x, f"{i}") for i, x in enumerate(modules)], backend=backend)
    assert found.adapters == ("0", "1", "2")
    assert_table(found.rows, [[overlap(x, y, 0) for y in modules] for x in modules])
    assert_table(found.columns, [[overlap(x, y, 1) for y in modules] for x in modules])
    updates = [deltas(x) for x in modules]
    norms = [sum(inner(d, d) for d in x.values()) ** 0.5 for x in updates]
    assert list(found.norms) == pytest.approx(norms, rel=1e-5)
    cosines = [
        [
            sum(inner(x[key], y[key]) for key in x if key in y) / (norms[i] * norms[j])
            for j, y in enumerate(updates)
        ]
        for i, x in enumerate(updates)
    ]
    assert_table(found.cosine, cosines)
    for spread, x in zip(found.spread, updates, strict=True):
        sizes = [float(d.norm()) for d in x.values()]
        expected = [min(sizes), statistics.median(sizes), max(sizes)]
        assert list(spread) == pytest.approx(expected, rel=1e-5)


@every_backend
def test_a_merge_reports_what_inspect_finds(backend):
    loaded = [adapter(owned(i), f"{i}") for i in range(3)]
    report = at_one(loaded, weights=[1, -2, 3], backend=backend).report
    assert report.interference == dm.inspect(loaded, backend=backend)


@every_backend
@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_overlaps_do_not_depend_on_the_size_of_an_adapter(size, backend):
    case = random_case((3, 4), 20, 15)
    a, b = ({"x": (case.a[i], case.b[i], 1.0)} for i in range(2))
    scaled = {"x": (size * case.a[1], size * case.b[1], 1.0)}
    usual = dm.inspect([adapter(a, "a"), adapter(b, "b")], backend=backend)
    other = dm.inspect([adapter(a, "a"), adapter(scaled, "b")], backend=backend)
    for table in ("rows", "columns", "cosine"):
        assert_table(getattr(other, table), [list(row) for row in getattr(usual, table)])
    assert 0 < usual.rows[0][1] < 1
    assert other.norms[1] == pytest.approx(size**2 * usual.norms[1], rel=1e-5)


@every_backend
def test_extremes(backend):
    """Equal adapters overlap fully, orthogonal ones and zero updates not at all."""
    eye = torch.eye(8)
    one = {"x": (eye[:3], eye[:, :3].clone(), 1.0)}
    same = {"x": (torch.tensor(2.0) * eye[[1, 2, 0]], eye[:, [1, 2, 0]].clone(), -1.0)}
    apart = {"x": (eye[3:5], eye[:, 3:5].clone(), 1.0)}
    zero = {"x": (eye[:3], torch.zeros(8, 3), 1.0)}
    loaded = [adapter(x, name) for name, x in zip("abcd", (one, same, apart, zero), strict=True)]
    found = dm.inspect(loaded, backend=backend)
    assert_table(found.rows, [[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]])
    assert_table(found.columns, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert_table(found.cosine, [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert found.norms[3] == 0
    assert found.to_dict()["adapters"] == ("a", "b", "c", "d")


def test_norms_of_many_adapters_are_kept_as_one_tensor_a_group():
    """A tensor for each of them takes fifteen times the memory of its number."""

    def tensors() -> int:
        return sum(type(x) is Tensor for x in gc.get_objects())

    sums = InterferenceSums([str(i) for i in range(500)], "norms")
    before = tensors()
    for size in (3.0, 1.0):
        sums.count(range(500), torch.full((2, 500), size, dtype=torch.float64))
    sums.count((7, 9), torch.tensor([[8.0, 5.0]], dtype=torch.float64))
    assert tensors() - before < 10
    whole = InterferenceSums(sums.names, "norms")
    whole.take(sums.plain())
    found = whole.result()
    assert found == sums.result()
    assert found.spread[:8] == ((1.0, 2.0, 3.0),) * 7 + ((1.0, 3.0, 8.0),)
    assert found.norms[9] == pytest.approx(45**0.5)
