"""Singular value calibration against its definition: dense, in float64, over a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support.close import assert_close
from support.merges import adapters, at_one, dense
from support.shapes import Case, random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast.methods.spectral import svc

WEIGHTS = ([1.0, 1.0, 1.0], [1.0, -0.5, 2.0])
MODELS = {
    "all modules": {
        "x": random_case((3, 2, 4), 29, 23),
        "y": random_case((2, 4, 3), 19, 31, seed=1),
    },
    "missing modules": {
        "x": random_case((3, 2, 4), 29, 23),
        "two": random_case((2, 4), 19, 31, seed=1),
        "one": random_case((3,), 13, 11, seed=2),
    },
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("tsvm", {}),
    ("tsvm", {"power": 0.5}),
    ("iso_c", {}),
    ("do", {"steps": 3, "tol": 0.0}),
    ("ties", {"density": 0.5}),
]
every_method = pytest.mark.parametrize(("method", "options"), METHODS, ids=str)

Cases = Mapping[str, Case]
Triplets = tuple[Tensor, Tensor, Tensor]


def gentle(case: Case) -> Case:
    return Case(case.a, [0.002 * b for b in case.b], case.scalings)


def updates(case: Case, weights: Sequence[float]) -> list[Tensor]:
    return [w * delta for w, delta in zip(weights, case.deltas(), strict=False)]


def spectrum(update: Tensor, rank: int) -> Triplets:
    u, s, vh = torch.linalg.svd(update)
    return u[:, :rank], s[:rank], vh[:rank]


def triplets(
    cases: Cases, method: str, weights: Sequence[float], options: Mapping[str, Any]
) -> dict[str, Triplets]:
    """Of the merges at λ = 1. What is dense is cut to the largest rank of an adapter."""
    largest = max(max(case.ranks) for case in cases.values())
    merged = at_one(adapters(dict(cases)), method, weights=weights, **options)
    found = {}
    for name, case in cases.items():
        rank = largest if method == "ties" else sum(case.ranks)
        if method == "iso_c":  # singular values are equal: the vectors are those of the sum
            u, s, vh = spectrum(torch.stack(updates(case, weights)).sum(0), rank)
            found[name] = u, s.mean().expand(rank), vh
        else:
            found[name] = spectrum(dense(merged, name), rank)
    return found


def calibrated(
    cases: Cases, weights: Sequence[float], merged: Mapping[str, Triplets]
) -> dict[str, Tensor]:
    taus = {name: updates(case, weights) for name, case in cases.items()}
    shares = []
    for i in range(max(map(len, taus.values()))):
        own = [name for name in cases if i < len(taus[name])]
        deltas = {name: merged[name][0] @ merged[name][1].diag() @ merged[name][2] for name in own}
        inner = sum(float((deltas[name] * taus[name][i]).sum()) for name in own)
        shares.append(inner / sum(float(taus[name][i].square().sum()) for name in own))
    p = sum(shares) / len(shares)
    found = {}
    for name, (u, s, vh) in merged.items():
        counted = torch.zeros_like(s)
        for tau in taus[name]:
            along, size = (u.T @ tau * vh).sum(1), (u.T @ tau).square().sum(1)
            counted += (s * along / size / p).clamp_min(1)
        found[name] = u @ (s / p * len(taus[name]) / counted).diag() @ vh
    return found


@every_method
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_it_is_its_dense_definition(method, options, model, weights):
    cases = MODELS[model]
    found = at_one(adapters(cases), method, weights=weights, post=["svc"], **options)
    expected = calibrated(cases, weights, triplets(cases, method, weights, options))
    for name in cases:
        assert_close(dense(found, name), expected[name], 1e-4, name=name)
    assert found.report.recipe.post == ("svc",)


@every_method
def test_a_scale_is_a_factor_on_what_is_calibrated(method, options):
    cases = MODELS["missing modules"]
    one, found = (
        at_one(adapters(cases), method, post=["svc"], scale=scale, **options)
        for scale in (1.0, -2.5e12)
    )
    assert (found.report.scale, found.report.recipe.scale) == (-2.5e12, -2.5e12)
    for name in cases:
        assert_close(dense(found, name), -2.5e12 * dense(one, name), 1e-5, name=name)


@every_method
def test_where_a_scale_is_found_weights_are_proportions(method, options):
    cases = {name: gentle(case) for name, case in MODELS["missing modules"].items()}
    one, other = (
        dm.merge(adapters(cases), method, weights=w, post=["svc"], scale="auto", **options)
        for w in ([1.0, 2.0, 3.0], [3.0, 6.0, 9.0])
    )
    plain = at_one(adapters(cases), method, weights=[1.0, 2.0, 3.0], post=["svc"], **options)
    damped = one.report.scales[3] * 6 / 3
    assert 1 < damped < svc.SCALE.constant
    for name, scale in (("x", damped * 3 / 6), ("two", damped * 2 / 3), ("one", 1.0)):
        assert_close(dense(one, name), scale * dense(plain, name), 1e-5, name=name)
        if name != "one":
            assert_close(dense(other, name), dense(one, name), 1e-4, name=name)


@pytest.mark.parametrize("method", ["linear", "tsvm", "wudi"])
@pytest.mark.parametrize("weight", [1.0, -3.0])
def test_one_adapter_is_counted_once_and_stays(method, weight):
    cases = {"x": random_case((3,), 13, 11), "y": random_case((4,), 9, 7, seed=1)}
    found = at_one(adapters(cases), method, weights=[weight], post=["svc"])
    for name, case in cases.items():
        assert_close(dense(found, name), weight * case.deltas()[0], 1e-5, name=name)


@pytest.mark.parametrize("method", ["linear", "tsvm", "do"])
@pytest.mark.parametrize("times", [2, 5])
def test_an_adapter_given_more_than_once_counts_once(method, times):
    """Every direction is counted as often as it is given, and brought back to one."""
    case = random_case((3,), 23, 19)
    cases = {"x": Case(case.a * times, case.b * times, case.scalings * times)}
    found = at_one(
        adapters(cases),
        method,
        post=["svc"],
        **({"orthogonalize": False} if method == "do" else {}),
    )
    if method == "linear":
        assert_close(dense(found, "x"), case.deltas()[0], 1e-5)
    share = (dense(found, "x") * case.deltas()[0]).sum() / case.deltas()[0].square().sum()
    assert 0.8 < share < 1 + 1e-5


@every_method
def test_adapters_that_depend_on_each_other(method, options):
    case = random_case((3, 2), 23, 19)
    cases = {"x": Case([*case.a, case.a[0]], [*case.b, 2 * case.b[0]], [1.0, 1.0, 1.0])}
    found = at_one(adapters(cases), method, post=["svc"], **options)
    assert dense(found, "x").isfinite().all()
    if method in ("linear", "iso_c"):
        merged = spectrum(torch.stack(cases["x"].deltas()).sum(0), 5)
        if method == "iso_c":
            merged = merged[0], merged[1].mean().expand(5), merged[2]
        expected = calibrated(cases, [1.0] * 3, {"x": merged})
        assert_close(dense(found, "x"), expected["x"], 1e-4)


def test_only_what_is_counted_more_than_once_is_damped():
    strengths = torch.tensor([[2.0, 6.0, 0.5], [2.0, 2.0, -3.0]], dtype=torch.float64)
    expected = [[0.5], [0.5 * 2 / (3 + 1)], [0.5]]
    assert svc.gains(strengths, 2.0).tolist() == expected


def test_nothing_in_nothing_out():
    case = random_case((3, 2), 13, 11)
    zeros = Case(case.a, [0 * b for b in case.b], case.scalings)
    for method in ("linear", "tsvm", "do"):
        assert not dense(at_one(adapters({"x": zeros}), method, post=["svc"]), "x").any()


def test_a_merge_that_points_away_has_no_scale():
    with pytest.raises(
        dm.DomergeError, match=r"^the merge points away .*; take a method without it, or"
    ):
        svc.projection([[(-1.0, 1.0)], [(0.5, 1.0)]])
    assert svc.projection([[(1.0, 2.0), (3.0, 2.0)], [(0.0, 0.0)]]) == 1.0


@pytest.mark.parametrize("post", [["norm_match", "svc"], ["svc", "svc"]], ids=str)
def test_it_comes_first(post):
    line = r"^option 'post': 'svc' works on the merge itself; put it first, once$"
    with pytest.raises(dm.OptionError, match=line):
        dm.merge(adapters(MODELS["all modules"]), "tsvm", post=post)


@pytest.mark.parametrize(("method", "options"), METHODS[:-1], ids=str)
def test_it_comes_before_a_cut(method, options):
    cases = MODELS["all modules"]
    if method == "iso_c":
        cases = {"x": cases["x"]}
    found, uncut = (
        at_one(adapters(cases), method, post=["svc"], **options, **given)
        for given in ({"rank": 2}, {})
    )
    for name in cases:
        u, s, vh = spectrum(dense(uncut, name), 2)
        assert_close(dense(found, name), u @ s.diag() @ vh, 1e-4, name=name)
        kept = float(s.square().sum() / dense(uncut, name).square().sum())
        assert found.report[name].energy_kept == pytest.approx(kept, rel=1e-4)


def test_steps_after_it_take_what_is_calibrated():
    cases = MODELS["all modules"]
    found, plain = (
        at_one(adapters(cases), "tsvm", post=post) for post in (["svc", "norm_match"], ["svc"])
    )
    for name, case in cases.items():
        expected = dense(plain, name)
        size = sum(delta.norm() for delta in case.deltas()) / len(case.ranks)
        assert_close(dense(found, name), expected * size / expected.norm(), 1e-5, name=name)


@pytest.mark.parametrize("form", ["adapter", "deltas"])
@every_method
def test_forms_are_of_the_same_merge(method, options, form):
    cases = MODELS["all modules"]
    found = at_one(adapters(cases), method, post=["svc"], form=form, **options)
    expected = at_one(adapters(cases), method, post=["svc"], **options)
    for name in cases:
        assert_close(found.delta(name), expected.delta(name), 1e-5, name=name)
