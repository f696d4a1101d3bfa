"""Factors, weights and λ of any size: the same merge times that size, or one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.close import distance
from support.merges import at_one
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter
from domerge_fast.algebra.powers import LIMIT, fitted
from domerge_fast.backends import registry
from domerge_fast.engine import interference
from domerge_fast.errors import AdapterError, DomergeError, OptionError
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE
from domerge_fast.sessions.sequential import Sequential

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
SHAPES = {"x": (20, 24), "y": (21, 25)}
ALIKE = {"lego": {"balance": True}}
"""Options without which a method compares A with B, as `lego` does by definition."""
SIZES = (1e-30, 1e-24, 1e-12, 1e12, 1e24, 1e30)
ROUNDING = {"float32": 1e-4, "bfloat16": 1e-2, "float16": LIMIT}

METHODS = [m for m in TABLE if m != "auto"]  # which takes one of the others, by their sizes
every_method = pytest.mark.parametrize("method", METHODS)


def drawn() -> list[dict[str, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: (
                torch.randn(3, n, generator=generator, dtype=torch.float64),
                torch.randn(m, 3, generator=generator, dtype=torch.float64),
            )
            for name, (m, n) in SHAPES.items()
        }
        for _ in range(3)
    ]


FACTORS = drawn()


def adapters(
    method: str,
    size_a: float = 1.0,
    size_b: float = 1.0,
    only: int | None = None,
    scaling: float = 0.5,
) -> list[Adapter]:
    """Three adapters (two for slerp), all of them or only one with factors of these sizes."""
    found = []
    for i, factors in enumerate(FACTORS[: 2 if method == "slerp" else 3]):
        a, b = (size_a, size_b) if only in (None, i) else (1.0, 1.0)
        sized = {name: ((a * x).float(), (b * y).float()) for name, (x, y) in factors.items()}
        found.append(from_tensors(sized, scaling, name=f"adapter-{i}"))
    return found


def updates(merged: dm.Merged) -> dict[str, Tensor]:
    pairs = {name: merged.factors(name) for name in merged.names}
    return {name: b.double() @ a.double() for name, (a, b) in pairs.items()}


def check(merged: dm.Merged, expected: dm.Merged, size: float, tolerance: float) -> None:
    wanted = updates(expected)
    for name, update in updates(merged).items():
        assert distance(update / size, wanted[name]) < tolerance, name


def tried(loaded: list[Adapter], method: str, **options: Any) -> dm.Merged | str:
    """The merge, or the line that refuses it."""
    try:
        return at_one(loaded, method, **options)
    except DomergeError as error:
        return str(error)


def check_reports(
    merged: dm.Merged, expected: dm.Merged, size: float, tolerance: float = 1e-4
) -> None:
    for name, module in merged.report.modules.items():
        wanted = expected.report[name].magnitudes
        found = {key: norm / size for key, norm in module.magnitudes.items()}
        assert found == pytest.approx(wanted, rel=tolerance)
    one, other = merged.report.interference, expected.report.interference
    assert one is not None
    assert other is not None
    assert [norm / size for norm in one.norms] == pytest.approx(other.norms, rel=1e-4)
    for table in ("rows", "columns", "cosine"):
        for row, wanted_row in zip(getattr(one, table), getattr(other, table), strict=True):
            assert row == pytest.approx(wanted_row, abs=1e-4)


def places(size: float) -> dict[str, tuple[float, float]]:
    return {"A": (size, 1.0), "B": (1.0, size), "split": (math.sqrt(size),) * 2}


@every_method
@pytest.mark.parametrize("dtype", ROUNDING)
def test_factors_of_any_size_give_the_same_merge_times_their_size(dtype, method):
    options = ALIKE.get(method, {})
    expected = at_one(adapters(method), method, dtype="float32", **options)
    refused = []
    for size in SIZES:
        for where, (size_a, size_b) in places(size).items():
            merged = tried(adapters(method, size_a, size_b), method, dtype=dtype, **options)
            if isinstance(merged, str):
                assert f"for {dtype}" in merged or f"in {dtype}" in merged
                refused.append((size, where))
                continue
            check(merged, expected, size_a * size_b, ROUNDING[dtype])
            check_reports(merged, expected, size_a * size_b, ROUNDING[dtype])
    # The squares of what a side may be in float16 are between 2^-28 and 2^32.
    beyond = [(s, w) for s in SIZES for w in places(s) if not 1e-11 < s < 1e11]
    assert set(refused) <= set(beyond if dtype == "float16" else [])
    assert dtype != "float16" or {(1e-24, "split"), (1e24, "A")} <= set(refused)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "cpu"])
@pytest.mark.parametrize("method", [m for m in METHODS if not TABLE[m].dense])
def test_every_backend_takes_factors_of_any_size(method, backend):
    options = ALIKE.get(method, {}) | {"backend": backend, "dtype": "float32"}
    expected = at_one(adapters(method), method, **options)
    for size_a, size_b in ((1e-24, 1.0), (1.0, 1e30), (1e-15, 1e-15), (1e-12, 1e-12)):
        merged = at_one(adapters(method, size_a, size_b), method, **options)
        check(merged, expected, size_a * size_b, 1e-4)
        check_reports(merged, expected, size_a * size_b)


@pytest.mark.parametrize("pre", ["orthogonalize", "pico", "canonicalize", "equalize", "smooth"])
@pytest.mark.parametrize("post", ["subspace_boost", "norm_match"])
def test_steps_take_factors_of_any_size(pre, post):
    options = {"method": "tsvm", "pre": [pre], "post": [post]}
    expected = at_one(adapters("tsvm"), **options)
    for size in (1e-30, 1e24):
        for size_a, size_b in places(size).values():
            merged = at_one(adapters("tsvm", size_a, size_b), **options)
            check(merged, expected, size, 1e-4)


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_truncation_and_dense_updates_of_any_size(size):
    for options in ({"rank": 2}, {"energy": 0.8}, {"form": "deltas"}):
        expected = at_one(adapters("do"), **options)
        merged = at_one(adapters("do", size), **options)
        for name in SHAPES:
            assert distance(merged.delta(name).double() / size, expected.delta(name)) < 1e-4
            kept = expected.report[name].energy_kept
            assert merged.report[name].energy_kept == pytest.approx(kept, rel=1e-4)
            wanted = expected.report[name].energy
            assert merged.report[name].energy / size**2 == pytest.approx(wanted, rel=1e-4)


def test_inspect_tells_the_norms_of_factors_of_any_size():
    expected = dm.inspect(adapters("do"))
    for size in SIZES:
        for size_a, size_b in places(size).values():
            found = dm.inspect(adapters("do", size_a, size_b))
            assert [norm / size for norm in found.norms] == pytest.approx(expected.norms, rel=1e-5)
            assert found.cosine[0] == pytest.approx(expected.cosine[0], abs=1e-5)
    small = dm.inspect(adapters("do", 1e-26, only=1))
    assert small.norms[1] == pytest.approx(1e-26 * expected.norms[1], rel=1e-5)
    assert small.cosine[0][1] == pytest.approx(expected.cosine[0][1], abs=1e-5)


def test_the_objective_is_reported_in_the_factors_own_size():
    expected, found = at_one(adapters("do")), at_one(adapters("do", 1e-24, 1e20))
    for name in SHAPES:
        one, other = found.report[name], expected.report[name]
        for size, side, wanted in ((1e-24, one.a, other.a), (1e20, one.b, other.b)):
            assert side.objective_after / size**2 == pytest.approx(wanted.objective_after, 1e-4)
            assert side.change == pytest.approx(wanted.change, 1e-4)


def test_more_adapters_than_are_compared(monkeypatch):
    monkeypatch.setattr(interference, "MOST_COMPARED", 2)
    for method in ("do", "linear", "ties"):
        expected = at_one(adapters(method), method)
        merged = at_one(adapters(method, 1e-12, 1e-24), method)
        check(merged, expected, 1e-36, 1e-4)
        for name in SHAPES:
            wanted = expected.report[name].magnitudes
            found = {k: norm / 1e-36 for k, norm in merged.report[name].magnitudes.items()}
            assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_product_that_float32_does_not_hold_is_not_given(size):
    merged = at_one(adapters("do", size, size))
    assert all(x.isfinite().all() for x in merged.factors("x"))
    with pytest.raises(DomergeError, match=r"^module 'x': the merged update .* float32"):
        merged.delta("x")
    with pytest.raises(DomergeError, match=r"^module 'x': the merged update .* float32"):
        at_one(adapters("do", size, size), form="deltas")


@pytest.mark.parametrize("method", ["do", "multislerp", "linear"])
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_svc_counts_weights_of_any_size(method, size):
    """The first two take their ratios alone; what svc brings the merge to is a sum."""
    expected = at_one(adapters(method), method, post=["svc"])
    merged = at_one(adapters(method), method, post=["svc"], weights=[size] * 3)
    check(merged, expected, size, 1e-4)


# Modules and adapters of different sizes


def test_opcm_weighs_modules_of_different_sizes_as_they_are():
    """Its one gain is the whole model's: a module of 1e-24 has no part in it."""
    first, second = adapters("opcm")[:2]
    tiny = [
        from_tensors({"x": x.factors("x"), "y": tuple(1e-12 * f for f in x.factors("y"))}, 0.5)
        for x in (first, second)
    ]
    alone = [from_tensors({"x": x.factors("x")}, 0.5) for x in (first, second)]
    merged, expected = at_one(tiny, "opcm"), at_one(alone, "opcm")
    assert distance(updates(merged)["x"], updates(expected)["x"]) < 1e-6


