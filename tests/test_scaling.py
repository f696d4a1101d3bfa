"""λ that is found from the adapters, against its definition: dense, in float64, written out."""

from __future__ import annotations

import errno
import io
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.make import PAIR, random_factors, write_adapter
from support.merges import adapters, at_one, dense
from support.shapes import CASES, Case, random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters.plan import Plan
from domerge_fast.backends import paper
from domerge_fast.cli import main as cli
from domerge_fast.engine import first_pass as whole
from domerge_fast.engine import reader
from domerge_fast.engine.scaling import DAMPING
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE, decoupled
from domerge_fast.methods.base import ScaleRule
from domerge_fast.methods.decoupled import ABOVE
from domerge_fast.storage.shelf import Shelf

SMALL, LARGE = 0.002, 0.05
"""Of B: S is about .05 and 1."""

WEIGHTS = ([1.0, 1.0], [1.0, -0.25])
FEW = {"steps": 3, "tol": 0.0}
OWN = tuple(name for name, row in TABLE.items() if row.own_scale)
"""λ is 1 for them where none is given."""

UNCUT = {"energy": 1.0}
"""Of a dense result: factors of the rank that it has."""
EVERY_WAY = [
    ("tsvm", {}),
    ("tsvm", {"power": 0.25}),
    ("iso_c", {}),
    ("do", {}),
    ("do", {"directions": "ties", **UNCUT}),
    ("ties", UNCUT),
    ("knots", UNCUT),
    ("core", {"inner": "tsvm", "power": 0.25}),
    ("linear", {}),
    ("auto", {}),
]
every_way = pytest.mark.parametrize(("method", "options"), EVERY_WAY, ids=str)

Cases = Mapping[str, Case]


def sized(case: Case, size: float, of_a: float = 1.0) -> Case:
    return Case([of_a * a for a in case.a], [size * b for b in case.b], case.scalings)


def model(size: float = SMALL) -> dict[str, Case]:
    """Two modules of two adapters."""
    return {
        "x": sized(random_case((3, 2), 23, 19), size),
        "y": sized(random_case((2, 4), 17, 31, seed=1), size),
    }


def partly_shared(size: float = SMALL) -> dict[str, Case]:
    """Modules of three, two and one adapters."""
    return {
        "three": sized(random_case((3, 2, 2), 23, 19, seed=2), size),
        "two": sized(random_case((2, 4), 17, 31, seed=3), size),
        "two more": sized(random_case((2, 3), 19, 21, seed=4), 2 * size),
        "one": sized(random_case((3,), 13, 11, seed=5), size),
    }


def auto(cases: Cases, method: str = "do", **given: Any) -> dm.Merged:
    return dm.merge(adapters(dict(cases)), method, **{"scale": "auto", **given})


def same_bytes(one: dm.Merged, other: dm.Merged) -> bool:
    pairs = ((one.factors(name), other.factors(name)) for name in one.names)
    return all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def check_scaled(found: dm.Merged, plain: dm.Merged, scale: float, share: float = 1e-5) -> None:
    """found is the scale times what is at λ = 1."""
    for name in plain.names:
        assert_close(dense(found, name), scale * dense(plain, name), share, name=name)


# The definition


def norm(update: Tensor, order: int = 16) -> float:
    s = torch.linalg.svdvals(update.double())
    return float(s[0] * (s / s[0]).pow(order).sum() ** (1 / order)) if s[0] > 0 else 0.0


def damping(cases: Cases) -> float:
    """1 / (1 + DAMPING S), S = sum_modules (mean_i ||τ_i||_F^2 / m)^(1/2)."""
    moved = 0.0
    for case in cases.values():
        energies = [float(delta.square().sum()) for delta in case.deltas()]
        moved += math.sqrt(sum(energies) / len(energies) / len(case.b[0]))
    return 1 / (1 + DAMPING * moved)


