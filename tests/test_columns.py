"""What is said of a plan's modules by kind, whatever adapters have which."""

import pytest
import torch

import domerge_fast as dm
from domerge_fast.adapters import columns
from domerge_fast.adapters.columns import OfKinds, Same, alike
from domerge_fast.adapters.plan import Plan

SHAPES = {"a": (8, 6), "b": (8, 6), "c": (4, 6), "d": (8, 6)}


def adapter(name: str, ranks: dict[str, int]) -> dm.Adapter:
    factors = {
        n: (torch.ones(r, SHAPES[n][1]), torch.ones(SHAPES[n][0], r)) for n, r in ranks.items()
    }
    return dm.from_tensors(factors, name=name)


def plan(weights: tuple[float, ...], own=None, **ranks: dict[str, int]) -> Plan:
    return Plan.make([adapter(name, x) for name, x in ranks.items()], weights, own)


def test_kinds_of_modules_that_all_have():
    found = plan((1.0, 1.0), x={"a": 2, "b": 2, "c": 2, "d": 2}, y={"a": 1, "b": 3, "c": 1, "d": 1})
    assert isinstance(found.owners, Same)
    assert found.kinds["a"] is found.kinds["d"]
    assert [found.kinds[n].ranks for n in "abc"] == [(2, 1), (2, 3), (2, 1)]
    assert [found.kinds[n].m for n in "abcd"] == [8, 8, 4, 8]
    assert len(found.every_kind) == 3
    assert dict(found.ranks) == {"a": 3, "b": 5, "c": 3, "d": 3}
    assert sorted(found.ranks.every) == [3, 3, 5]


def test_kinds_where_adapters_differ():
    ranks = {"x": {"b": 2, "d": 2}, "y": {"a": 1, "b": 1, "d": 1}, "z": {"c": 4}}
    found = plan((1.0, 0.5, 2.0), {"d": (3.0, 0.5, 2.0)}, **ranks)
    assert found.names == ("b", "d", "a", "c")
    assert [found.kinds[n].owners for n in found.names] == [(0, 1), (0, 1), (1,), (2,)]
    weights = [found.kinds[n].weights for n in found.names]
    assert weights == [(1.0, 0.5), (3.0, 0.5), (0.5,), (2.0,)]
    assert [found.kinds[n].ranks for n in found.names] == [(2, 1), (2, 1), (1,), (4,)]
    part = found.only(["c", "d"])
    assert [part.kinds[n].owners for n in part.names] == [(2,), (0, 1)]
    (stacks,) = part.stacks([range(2)], None)
    assert [s.names for s in stacks] == [("c",), ("d",)]
    assert [s.a.ranks for s in stacks] == [(4,), (2, 1)]
    stored = [found.adapters[i].stored["d"][0].tensor for i in (0, 1)]
    assert [x.data_ptr() for x in stacks[1].a.matrices] == [x.data_ptr() for x in stored]


@pytest.mark.parametrize("ranks", [{}, {"x": {"a": 1}, "y": {"a": 2}}])
def test_a_plan_of_no_adapter_that_counts_has_no_modules(ranks):
    found = plan((0.0,) * len(ranks), **ranks)
    assert found.names == ()
    assert found.every_kind == []
    assert found.groups(found.column([])) == []
    assert dict(found.ranks) == {}


def test_one_value_for_all_names():
    found = Same({"a": 1, "b": 2}, (0, 1))
    assert dict(found) == {"a": (0, 1), "b": (0, 1)}
    with pytest.raises(KeyError):
        found["c"]


def test_values_of_kinds():
    found = OfKinds({"a": "x", "b": "y", "c": "x"}, {"x": 1, "y": 2})
    assert dict(found) == {"a": 1, "b": 2, "c": 1}
    assert [*found.every] == [1, 2]


@pytest.mark.parametrize("most", [1 << 31, 1])
def test_rows_that_are_alike(monkeypatch, most):
    monkeypatch.setattr(columns, "MOST_CODES", most)
    rows = [(2, 0, 1), (0, 0, 1), (2, 0, 1), (2, 1, 1), (0, 0, 1)]
    first, which = alike([torch.tensor(x) for x in zip(*rows)], [3, 2, 2])
    assert sorted(first) == [0, 1, 3]
    assert [rows[first[k]] for k in which] == rows
