"""Whole merges of small adapters against dense formulas in float64."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.close import assert_close, distance
from support.merges import LEVELLING, adapters, at_one, dense, merge_all
from support.shapes import CASES, CONVERGED, Case, random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast.backends import paper, registry
from domerge_fast.engine import pipeline as engine
from domerge_fast.engine import reader
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE, do

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
FAST = [name for name in AVAILABLE if name != "reference"]
GROUP = ("odd d", "d below R", "duplicated", "mixed sizes")  # of three adapters each
WEIGHTS = [1.0, -0.5, 2.0]
# Two adapters, or equal ranks: tests/test_weighted_and_clustered.py asks the same of these.
ENTRIES = [m for m, row in TABLE.items() if row.dense]  # test_elementwise.py
APART = ("slerp", "robust", "opcm")  # two adapters; equal ranks; in order, over the whole model
GENERAL = [m for m in TABLE if m not in (*APART, *ENTRIES)]
CUT = [m for m in GENERAL if m not in (*LEVELLING, "ctm")]  # tests/test_flat_cuts.py has the others
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def every_method(methods: Sequence[str], backends: Sequence[str] = AVAILABLE) -> Any:
    """On the CPU's backend. What knows a backend by more than its gram and apply goes through
    all, and so does one method of those that do not."""
    asking = ("do", "linear", "svd", "tsvm")
    return pytest.mark.parametrize(
        ("method", "backend"),
        [(m, b) for m in methods for b in backends if b == "cpu" or m in asking],
    )


def few_steps(method: str) -> dict[str, float]:
    """So few that rounding has no say in where the descent of "do" stops."""
    return {"steps": 3, "tol": 0.0} if method == "do" else {}


def weighted_sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * update for w, update in zip(weights, updates, strict=True))


@functools.cache
def literal(name: str, equal: bool = False, **options: Any) -> Tensor:
    """A case merged by "do" as it is printed, with its own weights or equal ones."""
    case = CASES[name]
    omegas = [1 / len(case.a)] * len(case.a) if equal else case.omegas
    return paper.do_merging(case.a, case.exact_b(), omegas, **options)


# do

DESCENTS = [
    {"orthogonalize": False},
    {"penalty": "squared", "sides": "both", "gamma": 0.1, "steps": 3, "tol": 0.0},
    {"penalty": "squared", "sides": "A", "gamma": 1.0, "steps": 2, "tol": 0.0},
    {"penalty": "frobenius", "sides": "both", "gamma": 2.0, "steps": 1, "tol": 0.0},
    {"penalty": "frobenius", "sides": "B", "gamma": 1.0, "steps": 1, "tol": 0.0},
]
RECOMBINATIONS = [
    {"decouple": False, "scale": 2.5},
    {"decouple": True, "scale": -1.5},
    {"decouple": True, "renormalize": True},
]


@every_backend
@pytest.mark.parametrize("recombination", RECOMBINATIONS, ids=str)
@pytest.mark.parametrize("descent", DESCENTS, ids=str)
def test_do_is_the_literal_method(descent, recombination, backend):
    cases = {name: CASES[name] for name in GROUP}
    if descent.get("penalty") == "squared":
        cases = {name: case for name, case in cases.items() if not case.is_wide}
    options = {**descent, **recombination}
    merged = at_one(adapters(cases), weights=WEIGHTS, backend=backend, **options)
    assert merged.names == tuple(sorted(cases))
    for name in cases:
        assert_close(dense(merged, name), literal(name, **options), 1e-5, name=name)


@every_backend
@pytest.mark.parametrize("recombination", RECOMBINATIONS, ids=str)
@pytest.mark.parametrize("sides", ["both", "A"])
def test_do_of_more_rows_than_columns_ends_where_the_literal_method_does(
    sides, recombination, backend
):
    options = {"sides": sides, **CONVERGED, **recombination}
    cases = {name: CASES[name] for name in GROUP if CASES[name].is_wide}
    assert cases
    merged = at_one(adapters(cases), weights=WEIGHTS, backend=backend, **options)
    for name in cases:
        assert_close(dense(merged, name), literal(name, **options), 1e-3, name=name)


@every_backend
def test_do_by_default(backend):
    """The number of steps may differ by rounding, and the result with it, but little; where there
    are more rows than columns, by more than that."""
    cases = {name: CASES[name] for name in GROUP}
    merged = at_one(adapters(cases), backend=backend)
    for name, case in cases.items():
        allowed = 2e-2 if case.is_wide else 1e-4
        assert_close(dense(merged, name), literal(name, equal=True), allowed, name=name)


@every_backend
def test_do_over_the_other_shapes(backend):
    cases = {n: case for n, case in CASES.items() if n not in (*GROUP, "64 adapters")}
    wide = {name: case for name, case in cases.items() if case.is_wide}
    for some, rule, allowed in (
        ({n: cases[n] for n in cases.keys() - wide.keys()}, {"steps": 3, "tol": 0.0}, 1e-5),
        (wide, CONVERGED, 1e-3),
    ):
        merged = merge_all(some, "do", backend=backend, **rule)
        for name in some:
            assert_close(dense(merged, name), literal(name, **rule), allowed, name=name)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("penalty", do.PENALTIES)
def test_both_formulations_of_the_descent_merge_alike(penalty, backend, monkeypatch):
    """R > d on both sides: with the squared penalty the factors move, not their Gram's C."""
    cases = {"x": random_case((2, 1) * 20, 11, 9)}
    squared = penalty == "squared"
    steps = CONVERGED if squared else {"steps": 2, "tol": 0.0}
    rule = {"penalty": penalty, "backend": backend, **steps}
    usual = at_one(adapters(cases), **rule)
    monkeypatch.setattr(do, "on_factors", lambda *_: False)
    on_gram = at_one(adapters(cases), **rule)
    assert distance(dense(usual, "x"), dense(on_gram, "x")) < (1e-2 if squared else 1e-5)
    found, expected = usual.report["x"], on_gram.report["x"]
    for side, other in ((found.a, expected.a), (found.b, expected.b)):
        assert side.objective_after == pytest.approx(other.objective_after, rel=1e-5)
        assert squared or side.steps == 2
        assert (side.scaled is not None) == squared
        assert side.objective_after < 0.5 * side.objective_before