def by_norms(
    cases: Cases, weights: Sequence[float], merged: Mapping[str, Tensor], names: Sequence[str]
) -> float:
    """The sums over the modules `names`, damped by all."""
    given = 0.0
    for name in names:
        deltas = cases[name].deltas()
        sizes = [abs(w) for w, _ in zip(weights, deltas, strict=False)]
        squares = [(w * norm(delta)) ** 2 for w, delta in zip(sizes, deltas, strict=True)]
        given += math.sqrt(sum(squares) / len(squares)) / (sum(sizes) / len(sizes))
    size = sum(norm(merged[name]) for name in names)
    return ScaleRule().constant * damping(cases) * given / size


def constant(method: str, options: Mapping[str, Any]) -> float:
    """What the norm in λ is divided by: 1 but for `do`, whose norm is another."""
    inner = options.get("directions", "linear")
    plain = method == "do" and inner == "linear"
    return ABOVE if plain else 1.0


def merges(
    definition: Callable[[Case, Sequence[float]], Tensor], cases: Cases, weights: Sequence[float]
) -> dict[str, Tensor]:
    return {name: definition(case, weights) for name, case in cases.items()}


def updates(case: Case, weights: Sequence[float]) -> list[Tensor]:
    return [w * delta for w, delta in zip(weights, case.deltas(), strict=True)]


def polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def linear(case: Case, weights: Sequence[float]) -> Tensor:
    return torch.stack(updates(case, weights)).sum(0)


def iso_c(case: Case, weights: Sequence[float]) -> Tensor:
    u, s, vh = torch.linalg.svd(linear(case, weights))
    k = sum(case.ranks)
    return s[:k].mean() * u[:, :k] @ vh[:k]


def tsvm_flatter(case: Case, weights: Sequence[float]) -> Tensor:
    """At power 0.25."""
    parts = [torch.linalg.svd(x) for x in updates(case, weights)]
    u = torch.cat([p[0][:, :r] for p, r in zip(parts, case.ranks, strict=True)], 1)
    s = torch.cat([p[1][:r] for p, r in zip(parts, case.ranks, strict=True)])
    v = torch.cat([p[2][:r] for p, r in zip(parts, case.ranks, strict=True)]).T
    u, s, vh = torch.linalg.svd(polar(u) @ s.diag() @ polar(v).T)
    k = sum(case.ranks)
    flat = s[:k] ** 0.25
    return u[:, :k] @ (flat * s[:k].norm() / flat.norm()).diag() @ vh[:k]


def wudi(case: Case, weights: Sequence[float]) -> Tensor:
    taus = updates(case, weights)
    rows = torch.linalg.svd(torch.cat([a.double() for a in case.a]), full_matrices=False)[2]
    reads = 1e-3 * rows.T @ rows
    sums = 1e-3 * linear(case, weights)
    for tau in taus:
        reads = reads + tau.T @ tau / tau.square().sum()
        sums = sums + tau @ tau.T @ tau / tau.square().sum()
    return sums @ torch.linalg.pinv(reads, rtol=1e-9, hermitian=True)


def do_as_they_are(case: Case, weights: Sequence[float]) -> Tensor:
    return one_magnitude(case.deltas(), weights)


def do(case: Case, weights: Sequence[float]) -> Tensor:
    a, _ = paper.descend([x.double() for x in case.a], **FEW)
    b, _ = paper.descend([x.T for x in case.exact_b()], **FEW)
    return one_magnitude([y.T @ x for x, y in zip(a, b, strict=True)], weights)


