"""What is told of a prepared merge from products of R x R is what its dense updates say."""

from __future__ import annotations

import pytest
import torch
from test_prepared import KIND, LACKED, MODULES, inputs

import domerge_fast as dm
from domerge_fast.sessions.measures import Measured, Measures

METHODS = [*KIND, "do renormalized"]


def prepared(method: str, **given: object) -> tuple[dm.Prepared, list[dm.Adapter], list[float]]:
    sources, weights = inputs(method.split()[0])
    if method == "do renormalized":
        given |= {"renormalize": True}
    return dm.prepare(sources, method.split()[0], **given), sources, weights


def literal(p: dm.Prepared, sources: list[dm.Adapter], kappa, names) -> Measured:
    """The same from dense matrices in float64."""
    merge, count = p.merge(kappa, dtype="float64"), len(sources)
    square, along, own = 0.0, torch.zeros(count).double(), torch.zeros(count).double()
    modules: dict[str, dict[int, float]] = {}
    for name in names:
        delta, modules[name] = merge.delta(name), {}
        square += float(delta.square().sum())
        for i, source in enumerate(sources):
            if name not in source.modules:
                continue
            a, b = (x.double() for x in source.factors(name))
            update = source.modules[name].scaling * b @ a
            dot, size = (delta * update).sum(), update.square().sum()
            along[i], own[i] = along[i] + dot, own[i] + size
            modules[name][i] = float(dot / size)
    cosines = along / (square**0.5 * own.sqrt())
    return Measured(square**0.5, tuple(cosines.tolist()), tuple((along / own).tolist()), modules)


@pytest.mark.parametrize("method", METHODS)
def test_they_are_those_of_dense_updates(method):
    p, sources, weights = prepared(method)
    measures = Measures.of(p)
    assert sorted(measures.modules) == sorted(MODULES)
    for kappa in (weights, [0.2 + 0.5 * k for k in range(len(weights))]):
        found, expected = measures.at(kappa), literal(p, sources, kappa, MODULES)
        assert found.norm == pytest.approx(expected.norm, rel=1e-4)
        assert found.cosines == pytest.approx(expected.cosines, abs=1e-4)
        assert found.shares == pytest.approx(expected.shares, abs=1e-4)
        assert found.modules.keys() == expected.modules.keys()
        for name, shares in expected.modules.items():
            assert found.modules[name] == pytest.approx(shares, abs=1e-4)


def test_another_scale_is_another_size():
    p, _, weights = prepared("tsvm")
    measures = Measures.of(p)
    one, three = measures.at(weights), measures.at(weights, 3.0)
    assert three.norm == pytest.approx(3 * one.norm)
    assert three.cosines == pytest.approx(one.cosines)
    assert three.shares == pytest.approx([3 * x for x in one.shares])


@pytest.mark.parametrize("method", ["linear", "do", "iso_c"])
def test_of_many_modules_some_are_measured(method):
    p, sources, weights = prepared(method)
    measures = Measures.of(p, most=1)
    assert 0 < len(measures.modules) < measures.total == len(MODULES)
    found, expected = measures.at(weights), literal(p, sources, weights, measures.modules)
    assert found.norm == pytest.approx(expected.norm, rel=1e-4)
    assert found.shares == pytest.approx(expected.shares, abs=1e-4)


def test_without_weights_nothing_is_kept():
    p, _, weights = prepared("linear")
    found = Measures.of(p).at([0.0] * len(weights))
    assert found.norm == 0
    assert set(found.cosines) == set(found.shares) == {0.0}
    assert 2 not in found.modules[LACKED]


def test_what_is_made_anew_is_refused():
    p = dm.prepare(inputs("ties")[0], "ties")
    with pytest.raises(dm.OptionError, match="has no factors that stay"):
        Measures.of(p)