@pytest.mark.parametrize("backend", FAST)
def test_hundreds_of_adapters(backend):
    case = random_case((1,) * 200, 13, 12)
    case.scalings[:] = [1.0] * 200
    merged = at_one(adapters({"x": case}), orthogonalize=False, backend=backend)
    expected = paper.do_merging(case.a, case.exact_b(), [1 / 200] * 200, orthogonalize=False)
    assert distance(dense(merged, "x"), expected) < 1e-5
    assert len(merged.report["x"].magnitudes) == 200
    assert merged.report.interference is not None
    assert merged.report.interference.tables is None
    assert len(merged.report.interference.norms) == 200
    whole = at_one(adapters({"x": case}), backend=backend)
    assert len(whole.report["x"].magnitudes) == 200
    for side in (whole.report["x"].a, whole.report["x"].b):
        assert 0 < side.cross_left < 0.5


# linear and svd


def size_of(case: Case) -> float:
    """What errors of a sum of updates are measured by: its terms may cancel."""
    return sum(float(a.double().norm() * b.norm()) for a, b in zip(case.a, case.exact_b()))


@every_backend
def test_linear_is_the_weighted_sum(backend):
    merged = merge_all(CASES, "linear", scale=-0.3, backend=backend)
    for name, case in CASES.items():
        expected = -0.3 * weighted_sum(case.deltas(), case.weights)
        assert_close(dense(merged, name), expected, 1e-6, size_of(case), name)
        assert merged.report[name].rank == case.exact_rank, name