def one_magnitude(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """What the norm is taken of: one magnitude an adapter in place of one a column."""
    omegas = [w / sum(map(abs, weights)) for w in weights]
    magnitude = sum(abs(w) * delta.norm() for w, delta in zip(omegas, deltas, strict=True))
    parts = [w * magnitude / delta.norm() * delta for w, delta in zip(omegas, deltas, strict=True)]
    return torch.stack(parts).sum(0)


DEFINED: list[tuple[str, dict[str, Any], Callable[[Case, Sequence[float]], Tensor]]] = [
    ("tsvm", {"power": 0.25}, tsvm_flatter),
    ("core", {"inner": "tsvm", "power": 0.25}, tsvm_flatter),
    ("iso_c", {}, iso_c),
    ("wudi", {}, wudi),
    ("do", FEW, do),
    ("do", {"orthogonalize": False}, do_as_they_are),
    ("linear", {}, linear),
    ("cat", {}, linear),
    ("svd", {"rank": 99}, linear),
    ("knots", {"inner": "linear"}, linear),
]


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("method", "options", "definition"), DEFINED)
def test_the_merge_goes_as_far_as_the_adapters_do(method, options, definition, weights, size):
    cases = model(size)
    found = auto(cases, method, weights=weights, **options)
    expected = by_norms(cases, weights, merges(definition, cases, weights), [*cases])
    expected *= constant(method, options)
    assert found.report.scale == pytest.approx(expected, rel=1e-5)
    assert found.report.recipe.scale == "auto"
    assert found.report.scales == {2: found.report.scale}
    plain = at_one(adapters(cases), method, weights=weights, **options)
    check_scaled(found, plain, found.report.scale)


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [
        ("tsvm", {}, 1.0),
        ("tsvm", {"power": 0.5}, 1.0),
        ("ties", UNCUT, 1.25),
        ("dare", UNCUT, 1.25),
        ("knots", UNCUT, 1.25),
        ("core", {"inner": "tsvm"}, 1.0),
    ],
    ids=str,
)
def test_what_has_its_scale_already_is_damped_alone(method, options, factor, weights, size):
    cases = model(size)
    found = auto(cases, method, weights=weights, **options)
    expected = factor * damping(cases) * 2 / sum(map(abs, weights))
    assert found.report.scale == pytest.approx(expected, rel=1e-5)
    plain = at_one(adapters(cases), method, weights=weights, **options)
    check_scaled(found, plain, found.report.scale)


def test_the_further_adapters_move_the_whole_model_the_more_it_is_damped():
    a, b = torch.zeros(1, 4), torch.zeros(3, 1)
    a[0, 0], b[:, 0] = 1.0, 2.0  # 2 beside weights whose rows have length 1
    for count in (1, 5):
        factors = [{f"x.{i}": (a.roll(k, 1), b) for i in range(count)} for k in range(2)]
        pair = [from_tensors(x, name=f"{k}") for k, x in enumerate(factors)]
        expected = 1.25 / (1 + DAMPING * 2 * count)
        found = dm.merge(pair, "ties", scale="auto").report.scale
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_experts_of_a_layer_count_once():
    factors = random_factors({f"layers.0.mlp.experts.{i}.up_proj": (9, 11) for i in range(6)}, 2)
    pair = [from_tensors(factors, name=f"{k}") for k in range(2)]
    sizes = [float((b @ a).norm()) / 3 for a, b in factors.values()]
    expected = 1.25 / (1 + DAMPING * sum(sizes) / len(sizes))
    assert dm.merge(pair, "ties", scale="auto").report.scale == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["do", "linear", "wudi", "iso_c"])
def test_what_is_left_of_adapters_that_cancel_is_not_made_large(method):
    case = model()["x"]
    twice = {"x": Case([case.a[0]] * 2, [case.b[0]] * 2, [1.0, 1.0])}
    found = auto(twice, method, weights=[0.5, -0.5])
    assert 0.5 * found.report.scale <= constant(method, {})
    assert dense(found, "x").norm() <= 1e-6 * twice["x"].deltas()[0].norm()


# What is said


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(("method", "options"), [x for x in EVERY_WAY if "energy" not in x[1]])
def test_the_printed_scale_given_back_is_the_same_merge(method, options, size):
    cases = model(size)
    found = auto(cases, method, **options)
    text = dict(found.report.summary())["scale"]
    assert re.fullmatch(r"[0-9.]+, found from the adapters", text)
    again = auto(cases, method, **options, scale=float(text.split(",")[0]))
    assert same_bytes(found, again)
    assert again.report.recipe.scale != "auto"
    assert (again.report.scale, again.report.scales) == (found.report.scale, {})