def test_the_largest_entries_of_a_model_are_not_sought_across_such_sizes():
    loaded = [
        from_tensors({"x": a.factors("x"), "y": (1e-24 * a.factors("y")[0], a.factors("y")[1])})
        for a in adapters("ties")
    ]
    with pytest.raises(OptionError, match=r"module 'y' is .* beyond float32; seek .* each tensor"):
        at_one(loaded, "ties", scope="model")
    at_one(loaded, "ties", scope="tensor")
    alike = at_one(adapters("ties", 1e-24), "ties", scope="model")
    check(alike, at_one(adapters("ties"), "ties", scope="model"), 1e-24, 1e-4)


SPLIT_ALONE = ("lego", "pico", "robust", "core")
"""What an update is split into decides what these make of it."""


@pytest.mark.parametrize("method", [m for m in METHODS if m not in SPLIT_ALONE])
@pytest.mark.parametrize("power", [-90, -60, -30])
def test_one_adapter_may_be_far_smaller_than_the_others(power, method):
    options = {"orthogonalize": False} if method == "do" else {}
    size = 2.0**power
    equal = at_one(adapters(method), method, **options)
    check(at_one(adapters(method, size, 1 / size, only=1), method, **options), equal, 1.0, 1e-4)
    halves = 2.0 ** (power // 2)
    apart = [
        at_one(adapters(method, *sizes, only=1), method, **options)
        for sizes in ((halves, halves), (size, 1.0), (1.0, size))
    ]
    check(apart[1], apart[0], 1.0, 1e-4)
    check(apart[2], apart[0], 1.0, 1e-4)
    for merged in apart:
        norm = merged.report["x"].magnitudes["adapter-1"]
        assert norm == pytest.approx(size * equal.report["x"].magnitudes["adapter-1"], rel=1e-4)


@pytest.mark.parametrize("size", [1e-20, 1e-30])
def test_do_keeps_the_direction_of_an_adapter_far_smaller_than_the_others(size):
    """Beside the others its length is nothing, but its direction weighs as much as theirs."""
    pair = at_one([adapters("do")[0], *adapters("do", size, only=1)[1:]])
    b = {f"adapter-{i}": FACTORS[i]["x"] for i in range(3)}
    directions = [y @ x / (y @ x).norm(dim=0) for x, y in b.values()]
    merged = updates(pair)["x"]
    share = torch.linalg.lstsq(
        torch.stack([d.flatten() for d in directions], 1),
        (merged / merged.norm(dim=0)).flatten()[:, None],
    ).solution.flatten()
    assert share[1] > 0.5 * share[0]


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize("method", ["linear", "svd", "slerp", "multislerp", "tsvm", "wudi"])
def test_rows_that_meet_zeros_have_no_part_whatever_their_size(method, size):
    """An adapter that was never trained has a B of zeros."""
    first, second = adapters("slerp")
    rank = {"rank": 3} if method == "svd" else {}
    dead = []
    for adapter, scale in ((first, size), (second, 1.0)):
        factors = {}
        for name in SHAPES:
            a, b = adapter.factors(name)
            a = torch.cat([a, scale * 1e12 * a[:1]])
            factors[name] = a, torch.cat([b, torch.zeros_like(b[:, :1])], 1)
        dead.append(from_tensors(factors, 0.5))
    options = {"dtype": "float32", **rank}
    expected = at_one([first, second], method, **options)
    check(at_one(dead, method, **options), expected, 1.0, 1e-4)
    merged = at_one(dead, method, pre=["canonicalize"], **options)
    check(merged, at_one([first, second], method, pre=["canonicalize"], **options), 1.0, 1e-4)


def test_a_scaling_beyond_float32_of_zeros_or_of_small_factors():
    (first, second), size = adapters("slerp"), 2.0**-140
    a, b = first.factors("x")
    zero = from_tensors({"x": (a, torch.zeros_like(b))}, 1e39, name="zero")
    expected = updates(at_one([from_tensors({"x": second.factors("x")}, 0.5)], "linear"))["x"]
    merged = at_one([zero, from_tensors({"x": second.factors("x")}, 0.5)], "linear")
    assert distance(updates(merged)["x"], expected) < 1e-6
    large = from_tensors({"x": (a, 2.0**120 * b)}, size)
    kept = at_one([large], "linear")
    exact = 2.0**-20 * (b.double() @ a.double())
    assert distance(updates(kept)["x"], exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_beside_factors_of_another_size(dtype):
    """Taken out of both, a power of two must not push float16 out of its range."""
    loaded = adapters("linear", 1e11, 1e-11, only=1)
    a, b = (x.to(dtype) for x in loaded[0].factors("x"))
    loaded[0] = from_tensors({"x": (a, b)}, name="half")
    found = updates(at_one(loaded, "svd", rank=9))["x"]
    parts = [(0.5, loaded[1].factors("x")), (0.5, loaded[2].factors("x")), (1.0, (a, b))]
    expected = sum(s * y.double() @ x.double() for s, (x, y) in parts)
    assert distance(found, expected) < 1e-4


def test_zeros_beside_what_is_far_apart_stay_zeros():
    loaded = [*adapters("do", 1e-26, only=1)]
    a, b = loaded[2].factors("x")
    loaded[2] = from_tensors({"x": (a, torch.zeros_like(b))}, name="zero")
    merged = at_one(loaded)
    assert all(x.isfinite().all() for x in merged.factors("x"))
    assert merged.report["x"].magnitudes["zero"] == 0


@every_method
def test_adapters_beyond_what_float32_holds_together_are_refused(method):
    for sizes in ((1e-35, 1.0), (1.0, 1e-35), (1e-20, 1e-20)):
        with pytest.raises(AdapterError) as caught:
            at_one(adapters(method, *sizes, only=1), method)
        assert str(caught.value).startswith("adapter 'adapter-1', module 'x': its ")
        assert "smaller than the module's largest" in str(caught.value)


# Weights, scalings and λ


@pytest.mark.parametrize("weight", [1e308, 1e-320, -1e308])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("do", {}),
        ("do", {"decouple": False}),
        ("do", {"directions": "ties"}),
        ("slerp", {}),
        ("multislerp", {}),
        ("core", {"inner": "multislerp"}),
        ("ties", {"conventions": "mergekit"}),
        ("della", {"conventions": "mergekit"}),
    ],
)
def test_ratios_of_weights_count_whatever_their_size(method, options, weight):
    loaded = adapters(method)
    ratios = [1.0, 0.5, 0.25][: len(loaded)]
    sign = math.copysign(1.0, weight)
    expected = at_one(loaded, method, weights=[sign * r for r in ratios], **options)
    merged = at_one(loaded, method, weights=[weight * r for r in ratios], **options)
    check(merged, expected, 1.0, 1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("do", "slerp", "multislerp")])
