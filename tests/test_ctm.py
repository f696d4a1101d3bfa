"""Compress-then-Merge against its dense definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.close import assert_close, distance
from support.merges import adapters, at_one, dense, merge_all
from support.shapes import CASES, random_case
from test_composition import GROUP, INNER, TORCH, WEIGHTS, descent, recombined
from torch import Tensor

import domerge_fast as dm
from domerge_fast import FlatCut
from domerge_fast.methods.spectral.space import SUPPORT

CASE = CASES["odd d"]


def first_vectors(x: Tensor, k: int) -> Tensor:
    """The first k left singular vectors of x [m, q] that are not noise."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, : max(1, min(k, int((s > SUPPORT * s[0]).sum())))]


def spaces(deltas: Sequence[Tensor], k: int, share: float = 0.0) -> tuple[Tensor, Tensor]:
    """U and V by orthogonal iteration on the unfolded tensor of the blended updates."""
    norms = torch.stack([delta.norm() for delta in deltas])
    sizes = share * norms + (1 - share) * norms.mean()
    t = [c / n * delta if n else delta for c, n, delta in zip(sizes, norms, deltas, strict=True)]
    total = float(sum(x.square().sum() for x in t))
    v = first_vectors(torch.cat(t).T, k)
    errors: list[float] = []
    while len(errors) < 3 or abs(errors[-2] - errors[-1]) >= 1e-6:
        u = first_vectors(torch.cat([x @ v for x in t], 1), k)
        v = first_vectors(torch.cat([u.T @ x for x in t]).T, k)
        held = float(sum((u.T @ x @ v).square().sum() for x in t))
        errors.append(math.sqrt(max(0.0, 1 - held / total)) if total else 1.0)
    return u, v


def ctm(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    k: int,
    inner: str = "linear",
    share: float = 0.0,
    **given: Any,
) -> Tensor:
    u, v = spaces(deltas, k, share)
    return u @ INNER[inner]([u.T @ x @ v for x in deltas], weights, **given) @ v.T


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("inner", ["linear", "ties", "tsvm"])
def test_it_is_its_dense_definition(inner, share):
    given = {"inner": inner, "norm_share": share, "rank": 3, "scale": -0.3, "form": "deltas"}
    merged = merge_all(CASES, "ctm", **given, **TORCH)
    for name, case in CASES.items():
        expected = -0.3 * ctm(case.deltas(), case.weights, 3, inner, share)
        assert_close(merged.delta(name).double(), expected, 1e-5, name=name)


@pytest.mark.parametrize("inner", ["linear", "ties", "dare"])
def test_the_rank_is_the_one_asked_for_or_the_adapters_largest(inner):
    for given, rank in (({"rank": 4}, 4), ({}, 5)):
        merged = at_one(adapters({"x": CASE}), "ctm", inner=inner, weights=WEIGHTS, **given)
        assert merged.report["x"].rank == len(merged.factors("x")[0]) == rank
        assert merged.report["x"].energy_kept == pytest.approx(1)
        assert distance(dense(merged, "x"), ctm(CASE.deltas(), WEIGHTS, rank, inner)) < 1e-5


def test_where_nothing_is_compressed_it_is_the_inner_method():
    given = {"weights": WEIGHTS, "rank": sum(CASE.ranks)}
    loaded = adapters({"x": CASE})
    expected = dense(at_one(loaded, "linear", weights=WEIGHTS), "x")
    assert distance(dense(at_one(loaded, "ctm", inner="linear", **given), "x"), expected) < 1e-6
    one = CASES["one adapter"]
    merged = at_one(adapters({"x": one}), "ctm", inner="linear", weights=[-3])
    assert distance(dense(merged, "x"), -3 * one.deltas()[0]) < 1e-6
    assert merged.report["x"].rank == 4


def test_how_much_the_norms_count_decides_whose_directions_are_kept():
    """The weights do not: with hardly any on the large adapter, the small one is what is left."""
    case = random_case((4, 4), 40, 30)
    case.b[1] *= 100
    kept = []
    for share in (0.0, 1.0):
        given = {"inner": "linear", "norm_share": share, "rank": 4, "weights": [1.0, 1e-9]}
        left = dense(at_one(adapters({"x": case}), "ctm", **given), "x")
        kept.append(float(left.norm() / case.deltas()[0].norm()))
    assert kept[0] > 0.3
    assert kept[1] < 0.3


def test_a_compression_that_would_part_equal_directions_is_refused():
    a, b = torch.eye(8, 12), torch.eye(16, 8)
    given = [dm.from_tensors({"q": (a[k : k + 4], b[:, k : k + 4])}) for k in (0, 4)]
    with pytest.raises(FlatCut, match="module 'q': a cut to rank 6 falls between") as error:
        dm.merge(given, "ctm", inner="linear", rank=6)
    assert str(error.value).endswith("say another rank, or take 'linear' without rank and energy")
    assert dm.merge(given, "ctm", inner="linear", rank=8).report["q"].rank == 8


def test_other_modules_do_not_matter():
    cases = {name: random_case((4, 4, 4), 37, 31, k) for k, name in enumerate("xyz")}
    given = {"inner": "linear", "rank": 4, "weights": WEIGHTS}
    together = at_one(adapters(cases), "ctm", **given)
    for name, case in cases.items():
        alone = at_one(adapters({name: case}), "ctm", **given)
        assert distance(dense(alone, name), dense(together, name)) < 1e-6


@pytest.mark.parametrize("name", GROUP)
def test_the_directions_of_do_in_common_spaces(name):
    case = CASES[name]
    rule, allowed = descent(case)
    given = {"directions": "ctm", "inner": "linear", "rank": 3, "weights": WEIGHTS, **TORCH}
    merged = at_one(adapters({"x": case}), "do", **given, **rule)
    expected = recombined(case, lambda values, weights: ctm(values, weights, 3), case.omegas)
    assert distance(dense(merged, "x"), expected) < allowed
    assert merged.report["x"].rank == 3