@every_way
def test_weights_are_proportions(method, options):
    cases = model()
    found = [auto(cases, method, weights=w, **options) for w in ([1, -2], [2, -4], [0.3, -0.6])]
    for other in found[1:]:
        for name in cases:
            assert_close(dense(other, name), dense(found[0], name), 2e-5, name=name)


@pytest.mark.parametrize("method", OWN)
def test_a_sum_and_what_sets_its_norm_are_at_1_unless_a_scale_is_asked_for(method):
    cases = {"x": sized(random_case((3, 3), 23, 19), SMALL), "y": model()["y"]}
    if method == "robust":  # of one rank in all modules
        del cases["y"]
    given = {"rank": 99} if method == "svd" else {}
    plain = dm.merge(adapters(cases), method, **given)
    assert (plain.report.scale, plain.report.recipe.scale, plain.report.scales) == (1, 1, {})
    found = auto(cases, method, **given)
    expected = by_norms(cases, [1, 1], {name: dense(plain, name) for name in cases}, [*cases])
    assert found.report.scale == pytest.approx(expected, rel=1e-5)
    check_scaled(found, plain, found.report.scale)


@pytest.mark.parametrize("method", ["knots", "core", "do"])
def test_a_method_with_a_sum_inside(method):
    inner = {"do": "directions"}.get(method, "inner")
    report = dm.merge(adapters(model()), method, **{inner: "linear"}).report
    assert (report.recipe.scale == "auto") == (method == "do")


# Which modules count


@pytest.mark.parametrize("method", ["tsvm", "do", "iso_c"])
@pytest.mark.parametrize("weights", [[-2.0], [0.0, 3.0]], ids=str)
def test_one_adapter_is_at_1(method, weights):
    case = sized(random_case((3,) * len(weights), 23, 19), LARGE)
    found = auto({"x": case}, method, weights=weights)
    assert (found.report.scale, found.report.scales) == (1, {})
    assert same_bytes(found, at_one(adapters({"x": case}), method, weights=weights))