def test_weights_that_count_as_they_are(method):
    """`lego` clusters B times its weights: only A's that small keep the clusters."""
    if method == "lego":
        return
    expected = at_one(adapters(method), method)
    for weight in (1e-36, 1e36):
        merged = at_one(adapters(method), method, weights=[weight] * 3)
        check(merged, expected, weight, 1e-4)
    for weight in (1e308, 1e-320):
        with pytest.raises(OptionError, match=r"'weights': .* is beyond what float32 factors hold"):
            at_one(adapters(method), method, weights=[weight, 0.0, weight])


def test_weights_that_cancel_do_so_whatever_their_size():
    for weight in (1.0, 1e308, 1e-320):
        with pytest.raises(OptionError, match="add up to zero"):
            at_one(adapters("slerp"), "slerp", weights=[weight, -weight])


@every_method
def test_lambda_of_any_size(method):
    expected = at_one(adapters(method), method)
    for scale in (1e-60, 1e-30, -1e-12, 1e12, 1e60):
        check(at_one(adapters(method), method, scale=scale), expected, scale, 1e-4)
    for scale in (1e-200, 1e200):
        with pytest.raises(DomergeError, match=r"^module 'x': the merged update .* float32"):
            at_one(adapters(method), method, scale=scale)


@pytest.mark.parametrize("method", ["do", "linear", "tsvm", "ties", "robust"])
def test_scalings_of_any_size(method):
    expected = at_one(adapters(method), method)
    for size in (1e-50, 1e-30, 1e30, 1e50):
        check(at_one(adapters(method, scaling=0.5 * size), method), expected, size, 1e-4)
        kept = at_one(adapters(method, size_b=1 / math.sqrt(size), scaling=0.5 * size), method)
        check(kept, expected, math.sqrt(size), 1e-4)


