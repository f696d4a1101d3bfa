"""Steps before and after a merge against their dense definitions in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.close import assert_close, distance
from support.shapes import CASES, Case, random_case
from torch import Tensor

from domerge_fast.adapters.plan import Stack
from domerge_fast.backends import paper, registry
from domerge_fast.methods import choose
from domerge_fast.methods.base import Settings
from domerge_fast.methods.made import Factors
from domerge_fast.methods.running import prepared
from domerge_fast.methods.side_report import SideReport
from domerge_fast.methods.spectral.space import NOISE
from domerge_fast.methods.steps import POST, PRE

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
GROUP = ("odd d", "d below R", "duplicated", "mixed sizes")
LAMBDA = -0.3

ALONE = ("orthogonalize", "pico", "canonicalize", "equalize", "smooth")
"""Steps before that need nothing beside the factors."""

USUAL = "cpu"
"""Steps ask a backend for gram, block_gram and apply, and know it by nothing else."""

every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def settings(backend: str, scale: float = 1.0) -> Settings:
    return Settings(scale, torch.float32, backend)


def stack(name: str, case: Case, dtype: torch.dtype = torch.float32) -> Stack:
    adapters = tuple(range(len(case.ranks)))
    return Stack((name,), adapters, case.rows(dtype), case.columns(dtype), tuple(case.weights))


def merge(method: str, stacks: Sequence[Stack], given: Settings, **options: Any) -> list[Factors]:
    found = prepared(choose(method, options), [stacks], given)(stacks, given)
    return [x for x in found if isinstance(x, Factors)]


def stacks_of_all() -> list[Stack]:
    return [stack(name, case) for name, case in CASES.items()]


def factors(s: Stack) -> list[tuple[Tensor, Tensor]]:
    """A_i [r_i, n] and B_i [m, r_i] in float64, scaled."""
    a = [c * x.double() for x, c in zip(s.a.blocks, s.a.scales, strict=True)]
    b = [c * x.double().T for x, c in zip(s.b.blocks, s.b.scales, strict=True)]
    return list(zip(a, b, strict=True))


def updates(s: Stack) -> list[Tensor]:
    return [b @ a for a, b in factors(s)]


def dense(merged: Factors) -> Tensor:
    return merged.b.double() @ merged.a.double()


def sizes(case: Case) -> list[float]:
    """||A_i||_F ||B_i||_F, scaled."""
    pairs = zip(case.a, case.exact_b(), strict=True)
    return [float(a.double().norm() * b.norm()) for a, b in pairs]


def mean_norm(case: Case, weights: Sequence[float]) -> float:
    norms = [abs(w) * float(x.norm()) for w, x in zip(weights, case.deltas(), strict=True)]
    return sum(norms) / len(norms)


def mixed(case: Case) -> Case:
    """The same updates from other factors."""
    generator = torch.Generator().manual_seed(1)
    found = Case([], [], case.scalings)
    for a, b in zip(case.a, case.b, strict=True):
        mixer = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        found.a.append((mixer @ a.double()).float())
        found.b.append((b.double() @ torch.linalg.inv(mixer)).float())
    return found


# All of them


def test_the_names():
    assert tuple(PRE) == (*ALONE, "osrm_project")
    assert tuple(POST) == ("subspace_boost", "norm_match")
    assert all(row.name == name and row.summary for name, row in (*PRE.items(), *POST.items()))


@every_backend
@pytest.mark.parametrize("step", ALONE)
def test_a_step_before_keeps_what_a_stack_is_and_leaves_the_given_one_alone(step, backend):
    """Also of factors in half precision: what is made of them is float32."""
    given = [stack(name, CASES[name], torch.bfloat16) for name in GROUP]
    before = [updates(s) for s in given]
    for s, old, kept in zip(PRE[step].run(given, settings(backend)), given, before, strict=True):
        assert (s.name, s.adapters, s.weights) == (old.name, old.adapters, old.weights)
        assert s.a.ranks == s.b.ranks == old.a.ranks
        assert (s.a.d, s.b.d) == (old.a.d, old.b.d)
        for side, was in ((s.a, old.a), (s.b, old.b)):
            unchanged = all(x is y for x, y in zip(side.blocks, was.blocks, strict=True))
            assert unchanged or {x.dtype for x in side.blocks} == {torch.float32}
        assert all(map(torch.equal, updates(old), kept))
    assert PRE[step].run([], settings(backend)) == []


@every_backend
@pytest.mark.parametrize("step", POST)
def test_a_step_after_keeps_the_reports_and_gives_the_dtype_asked_for(step, backend):
    stacks = [stack(name, CASES[name]) for name in GROUP]
    side = SideReport(3, 2.0, 1.0, 0.5, 0.25)
    given = [
        dataclasses.replace(f, a_side=side, b_side=side, norms=[1.0])
        for f in merge("linear", stacks, settings(backend))
    ]
    single = POST[step].run(stacks, given, settings(backend))
    half = POST[step].run(
        stacks, given, dataclasses.replace(settings(backend), dtype=torch.bfloat16)
    )
    for f, x, y in zip(given, single, half, strict=True):
        assert x.a_side is x.b_side is side
        assert x.norms is f.norms
        assert {x.a.dtype, x.b.dtype} == {torch.float32}
        assert {y.a.dtype, y.b.dtype} == {torch.bfloat16}
        assert torch.equal(y.a, x.a.bfloat16())
        assert torch.equal(y.b, x.b.bfloat16())
    assert POST[step].run([], [], settings(backend)) == []


# orthogonalize


@every_backend
def test_orthogonalize_is_the_descent_on_both_sides(backend):
    """The number of steps may differ by rounding, and the result with it, but little; where there
    are more rows than columns, as far as two points within `tol` of one optimum are apart."""
    stacks = [stack(name, CASES[name]) for name in GROUP]
    for s in PRE["orthogonalize"].run(stacks, settings(backend)):
        case = CASES[s.name]
        allowed = 5e-2 if case.is_wide else 1e-4
        a, _ = paper.descend([x.double() for x in case.a])
        bt, _ = paper.descend([x.T for x in case.exact_b()])
        for (x, y), a_hat, bt_hat in zip(factors(s), a, bt, strict=True):
            assert distance(x, a_hat) < allowed, s.name
            assert distance(y, bt_hat.T) < allowed, s.name


@every_backend
@pytest.mark.parametrize("decouple", [True, False])
def test_do_after_orthogonalize_does_not_do_it_again(decouple, backend):
    stacks = [s for s in stacks_of_all() if s.name != "64 adapters"]
    given = settings(backend, LAMBDA)
    apart = PRE["orthogonalize"].run(stacks, given)
    whole = merge("do", stacks, given, decouple=decouple)
    rest = merge("do", apart, given, decouple=decouple, orthogonalize=False)
    for s, one, other in zip(stacks, rest, whole, strict=True):
        assert_close(dense(one), dense(other), 1e-6, name=s.name)


# pico


def test_pico_calibrates_what_the_bs_share():
    for s in PRE["pico"].run(stacks_of_all(), settings(USUAL)):
        case = CASES[s.name]
        together = torch.cat([b.double() for b in case.b], 1)
        values, u = torch.linalg.eigh(together @ together.T)
        share = values / values.sum() if values.any() else values
        calibration = u @ (1 / (1 + (len(case.b) - 1) * share)).diag() @ u.T
        assert s.a.blocks == tuple(case.a), s.name
        assert s.b.scales == tuple(case.scalings), s.name
        for x, b in zip(s.b.blocks, case.b, strict=True):
            assert_close(x.T, calibration @ b.double(), 1e-5, name=s.name)


def test_the_method_pico_is_the_step_and_the_sum_brought_to_the_mean_norm():
    stacks, given = stacks_of_all(), settings(USUAL, LAMBDA)
    whole = merge("pico", stacks, given)
    summed = merge("linear", PRE["pico"].run(stacks, given), given)
    parts = POST["norm_match"].run(stacks, summed, given)
    for s, one, other in zip(stacks, parts, whole, strict=True):
        assert_close(dense(one), dense(other), 1e-5, name=s.name)


# canonicalize


def test_canonicalize_balances_every_update_and_keeps_it():
    for s in PRE["canonicalize"].run(stacks_of_all(), settings(USUAL)):
        case = CASES[s.name]
        assert {*s.a.scales, *s.b.scales} == {1.0}
        for (a, b), delta, size in zip(factors(s), case.deltas(), sizes(case), strict=True):
            assert_close(b @ a, delta, 1e-6, size, s.name)
            values = torch.zeros(len(a), dtype=torch.float64)
            found = torch.linalg.svdvals(delta)[: len(a)]
            values[: len(found)] = found
            assert_close(a @ a.T, values.diag(), 1e-5, size, s.name)
            assert_close(b.T @ b, values.diag(), 1e-5, size, s.name)
            rank = torch.linalg.matrix_rank(delta)
            assert not a[rank:].any(), s.name
            assert not b[:, rank:].any(), s.name


@every_backend
def test_canonicalize_keeps_a_direction_whose_size_sits_in_one_factor(backend):
    case = random_case((2, 3), 41, 29)
    unbalanced = Case([a.clone() for a in case.a], [b.clone() for b in case.b], case.scalings)
    for a, b in zip(unbalanced.a, unbalanced.b, strict=True):
        a[0] *= 2.0**30
        b[:, 0] /= 2.0**30
    (s,) = PRE["canonicalize"].run([stack("x", unbalanced)], settings(backend))
    for (a, b), delta in zip(factors(s), case.deltas(), strict=True):
        assert distance(b @ a, delta) < 1e-6
        assert distance(a @ a.T, torch.linalg.svdvals(delta)[: len(a)].diag()) < 1e-5


@every_backend
def test_canonicalize_leaves_no_noise_where_an_adapter_has_less_rank_than_rows(backend):
    case = random_case((4, 3), 141, 129)
    case.a[0][2:] = 2 * case.a[0][:2]
    (s,) = PRE["canonicalize"].run([stack("x", case)], settings(backend))
    (a, b), _ = factors(s)
    assert distance(b @ a, case.deltas()[0]) < 1e-6
    assert a[:2].any(dim=1).all()
    assert not a[2:].any()
    assert not b[:, 2:].any()


def test_the_sum_is_that_of_canonicalized_updates():
    stacks, given = stacks_of_all(), settings(USUAL, LAMBDA)
    expected = merge("linear", stacks, given)
    found = merge("linear", PRE["canonicalize"].run(stacks, given), given)
    for s, one, other in zip(stacks, found, expected, strict=True):
        assert_close(dense(one), dense(other), 1e-6, sum(sizes(CASES[s.name])), s.name)


@every_backend
@pytest.mark.parametrize(
    ("method", "options"),
    [("pico", {}), ("do", {"steps": 2, "tol": 0.0}), ("robust", {}), ("lego", {})],
)
def test_canonicalized_adapters_merge_alike_however_they_are_split(method, options, backend):
    case, given = random_case((4, 4, 4), 33, 29), settings(backend)
    both = [stack("as it is", case), stack("mixed", mixed(case))]
    as_they_are = [dense(f) for f in merge(method, both, given, **options)]
    expected, result = merge(method, PRE["canonicalize"].run(both, given), given, **options)
    assert distance(as_they_are[1], as_they_are[0]) > 1e-2
    assert distance(dense(result), dense(expected)) < 1e-4


# smooth


def test_smoothing_makes_an_update_s_singular_values_equal_and_keeps_their_sum():
    """Its directions stay; singular values that are noise stay zero."""
    for s, given in zip(PRE["smooth"].run(stacks_of_all(), settings(USUAL)), stacks_of_all()):
        for (a, b), (old_a, old_b) in zip(factors(s), factors(given), strict=True):
            u, values, vh = torch.linalg.svd(old_b @ old_a, full_matrices=False)
            k = int((values > NOISE * old_a.norm() * old_b.norm()).sum())
            level = values[:k].mean() if k else 0.0
            assert_close(b @ a, level * u[:, :k] @ vh[:k], 1e-5, name=s.name)
            assert_close(a @ a.T, b.T @ b, 1e-5, name=s.name)


# equalize


def test_equalize_brings_every_update_to_the_mean_norm():
    stacks = stacks_of_all()
    for s, given in zip(PRE["equalize"].run(stacks, settings(USUAL)), stacks, strict=True):
        case = CASES[s.name]
        assert s.a is given.a
        assert s.b.blocks is given.b.blocks
        size = mean_norm(case, [1.0] * len(case.a))
        for update, delta in zip(updates(s), case.deltas(), strict=True):
            expected = delta * size / delta.norm() if delta.any() else delta
            assert_close(update, expected, 1e-6, name=s.name)


def test_equalize_leaves_an_update_alone_that_is_only_rounding_noise():
    """Two parts of an adapter that cancel, in factors that are far from zero."""
    case = random_case((4, 4), 41, 29)
    case.a[0][2:] = case.a[0][:2] * 1.1
    case.b[0][:, 2:] = -case.b[0][:, :2] / 1.1
    (s,) = PRE["equalize"].run([stack("x", case)], settings("torch"))
    assert s.b.scales[0] == case.scalings[0]
    noise, other = updates(s)
    assert noise.norm() < 1e-6 * sizes(case)[0]
    assert float(other.norm()) == pytest.approx(float(case.deltas()[1].norm()) / 2)


# subspace_boost


@pytest.mark.parametrize("method", ["linear", "tsvm"])
def test_subspace_boost_raises_the_weak_singular_values_of_what_was_merged(method):
    stacks, given = stacks_of_all(), settings(USUAL, LAMBDA)
    merged = merge(method, stacks, given)
    boosted = POST["subspace_boost"].run(stacks, merged, given)
    for s, before, after in zip(stacks, merged, boosted, strict=True):
        u, values, vh = torch.linalg.svd(dense(before), full_matrices=False)
        few = (values.cumsum(0) < 0.01 * values.sum()).sum()
        strong = values[few.clamp_max(len(values) - 1)]
        raised = torch.where(values > 2 * NOISE * values.norm(), values.maximum(strong), 0.0)
        assert_close(dense(after), u @ raised.diag() @ vh, 1e-5, name=s.name)


# norm_match


@pytest.mark.parametrize("method", ["linear", "iso_c"])
def test_norm_match_brings_a_merge_to_the_adapters_mean_norm(method):
    stacks, given = stacks_of_all(), settings(USUAL, LAMBDA)
    merged = merge(method, stacks, given)
    matched = POST["norm_match"].run(stacks, merged, given)
    for s, before, after in zip(stacks, merged, matched, strict=True):
        case, update = CASES[s.name], dense(before)
        wanted = abs(LAMBDA) * mean_norm(case, case.weights)
        expected = update * wanted / update.norm() if update.any() else update
        assert_close(dense(after), expected, 1e-6, name=s.name)


@every_backend
def test_norm_match_leaves_nothing_as_it_is(backend):
    """A merge in which all cancels is not blown up."""
    case = CASES["one adapter"]
    twice = Case([case.a[0]] * 2, [case.b[0]] * 2, case.scalings * 2)
    opposite = dataclasses.replace(stack("x", twice), weights=(1.0, -1.0))
    merged = merge("linear", [opposite], settings(backend))
    (matched,) = POST["norm_match"].run([opposite], merged, settings(backend))
    assert dense(matched).norm() < 1e-6 * sizes(case)[0]


def test_norm_match_takes_the_norms_of_the_stacks_that_it_is_given():
    """Those from before the steps, which may shrink updates."""
    case, given = CASES["odd d"], settings("torch")
    stacks = [stack("x", case)]
    merged = merge("do", PRE["orthogonalize"].run(stacks, given), given, orthogonalize=False)
    (matched,) = POST["norm_match"].run(stacks, merged, given)
    assert float(dense(matched).norm()) == pytest.approx(mean_norm(case, case.weights), rel=1e-6)


# Together


@every_backend
def test_steps_follow_each_other(backend):
    """Equal norms survive new factors, and modules of many shapes go through in one group."""
    given = settings(backend)
    stacks = [stack(name, case) for name, case in CASES.items() if name != "64 adapters"]
    steps = [PRE["equalize"], PRE["canonicalize"]]
    moved: Sequence[Stack] = stacks
    for step in steps:
        moved = step.run(moved, given)
    for s in moved:
        norms = [float(x.norm()) for x in updates(s) if x.any()]
        assert norms == pytest.approx(
            [mean_norm(CASES[s.name], [1.0] * len(s.adapters))] * len(norms)
        )