@pytest.mark.parametrize("method", ["iso_c", "do", "linear"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_modules_of_as_many_adapters_have_one_scale_and_that_of_one_is_1(method, size):
    cases, weights = partly_shared(size), [1.0, -0.5, 2.0]
    found = auto(cases, method, weights=weights)
    plain = at_one(adapters(cases), method, weights=weights)
    deltas = {name: dense(plain, name) for name in cases}
    groups = {3: ["three"], 2: ["two", "two more"]}
    expected = {k: by_norms(cases, weights, deltas, names) for k, names in groups.items()}
    if method == "do":  # of another norm: modules of two have the right one beside each other
        found_three = auto({"three": cases["three"]}, method, weights=weights).report.scale
        share = damping(cases) / damping({"three": cases["three"]})
        expected = {3: share * found_three, 2: found.report.scales[2]}
    assert found.report.scales == pytest.approx(expected, rel=1e-5)
    assert found.report.scale == found.report.scales[3]
    for name, case in cases.items():
        scale = found.report.scales.get(len(case.ranks), 1.0)
        assert_close(dense(found, name), scale * deltas[name], 1e-5, name=name)
    said = dict(found.report.summary())["scale"]
    two = f"{found.report.scales[2]:g} where 2 adapters have a module"
    assert said == f"{found.report.scale:g}, found from the adapters, {two}"


def test_a_scale_is_counted_by_weights_of_the_adapters_that_a_module_has():
    cases = partly_shared()
    found = auto(cases, "ties", weights=[1.0, 3.0, 8.0], **UNCUT)
    plain = at_one(adapters(cases), "ties", weights=[1.0, 3.0, 8.0], **UNCUT)
    damped = 1.25 * damping(cases)
    for name, scale in (("three", damped * 3 / 12), ("two", damped * 2 / 4), ("one", 1.0)):
        assert_close(dense(found, name), scale * dense(plain, name), 1e-5, name=name)


@every_way
def test_adapters_of_zeros_leave_zeros(method, options):
    cases = {"x": CASES["all zero"]}
    found = auto(cases, method, **options)
    assert not dense(found, "x").any()


# Sizes


@every_way
@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_extreme_weights_are_proportions_too(method, options, size):
    cases = partly_shared() | {"one": sized(random_case((3,), 13, 11), 1e-3 / size)}
    weights = [1.0, 2.0, -3.0]
    plain = auto(cases, method, weights=weights, **options)
    found = auto(cases, method, weights=[size * w for w in weights], **options)
    for name in ("three", "two", "two more"):
        assert_close(dense(found, name), dense(plain, name), 2e-5, name=name)
    own = 1.0 if method == "do" else size
    assert_close(dense(found, "one"), own * dense(plain, "one"), 1e-5)


def test_a_weight_that_no_factor_holds_is_refused_where_it_stays():
    cases = partly_shared()
    with pytest.raises(dm.DomergeError, match=r"^module 'one': .* does not fit in float32; use a"):
        auto(cases, "tsvm", weights=[1e300, 1e300, 1e300])
    del cases["one"]
    plain, found = (auto(cases, "tsvm", weights=[w] * 3) for w in (1.0, 1e300))
    check_scaled(found, plain, 1.0, 2e-5)


@every_way
@pytest.mark.parametrize("of_a", [1e-30, 1e30])
@pytest.mark.parametrize("of_b", [1e-30, 1e30])
def test_adapters_of_extreme_sizes(method, options, of_a, of_b):
    """What adapters trained beyond any measure are damped to is still their merge."""
    usual = model()
    cases = {name: sized(case, of_b, of_a) for name, case in usual.items()}
    if method == "auto":
        far = of_a * of_b > 1e30
        method, options = "do" if far else "tsvm", {} if far else {"post": ["svc"]}
    found, small = (auto(x, method, **options) for x in (cases, usual))
    expected = damping(cases) / damping(usual) * small.report.scale
    assert found.report.scale == pytest.approx(expected, rel=1e-4)
    plain = at_one(adapters(cases), method, **options)
    check_scaled(found, plain, found.report.scale, 1e-4)
    for name in cases:
        assert dense(found, name).any()


@pytest.mark.parametrize(("method", "options"), [*EVERY_WAY[1:4], ("linear", {})], ids=str)
def test_adapters_that_are_far_apart(method, options):
    case = random_case((3, 2), 23, 19)
    far = Case([case.a[0], 1e-9 * case.a[1]], [case.b[0], 1e-9 * case.b[1]], case.scalings)
    found = auto({"x": far}, method, **options)
    plain = at_one(adapters({"x": far}), method, **options)
    if method != "do":
        expected = by_norms({"x": far}, [1, 1], {"x": dense(plain, "x")}, ["x"])
        assert found.report.scale == pytest.approx(expected, rel=1e-5)
    check_scaled(found, plain, found.report.scale)


DO = [{}, {"decouple": False}, {"renormalize": True}, {"sides": "A"}, {"orthogonalize": False}]


@pytest.mark.parametrize("options", DO, ids=str)
def test_norms_in_float32_are_those_in_float64(options, monkeypatch):
    found = do_norms(partly_shared(), options, monkeypatch)
    monkeypatch.setattr(decoupled, "LEFT", math.inf)
    expected = do_norms(partly_shared(), options, monkeypatch)
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", DO[:3], ids=str)
def test_norms_of_adapters_that_cancel_are_in_float64(options, monkeypatch):
    case = sized(random_case((3, 3), 23, 19), SMALL)
    both = Case([case.a[0], case.a[0], case.a[1]], [case.b[0], case.b[0], case.b[1]], [1.0] * 3)
    cases = {"x": both, "y": sized(random_case((2, 2, 2), 17, 31), SMALL)}
    norms = {}
    for left in (decoupled.LEFT, math.inf, 0.0):
        monkeypatch.setattr(decoupled, "LEFT", left)
        norms[left] = do_norms(cases, options, monkeypatch, weights=[1.0, -1.0, 0.02])
    usual, wide, narrow = norms.values()
    assert usual[0] == wide[0] != narrow[0]
    assert usual[1] == narrow[1] != wide[1]


@pytest.mark.parametrize("options", [*DO, {"steps": 0}], ids=str)
@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1.0, 1e-9, 1.0), (1.0, 1.0, 1e-3)], ids=str)
def test_norms_from_matrices_are_those_from_grams(sizes, options, monkeypatch):
    """Of more rows than columns: modules alike, one that is far from 1, adapters that cancel."""
    cases = {}
    for seed, name in enumerate(("x", "y", "z")):
        case = random_case((5, 7, 5), 13 if name == "z" else 19, 11, seed=seed)
        for a, b, size in zip(case.a, case.b, sizes, strict=True):
            a *= size
            b *= size
        if sizes[2] < 1:
            case.a[0], case.b[0] = case.a[2] / sizes[2], case.b[2] / sizes[2]
            case.a[2], case.b[2] = case.a[0] * 0.9, case.b[0]
            case.scalings[:] = [1.0, sizes[2], -1.0]
        cases[name] = case
    found = auto(cases, **options).report.scale
    monkeypatch.setattr(decoupled, "_is_large", lambda stack: False)
    assert found == pytest.approx(auto(cases, **options).report.scale, rel=3e-5)