# Narrow outputs


@pytest.mark.parametrize("method", ["do", "linear", "svd", "ties", "lego", "robust"])
def test_float16_shares_a_small_scale_between_both_sides(method):
    loaded = adapters(method, 1.0, 1e-2)
    exact = at_one(loaded, method, scale=1e-5, dtype="float32")
    merged = at_one(loaded, method, scale=1e-5, dtype="float16")
    assert {x.dtype for name in SHAPES for x in merged.factors(name)} == {torch.float16}
    check(merged, exact, 1.0, 2e-3)


def test_float16_shares_row_by_row():
    """One adapter's B is below float16's range beside another's, but its A makes up for it."""
    a, b = FACTORS[0]["x"], FACTORS[1]["x"]
    factors = torch.cat([1e5 * a[0], b[0]]).float(), torch.cat([1e-9 * a[1], 1e-4 * b[1]], 1)
    given = from_tensors({"x": (factors[0], factors[1].float())})
    exact = at_one([given], "linear", dtype="float32")
    check(at_one([given], "linear", dtype="float16"), exact, 1.0, 2e-3)


def test_in_range_nothing_is_shared():
    """What float16 holds as it is, is the rounded result, to the bit."""
    loaded = adapters("linear", 1.0, 1e-2)
    wide = at_one(loaded, "linear", dtype="float32", scale=0.1)
    for dtype in ("float16", "bfloat16"):
        narrow = at_one(loaded, "linear", dtype=dtype, scale=0.1)
        for name in SHAPES:
            pairs = zip(narrow.factors(name), wide.factors(name), strict=True)
            assert all(torch.equal(x, y.to(x.dtype)) for x, y in pairs)