@every_backend
@pytest.mark.parametrize("rank", [None, 2])
def test_svd_is_the_best_approximation_of_the_weighted_sum(rank, backend):
    """Of the rank of the largest adapter, unless told otherwise; its energy is reported."""
    together = merge_all(CASES, "svd", rank=rank, backend=backend)
    for name, case in CASES.items():
        merged = together if rank else merge_all({name: case}, "svd", backend=backend)
        full = weighted_sum(case.deltas(), case.weights)
        values = torch.linalg.svdvals(full)
        total = float(values.square().sum())
        k = min(rank or max(case.ranks_read), case.exact_rank)
        tail = float(values[k:].norm())
        error = float((dense(merged, name) - full).norm())
        assert error <= tail + 1e-6 * size_of(case), name
        report = merged.report[name]
        assert report.rank == k, name
        share = 1 - tail**2 / total if total else 1.0
        assert report.energy_kept == pytest.approx(share, abs=1e-6), name
        assert report.energy == pytest.approx(total, rel=1e-4), name


@every_method(CUT)
def test_any_method_can_be_cut_to_an_energy(method, backend):
    energy = 0.9
    cases = {name: CASES[name] for name in ("odd d", "shared A")}
    options = {"backend": backend, **few_steps(method)}
    exact = at_one(adapters(cases), method, rank=10**6, **options)
    cut = at_one(adapters(cases), method, energy=energy, **options)
    kept = total = 0.0
    for name in cases:
        full = dense(exact, name)
        squares = torch.linalg.svdvals(full).square()
        k = 1 + int((squares.cumsum(0) < energy * squares.sum()).sum())
        report = cut.report[name]
        assert report.rank == k == len(cut.factors(name)[0])
        tail = squares[k:].sum().sqrt()
        error = float((dense(cut, name) - full).norm())
        assert error == pytest.approx(float(tail), rel=1e-3, abs=1e-6 * float(full.norm()))
        assert report.energy_kept == pytest.approx(float(squares[:k].sum() / squares.sum()))
        kept, total = kept + float(squares[:k].sum()), total + float(squares.sum())
    assert cut.report.energy_kept == pytest.approx(kept / total)
    assert energy <= cut.report.energy_kept < 1


@pytest.mark.parametrize("method", CUT)
def test_with_rank_and_energy_the_smaller_wins(method):
    cases = {"x": CASES["odd d"]}
    by_energy = at_one(adapters(cases), method, energy=0.9).report["x"].rank
    for rank in (by_energy - 1, by_energy + 1):
        report = at_one(adapters(cases), method, energy=0.9, rank=rank).report["x"]
        assert report.rank == min(rank, by_energy)


# One adapter

KINDS = {
    "linear": ((5, 9), (7, 5)),
    "embedding": ((5, 30), (7, 5)),
    "conv1d": ((5, 3, 4), (7, 5, 1)),
    "conv2d": ((5, 3, 2, 4), (7, 5, 1, 1)),
}