def do_norms(
    cases: Cases, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, **given: Any
) -> list[float]:
    """The norms of merges at λ = 1, by module."""
    norms: list[float] = []
    run = decoupled.sizes

    def noted(*arguments: Any) -> list[list[float]]:
        found = run(*arguments)
        norms.extend(size for own in found for size in own)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(decoupled, "sizes", noted)
        auto(cases, **options, **given)
    return norms


# However it runs


@every_way
def test_one_module_at_a_time_and_all_at_once(method, options, monkeypatch):
    cases = partly_shared()
    one = auto(cases, method, **options)
    steps: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(reader, "GROUP_BYTES", 1)
        patch.setattr(reader, "DENSE_BYTES", 1)
        many = auto(cases, method, **options, progress=lambda *done: steps.append(done))
    assert steps == [(k, 8) for k in range(1, 9)]
    assert many.report.scales == pytest.approx(one.report.scales, rel=2e-6)
    check_scaled(many, one, 1.0)


@every_way
def test_any_number_of_threads_merges_the_same(method, options, threads):
    cases = partly_shared()
    threads(1)
    one = auto(cases, method, **options)
    threads(2)
    assert same_bytes(one, auto(cases, method, **options))


@every_way
def test_files_and_memory_merge_the_same(method, options, tmp_path):
    factors = [random_factors(PAIR, rank, seed=rank) for rank in (3, 4)]
    paths = [write_adapter(tmp_path / f"{k}", x) for k, x in enumerate(factors)]
    memory = [from_tensors(x, name=f"{k}") for k, x in enumerate(factors)]
    found, expected = (dm.merge(x, method, scale="auto", **options) for x in (paths, memory))
    assert found.report.scales == expected.report.scales
    assert same_bytes(found, expected)


@pytest.mark.parametrize("method", ["tsvm", "do", "ties"])
@pytest.mark.parametrize("post", [(), ("svc",)])
def test_what_is_kept_may_be_in_a_file(method, post, monkeypatch):
    cases = partly_shared()
    here = auto(cases, method, post=post)
    monkeypatch.setattr(whole, "Shelf", lambda: Shelf(0))
    assert same_bytes(here, auto(cases, method, post=post))


def test_a_shelf_gives_back_what_was_put_there_in_any_order():
    for most in (0, 100, 1000):
        shelf = Shelf(most)
        things = {f"{k}": (torch.full((k,), float(k)), None, 1.5 * k) for k in range(1, 20)}
        for name, thing in things.items():
            shelf.put(name, thing, 4 * len(thing[0]))
        for name in sorted(things):
            found, nothing, number = shelf.take(name)
            assert torch.equal(found, things[name][0])
            assert (nothing, number) == things[name][1:]