def test_powers_of_two_change_no_digit():
    expected = at_one(adapters("linear"), "linear")
    merged = at_one(adapters("linear", 2.0**-90, 2.0**70), "linear")
    for name in SHAPES:
        a, b = merged.factors(name)
        wanted = expected.factors(name)
        assert torch.equal(a, 2.0**-90 * wanted[0])
        assert torch.equal(b, 2.0**70 * wanted[1])


def sided(rows: Sequence[float], columns: Sequence[float]) -> tuple[Tensor, Tensor]:
    a, b = FACTORS[0]["x"]
    return (torch.tensor(rows)[:, None] * a).float(), (b * torch.tensor(columns)).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fitted(dtype):
    tolerance = 2 * torch.finfo(dtype).eps
    for rows, columns, powers in (
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0, 0)),
        ((1e6, 1.0, 1e-6), (1e-6, 1.0, 1e6), (0, 0)),
        ((1e-9, 1.0, 1.0), (1e9, 1.0, 1.0), (3, -5)),
        ((1e20, 0.0, 1.0), (0.0, 1e20, 1.0), (40, -50)),
    ):
        a, b = sided(rows, columns)
        found = fitted("x", a, b, powers, dtype)
        assert {x.dtype for x in found} == {dtype}
        assert all(x.isfinite().all() for x in found)
        exact = 2.0 ** sum(powers) * (b.double() @ a.double())
        assert distance(found[1].double() @ found[0].double(), exact) < tolerance
    zero = fitted("x", *sided((1e30,) * 3, (0.0,) * 3), (90, 0), dtype)
    assert not (zero[1].double() @ zero[0].double()).any()
    for power, word in ((-700, "small"), (700, "not fit")):
        with pytest.raises(DomergeError, match=word):
            fitted("x", *sided((1.0,) * 3, (1.0,) * 3), (power, 0), dtype)


# A merge that grows


def test_a_sequential_merge_shares_too(tmp_path):
    growing = Sequential.start(tmp_path / "state")
    for adapter in adapters("opcm", 1.0, 1e-2)[:2]:
        growing.add(adapter)
    exact = growing.merged(scale=1e-5, dtype="float32")
    check(growing.merged(scale=1e-5, dtype="float16"), exact, 1.0, 2e-3)
    with pytest.raises(DomergeError, match="too small for float16"):
        growing.merged(scale=1e-12, dtype="float16")


def test_a_sequential_merge_takes_factors_of_any_size(tmp_path):
    found = {}
    for size in (1.0, 1e-24):
        growing = Sequential.start(tmp_path / str(size))
        norms = [growing.add(adapter).norm for adapter in adapters("opcm", size)[:2]]
        found[size] = growing.merged(), norms
    (merged, norms), (expected, wanted) = found[1e-24], found[1.0]
    check(merged, expected, 1e-24, 1e-4)
    assert [norm / 1e-24 for norm in norms] == pytest.approx(wanted, rel=1e-4)