@every_method([m for m in TABLE if m not in (*LEVELLING, *ENTRIES, "knots", "dc_merge")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_adapter_comes_back_as_it_is(dtype, method, backend):
    generator = torch.Generator().manual_seed(0)
    factors = {
        kind: tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)
        for kind, shapes in KINDS.items()
    }
    adapter = from_tensors(factors, 0.3, embeddings=["embedding"])
    merged = at_one([adapter], method, backend=backend)
    assert set(merged.names) == set(KINDS)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for kind, (a, b) in factors.items():
        expected = 0.3 * b.double().flatten(1) @ a.double().flatten(1)
        assert_close(dense(merged, kind), expected, tolerance, name=kind)
        assert {x.dtype for x in merged.factors(kind)} == {dtype}
        assert merged.report[kind].rank == 5
        size = float(expected.norm())
        assert merged.report[kind].magnitudes == pytest.approx({"tensors": size}, rel=tolerance)


@every_backend
def test_the_weight_of_one_adapter(backend):
    case = CASES["one adapter"]
    for method, factor in (("do", -1.0), ("linear", -3.0), ("svd", -3.0)):
        merged = at_one(adapters({"x": case}), method, weights=[-3], backend=backend)
        assert distance(dense(merged, "x"), factor * case.deltas()[0]) < 1e-6


# Weights, missing modules, order


@every_method(GENERAL)
def test_an_adapter_of_weight_zero_is_absent(method, backend):
    loaded = adapters({"x": CASES["odd d"], "y": CASES["d below R"]})
    extra = from_tensors({"z": (torch.ones(1, 3), torch.ones(2, 1)), "x": loaded[1].factors("x")})
    options = {"backend": backend, **few_steps(method)}
    with_zero = at_one([loaded[0], extra, *loaded[1:]], method, weights=[1, 0, 2, -1], **options)
    without = at_one(loaded, method, weights=[1, 2, -1], **options)
    assert with_zero.names == without.names == ("x", "y")
    for name in with_zero.names:
        assert all(map(torch.equal, with_zero.factors(name), without.factors(name)))
        assert with_zero.report[name] == without.report[name]
    assert with_zero.report.recipe.weights == (1.0, 0.0, 2.0, -1.0)


@every_method(GENERAL)
def test_a_missing_module_is_merged_from_the_adapters_that_have_it(method, backend):
    case = CASES["odd d"]
    loaded = adapters({"x": case, "y": CASES["d below R"]})
    partial = from_tensors({"y": loaded[1].factors("y")}, CASES["d below R"].scalings[1])
    rank = {"rank": 7} if method in (*CUT, "ctm") else {}  # or it is the largest of all adapters
    options = {"backend": backend, **few_steps(method), **rank}
    all_three = at_one([loaded[0], partial, loaded[2]], method, weights=WEIGHTS, **options)
    owners = at_one([loaded[0], loaded[2]], method, weights=WEIGHTS[::2], **options)
    complete = at_one(loaded, method, weights=WEIGHTS, **options)
    assert distance(dense(all_three, "x"), dense(owners, "x")) < 1e-5
    assert distance(dense(all_three, "y"), dense(complete, "y")) < 1e-5
    assert list(all_three.report["x"].magnitudes) == ["adapter-0", "adapter-2"]
    assert list(all_three.report["y"].magnitudes) == ["adapter-0", "tensors", "adapter-2"]


@every_backend
def test_the_same_adapter_twice(backend):
    """Directions and magnitudes average to themselves, and each is named in the report."""
    (adapter,) = adapters({"x": CASES["one adapter"]})
    delta = CASES["one adapter"].deltas()[0]
    twice = at_one([adapter, adapter], orthogonalize=False, backend=backend)
    assert distance(dense(twice, "x"), delta) < 1e-6
    size = float(delta.norm())
    assert twice.report["x"].magnitudes == pytest.approx({"adapter-0": size, "adapter-0 (2)": size})
    half = at_one([adapter, adapter], "linear", weights=[0.5, 0.5], backend=backend)
    assert distance(dense(half, "x"), delta) < 1e-6
    opposite = at_one([adapter, adapter], "linear", weights=[1, -1], backend=backend)
    assert distance(dense(opposite, "x"), 0 * delta, size) < 1e-6


def test_adapters_of_the_same_name_are_told_apart():
    (adapter,) = adapters({"x": CASES["one adapter"]})
    names = ("adapter-0", "adapter-0", "adapter-0 (2)")
    report = at_one([dataclasses.replace(adapter, name=name) for name in names]).report
    assert len(set(report.adapters)) == 3
    assert tuple(report["x"].magnitudes) == report.adapters


@every_method(GENERAL)
def test_the_order_of_the_adapters_does_not_matter(method, backend):
    names = ("odd d", "d below R", "mixed sizes")
    loaded = adapters({name: CASES[name] for name in names})
    results = [
        at_one(
            [loaded[i] for i in order],
            method,
            weights=[WEIGHTS[i] for i in order],
            backend=backend,
            **few_steps(method),
        )
        for order in ((0, 1, 2), (2, 0, 1))
    ]
    for name in names:
        first, second = (dense(merged, name) for merged in results)
        assert distance(second, first) < 3e-5


# dtypes


@every_method(GENERAL, FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_are_merged_in_float32_and_rounded_once(dtype, method, backend):
    cases = {"x": CASES["odd d"]}
    loaded = adapters(cases, dtype)
    single = at_one(loaded, method, backend=backend, dtype="float32")
    low = at_one(loaded, method, backend=backend)
    assert {x.dtype for x in single.factors("x")} == {torch.float32}
    assert {x.dtype for x in low.factors("x")} == {dtype}
    exact = dense(single, "x")
    a, b = single.factors("x")
    rounding = distance(b.to(dtype).double() @ a.to(dtype).double(), exact)
    assert 0 < distance(dense(low, "x"), exact) <= 2 * rounding


def test_a_result_with_a_side_beyond_its_dtype_is_shared_between_both():
    """Small directions with large magnitudes: A alone is beyond the range of float16."""
    loaded = adapters({"x": CASES["mixed sizes"]}, torch.float16)
    for backend in AVAILABLE:
        wide = at_one(loaded, orthogonalize=False, backend=backend, dtype="float32")
        assert max(float(x.abs().max()) for x in wide.factors("x")) > torch.finfo(torch.half).max
        narrow = at_one(loaded, orthogonalize=False, backend=backend)
        assert {x.dtype for x in narrow.factors("x")} == {torch.float16}
        assert distance(dense(narrow, "x"), dense(wide, "x")) < 2e-3


def test_factors_of_different_dtypes_are_merged_to_float32():
    case = CASES["odd d"]
    mixed = [adapters({"x": case}, dtype)[i] for i, dtype in enumerate(DTYPES)]
    for backend in AVAILABLE:
        merged = at_one(mixed, "linear", backend=backend)
        rounded = [
            s * b.to(t).double() @ a.to(t).double()
            for a, b, s, t in zip(case.a, case.b, case.scalings, DTYPES, strict=True)
        ]
        assert {x.dtype for x in merged.factors("x")} == {torch.float32}
        assert distance(dense(merged, "x"), sum(rounded)) < 1e-6


# The report


@every_backend
@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("sides", ["both", "A"])
def test_the_report_of_do_tells_what_the_descent_did(sides, decouple, backend):
    cases = {name: CASES[name] for name in ("odd d", "R above 128", "duplicated")}
    rule = {"steps": 3, "tol": 0.0}
    merged = at_one(adapters(cases), sides=sides, decouple=decouple, backend=backend, **rule)
    for name, case in cases.items():
        report = merged.report[name]
        a, stats = paper.descend([x.double() for x in case.a], **rule)
        assert list(vars(report.a).values())[:-1] == pytest.approx(stats, rel=1e-3, abs=1e-6)
        assert report.a.scaled is None
        b = case.exact_b()
        if sides == "both":
            bt, stats = paper.descend([x.T for x in b], **rule)
            b = [x.T for x in bt]
            assert list(vars(report.b).values())[:-1] == pytest.approx(stats, rel=1e-3, abs=1e-6)
        else:
            assert report.b is None
        moved = [y @ x for x, y in zip(a, b, strict=True)]
        sizes = [float(x.norm()) for x in (moved if decouple else case.deltas())]
        assert list(report.magnitudes.values()) == pytest.approx(sizes, rel=1e-4)
        assert report.rank == case.exact_rank
        assert report.energy_kept == 1.0


@every_backend
def test_the_report_of_linear(backend):
    case = CASES["zero factors"]
    merged = at_one(adapters({"x": case}), "linear", weights=[3, 1, 1, -1], backend=backend)
    report = merged.report["x"]
    sizes = {f"adapter-{i}": float(delta.norm()) for i, delta in enumerate(case.deltas())}
    assert report.magnitudes == pytest.approx(sizes, rel=1e-5)
    assert report.a is None
    assert report.b is None
    assert (report.rank, report.energy_kept) == (case.exact_rank, 1.0)


def test_the_report_tells_the_recipe():
    merged = at_one(
        adapters({"x": CASES["odd d"]}),
        weights=WEIGHTS,
        scale=0.7,
        rank=3,
        gamma=2,
        backend="torch",
        dtype="float16",
    )
    report = merged.report
    assert report.adapters == ("adapter-0", "adapter-1", "adapter-2")
    assert report.recipe.plain() == {
        "method": "do",
        "adapters": ["adapter-0", "adapter-1", "adapter-2"],
        "weights": [1.0, -0.5, 2.0],
        "scale": 0.7,
        "power": 1.0,
        "orthogonalize": True,
        "decouple": True,
        "penalty": "squared",
        "gamma": 2.0,
        "sides": "both",
        "descent": "auto",
        "steps": 50,
        "tol": 1e-3,
        "renormalize": False,
        "directions": "linear",
        "rank": 3,
        "ragged": False,
        "form": "adapter",
        "whole": "auto",
        "format": "peft",
        "report": "full",
        "backend": "torch",
        "device": "cpu",
        "dtype": "float16",
    }
    assert json.loads(json.dumps(report.to_dict()))["modules"]["x"]["rank"] == 3
    summary = dict(report.summary())
    assert summary["rank"] == "3"
    assert summary["energy kept"] == f"{100 * report.energy_kept:.2f} %"


@pytest.mark.parametrize("method", ["do", "ties"])
def test_progress_counts_one_module_after_the_other(method):
    cases = {f"{k}": CASES["odd d"] for k in range(5)}
    for call in (functools.partial(at_one, method=method), dm.inspect):
        seen = []
        call(adapters(cases), progress=lambda done, total: seen.append((done, total)))  # noqa: B023
        assert seen == [(k, 5) for k in range(1, 6)]


@pytest.mark.parametrize(("method", "most"), [("do", "CUBES"), ("ties", "ENTRIES")])
def test_a_merge_is_stopped_between_modules_that_take_long(method, most, monkeypatch):
    """Though one group holds them all; in how many portions they come changes no bit."""
    cases = {f"{k}": CASES["odd d"] for k in range(3)}
    whole = at_one(adapters(cases), method)
    monkeypatch.setattr(reader, f"PORTION_{most}", 1)
    calls: list[int] = []
    before = engine.merged
    monkeypatch.setattr(engine, "merged", lambda *args: calls.append(1) or before(*args))
    one_by_one = at_one(adapters(cases), method)
    assert len(calls) == 3
    for name in whole.names:
        for x, y in zip(whole.factors(name), one_by_one.factors(name)):
            assert torch.equal(x, y)

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    calls.clear()
    with pytest.raises(InterruptedError):
        at_one(adapters(cases), method, progress=stop)
    assert len(calls) == 1


def test_delta_is_the_product_of_the_factors_and_unknown_modules_are_suggested():
    merged = at_one(adapters({"q_proj": CASES["odd d"], "v_proj": CASES["shared A"]}))
    a, b = merged.factors("q_proj")
    assert_close(merged.delta("q_proj"), b @ a)
    with pytest.raises(dm.OptionError, match="'q_prj'; did you mean 'q_proj'"):
        merged.delta("q_prj")


@every_backend
def test_truncation_keeps_an_adapter_whose_size_sits_in_one_factor(backend):
    torch.manual_seed(0)
    factors = [(torch.randn(2, 20) * size, torch.randn(24, 2) / size) for size in (1e-3, 1e4)]
    loaded = [from_tensors({"x": pair}) for pair in factors]
    merged = at_one(loaded, "linear", energy=1.0, backend=backend)
    expected = sum(b.double() @ a.double() for a, b in factors)
    assert distance(dense(merged, "x"), expected) < 1e-5
    assert merged.report["x"].rank == 4


def test_the_summary_describes_shared_modules_only():
    case = CASES["odd d"]
    loaded = adapters({"x": case, "y": case})
    alone = from_tensors({"y": loaded[1].factors("y")})
    merged = at_one([loaded[0], alone], backend="torch")
    steps = merged.report["y"].a.steps
    assert merged.report["x"].a.steps == 0 < steps
    assert f"{steps} steps (median)" in dict(merged.report.summary())["orthogonalized A sides"]


def test_what_is_no_adapter_is_refused():
    with pytest.raises(dm.OptionError, match=r"a Linear is not an adapter; .*from_model"):
        at_one([torch.nn.Linear(2, 2)])