@pytest.mark.parametrize("at", ["write", "flush"])
def test_a_full_disk_is_told_in_one_line(at, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        pass

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(Full, at, fail)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: Full())
    monkeypatch.setattr(whole, "Shelf", lambda: Shelf(0))
    with pytest.raises(dm.OutputError) as error:
        auto(model(), "tsvm", output=tmp_path / "out")
    problem = "no room for intermediate results (No space left on device)"
    remedy = "make room, or name another folder with TMPDIR"
    assert str(error.value) == f"output {tempfile.gettempdir()!r}: {problem}; {remedy}"
    assert not list(tmp_path.iterdir())


# Cuts, steps and forms


@pytest.mark.parametrize("method", ["tsvm", "do", "wudi", "ties"])
@pytest.mark.parametrize("given", [{"rank": 2}, {"energy": 0.5}], ids=str)
def test_a_cut_leaves_the_scale_and_the_norm_as_they_were(method, given):
    cases = {name: case for name, case in partly_shared().items() if name != "one"}
    uncut = UNCUT if method == "ties" else {}
    plain, found = auto(cases, method, **uncut), auto(cases, method, **given)
    assert found.report.scales == plain.report.scales
    cut = at_one(adapters(cases), method, **given)
    for name in cases:
        size = dense(plain, name).norm() / dense(cut, name).norm()
        assert_close(dense(found, name), size * dense(cut, name), 1e-4, name=name)
        kept = cut.report[name].energy_kept
        # Entry by entry, it is of a dense float32 matrix, cut by torch's SVD.
        near = 1e-5 if method == "ties" else 1e-6
        assert found.report[name].energy_kept == pytest.approx(kept, rel=near)
    assert any("before the cut" in note for note in found.report.notes)


def test_what_is_cut_at_a_given_scale_is_the_nearest_of_its_rank():
    cases = model()
    found = dm.merge(adapters(cases), "tsvm", scale=2.0, rank=2)
    check_scaled(found, at_one(adapters(cases), "tsvm", rank=2), 2.0)
    assert not any("before the cut" in note for note in found.report.notes)


def test_a_cut_takes_nothing_back_from_one_adapter():
    cases = partly_shared()
    found, cut = (auto(cases, "tsvm", rank=2), at_one(adapters(cases), "tsvm", rank=2))
    assert_close(dense(found, "one"), dense(cut, "one"), 1e-5)


@pytest.mark.parametrize("method", ["iso_c", "do", "tsvm"])
def test_a_step_that_sets_the_norm_needs_no_scale(method):
    cases = model(LARGE)
    found = auto(cases, method, post=["norm_match"])
    assert (found.report.scale, found.report.scales) == (1, {})
    assert same_bytes(found, at_one(adapters(cases), method, post=["norm_match"]))


@pytest.mark.parametrize("method", ["wudi", "do", "linear"])
def test_a_step_after_the_merge_counts(method):
    cases, post = model(), ["subspace_boost"]
    found = auto(cases, method, post=post)
    plain = at_one(adapters(cases), method, post=post)
    expected = by_norms(cases, [1, 1], {name: dense(plain, name) for name in cases}, [*cases])
    assert found.report.scale == pytest.approx(expected, rel=1e-5)
    check_scaled(found, plain, found.report.scale)


def test_a_step_before_the_merge_changes_that_and_not_the_adapters():
    cases, pre = model(), ["equalize"]
    found = auto(cases, "iso_c", pre=pre)
    plain = at_one(adapters(cases), "iso_c", pre=pre)
    expected = by_norms(cases, [1, 1], {name: dense(plain, name) for name in cases}, [*cases])
    assert found.report.scale == pytest.approx(expected, rel=1e-5)
    check_scaled(found, plain, found.report.scale)


@every_way
def test_dense_updates_have_the_same_scale(method, options):
    cases = model()
    found = auto(cases, method, form="deltas", **options)
    assert found.report.scales == auto(cases, method, **options).report.scales
    if method != "auto":
        plain = at_one(adapters(cases), method, form="deltas", **options)
        for name in cases:
            expected = found.report.scale * plain.delta(name)
            assert_close(found.delta(name), expected, 1e-5, name=name)


def test_a_model_has_the_scaled_updates(tmp_path):
    cases = model()
    base = tmp_path / "base"
    base.mkdir()
    weights = {
        f"{name}.weight": torch.zeros(len(c.b[0]), c.a[0].shape[1]) for name, c in cases.items()
    }
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    given = {"form": "model", "base": base, "output": tmp_path / "out"}
    report = auto(cases, "iso_c", **given).report
    merged = auto(cases, "iso_c")
    assert report.scale == merged.report.scale
    written = load_file(next(Path(tmp_path, "out").glob("*.safetensors")))
    for name in cases:
        assert_close(written[f"{name}.weight"], dense(merged, name), 1e-5, name=name)


# The norm of dense merges


def test_a_dense_update_within_the_adapters_spaces_has_its_whole_norm():
    cases = model()
    plan = Plan.make(adapters(cases), [1.0, 1.0])
    stacks = [plan.stack(name) for name in cases]
    deltas = [case.deltas()[0].float() + case.deltas()[1].float() for case in cases.values()]
    found = whole.projected(stacks, deltas, 16, "auto")
    assert found == pytest.approx([norm(delta) for delta in deltas], rel=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_the_projected_norm_is_near_the_whole_one_and_never_above(method):
    cases = {"x": random_case((8, 8), 64, 48), "y": random_case((6, 10), 50, 70, seed=1)}
    merged = at_one(adapters(cases), method, form="deltas", density=0.8)
    plan = Plan.make(adapters(cases), [1.0, 1.0])
    found = whole.projected(
        [plan.stack(n) for n in cases], [merged.delta(n) for n in cases], 16, "auto"
    )
    for name, size in zip(cases, found, strict=True):
        exact = norm(merged.delta(name))
        assert 0.9 * exact < size <= (1 + 1e-6) * exact, name


# The command line


def test_the_command_line_finds_a_scale_takes_one_and_refuses_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        write_adapter(tmp_path / f"{k}", random_factors(PAIR, 3, seed=k))
    line = ["merge", "0", "1", "--method", "iso_c", "--overwrite", "-o", "out"]
    expected = dm.merge(["0", "1"], "iso_c").report.scale
    for more in ([], ["--scale", "auto"]):
        assert cli.main([*line, *more]) == 0
        assert f"{expected:g}, found from the adapters" in capsys.readouterr().out
    assert cli.main([*line, "--scale", "2"]) == 0
    assert re.search(r"scale +2\n", capsys.readouterr().out)
    assert cli.main([*line, "--scale", "x"]) == 2
    line = (
        "error: argument --scale: 'x' is no number, and not auto; see 'domerge-fast merge --help'"
    )
    assert capsys.readouterr().err.splitlines() == [f"domerge-fast: {line}"]


def test_modules_of_other_adapters_but_as_many_have_one_scale():
    case = model()["x"]
    pairs = {"x": (0, 1), "y": (1, 2), "z": (0, 2)}
    given = [
        from_tensors({n: (case.a[0], (k + 1) * case.b[0]) for n, own in pairs.items() if k in own})
        for k in range(3)
    ]
    for options in ({}, {"post": ["svc"]}):
        found = dm.merge(given, "tsvm", weights=[1, 2, 3], **options)
        assert [*found.report.scales] == [2]
        assert same_bytes(
            found,
            dm.merge(given, "tsvm", weights=[1, 2, 3], scale=found.report.scale, **options),
        )


@pytest.mark.parametrize("method", ["iso_c", "do", "tsvm"])
@pytest.mark.parametrize("weight", [1e-5, 1e5, 1e-15, 1e15])
def test_small_weights_are_no_sign_of_adapters_that_cancel(method, weight):
    found, one = (auto(model(), method, weights=[w, w]) for w in (weight, 1.0))
    share = 1.0 if method == "do" else weight
    assert found.report.scale * share == pytest.approx(one.report.scale, rel=1e-5)
    assert found.report.scale == float(f"{found.report.scale:.6g}")
