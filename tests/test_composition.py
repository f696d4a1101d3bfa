"""Methods inside methods, steps around them, and the forms of what comes out, in float64."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close, distance
from support.make import write_adapter
from support.merges import adapters, at_one, dense, merge_all
from support.shapes import CASES, CONVERGED, Case, random_case
from test_factor_space import orth, raised, spectrum
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters.plan import Plan, Stack
from domerge_fast.algebra.entry_rules import Draw
from domerge_fast.backends import paper, registry
from domerge_fast.backends.torch_entries import uniform
from domerge_fast.cli import main as cli
from domerge_fast.engine import reader
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE
from domerge_fast.methods.base import Chosen, Settings, grams
from domerge_fast.methods.made import Factors
from domerge_fast.methods.running import prepared
from domerge_fast.methods.spectral.space import SUPPORT
from domerge_fast.methods.steps import POST, PRE

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
ELEMENTWISE = [name for name in AVAILABLE if hasattr(registry.load(name), "entry_merge")]
GROUP = ("odd d", "d below R", "duplicated")  # of three adapters each
WEIGHTS = [1.0, -0.5, 2.0]
TORCH = {"backend": "torch"}
FEW = {"steps": 3, "tol": 0.0}
"""So few that rounding has no say in where the descent stops."""


def descent(*cases: Case) -> tuple[dict[str, Any], float]:
    """Options that the literal method gives the same result with, and how nearly."""
    return (CONVERGED, 2e-3) if any(case.is_wide for case in cases) else (FEW, 1e-5)


Merge = Callable[..., Tensor]

every_case = pytest.mark.parametrize("name", CASES)


def total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)


# Inner methods, dense: of values v_i with weights


def linear(values: Sequence[Tensor], weights: Sequence[float], **given: Any) -> Tensor:
    return total([w * v for w, v in zip(weights, values, strict=True)])


def ties(
    values: Sequence[Tensor],
    weights: Sequence[float],
    least: Sequence[float] | None = None,
    density: float = 0.2,
    **given: Any,
) -> Tensor:
    """PEFT's. least: the smallest size that is kept, where it is not each tensor's own."""
    least = [smallest_kept([v], density) for v in values] if least is None else least
    kept = [torch.where(v.abs() >= low, v, 0.0) for v, low in zip(values, least, strict=True)]
    sign = torch.where(total(kept) >= 0, 1.0, -1.0)
    agreeing = [v.sign() == sign for v in kept]
    merged = total([w * v * yes for w, v, yes in zip(weights, kept, agreeing, strict=True)])
    return merged / total([yes.double() for yes in agreeing]).clamp_min(1)


def smallest_kept(values: Sequence[Tensor], density: float) -> float:
    sizes = torch.cat([v.abs().flatten() for v in values])
    count = int(density * len(sizes))
    return float(sizes.sort().values[-count]) if count else math.inf


def dare(
    values: Sequence[Tensor],
    weights: Sequence[float],
    module: str = "x",
    density: float = 0.5,
    owners: Sequence[int] | None = None,
    **given: Any,
) -> Tensor:
    """owners: the adapters' places in the list."""
    draw = Draw(0, zlib.crc32(module.encode()), tuple(owners or range(len(values))))
    merged = torch.zeros_like(values[0])
    for i, (w, v) in enumerate(zip(weights, values, strict=True)):
        numbers = uniform(draw, i, slice(0, len(v)), v.shape[1], v.device)
        merged += w * v / density * (numbers < density)
    return merged


def tsvm(values: Sequence[Tensor], weights: Sequence[float], **given: Any) -> Tensor:
    weighted = [w * v for w, v in zip(weights, values, strict=True)]
    u, s, vh = zip(*(spectrum(v, v.norm()) for v in weighted), strict=True)
    return orth(torch.cat(u, 1)) @ torch.cat(s).diag() @ orth(torch.cat(vh).T).T


def opcm(values: Sequence[Tensor], weights: Sequence[float], alpha: float = 0.5, **given) -> Tensor:
    weighted = [w * v for w, v in zip(weights, values, strict=True)]
    merged = weighted[0]
    for update in weighted[1:]:
        u, s, vh = spectrum(merged, merged.norm())
        inside = u.T @ update @ vh.T
        leading = s.cumsum(0) <= alpha * s.sum()
        closed = (leading[:, None] & leading) | torch.eye(len(s), dtype=torch.bool)
        merged = merged + update - u @ (inside * closed) @ vh
    norms = [float(v.norm()) for v in weighted]
    return merged * sum(norms) / len(norms) / merged.norm()


INNER: dict[str, Merge] = {"linear": linear, "ties": ties, "dare": dare, "tsvm": tsvm, "opcm": opcm}


# Bases, dense


def left_vectors(x: Tensor) -> Tensor:
    """U [m, K] of x, without singular values that are noise beside the largest."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, : max(1, int((s > SUPPORT * s[0]).sum()))]


def bases(case: Case, method: str) -> tuple[Tensor, Tensor]:
    """U [m, K_B] and V [n, K_A]."""
    if method == "knots":
        return left_vectors(torch.cat(case.deltas(), 1)), torch.eye(
            case.a[0].shape[1], dtype=torch.float64
        )
    a = torch.cat([a.double() for a in case.a])
    return left_vectors(torch.cat(case.exact_b(), 1)), left_vectors(a.T)


def inside(case: Case, method: str) -> list[Tensor]:
    """Every update in the basis."""
    u, v = bases(case, method)
    return [u.T @ delta @ v for delta in case.deltas()]


def shared(case: Case, method: str, inner: str, weights: Sequence[float], **given: Any) -> Tensor:
    u, v = bases(case, method)
    return u @ INNER[inner](inside(case, method), weights, **given) @ v.T


# knots and core

ROTATED = ("linear", "tsvm", "opcm", "svd")
"""These do not depend on the basis."""

both = pytest.mark.parametrize("method", ["knots", "core"])


def backends(inner: str) -> list[str]:
    """What is a function of R x R coordinates knows no backend."""
    if inner in ROTATED:
        return ["cpu"]
    return AVAILABLE if inner == "do" else ELEMENTWISE


RUNS = [(inner, backend) for inner in INNER for backend in backends(inner)]


@pytest.mark.parametrize(("inner", "backend"), RUNS)
@both
def test_a_method_in_a_shared_basis_is_its_dense_definition(method, inner, backend):
    """Also for `ties` and `dare`, whatever the signs of the basis: they treat v and -v alike."""
    cases = {name: CASES[name] for name in GROUP} | {"tall": random_case((3, 4, 2), 9, 50)}
    given = {"inner": inner, "weights": WEIGHTS, "scale": -0.3, "backend": backend}
    merged = at_one(
        adapters(cases if inner != "opcm" else {"tall": cases["tall"]}), method, **given
    )
    for name in merged.names:
        expected = -0.3 * shared(cases[name], method, inner, WEIGHTS, module=name)
        assert distance(dense(merged, name), expected) < 1e-5, name


@both
def test_ties_in_a_shared_basis(method):
    merged = merge_all(CASES, method, inner="ties", **TORCH)
    for name, case in CASES.items():
        expected = shared(case, method, "ties", case.weights)
        assert_close(dense(merged, name), expected, 1e-5, name=name)
        assert merged.report[name].rank <= sum(case.ranks), name


def comparable(method: str, inner: str, name: str) -> bool:
    """Directions below a millionth of the strongest are not in the basis; the size of singular
    vectors is nothing to `tsvm`."""
    left_out = ("tiny beside huge", "mixed sizes") if method == "knots" else ("tiny beside huge",)
    return inner != "tsvm" or name not in left_out


@pytest.mark.parametrize("inner", ["linear", "tsvm", "svd"])
@both
def test_what_does_not_depend_on_the_basis_is_the_same_in_any(method, inner):
    cases = {name: case for name, case in CASES.items() if comparable(method, inner, name)}
    ranks = (None, 3) if inner == "svd" else (None,)
    for rank in ranks:
        result = merge_all(cases, method, inner=inner, rank=rank, **TORCH)
        expected = merge_all(cases, inner, rank=rank, **TORCH)
        for name in cases:
            assert_close(dense(result, name), dense(expected, name), 1e-5, name=name)
            kept = expected.report[name].energy_kept
            assert result.report[name].energy_kept == pytest.approx(kept), name


@pytest.mark.parametrize("inner", ["linear", "tsvm"])
@both
def test_nor_does_a_power(method, inner):
    cases = {name: CASES[name] for name in GROUP}
    result = merge_all(cases, method, inner=inner, power=0.5, **TORCH)
    expected = merge_all(cases, inner, power=0.5, **TORCH)
    for name in cases:
        assert_close(dense(result, name), dense(expected, name), 1e-5, name=name)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_do_in_a_shared_basis(backend):
    """`knots` keeps columns, and so their magnitudes; those of `core` are its own."""
    for name in GROUP:
        case = CASES[name]
        loaded = adapters({"x": case})
        # In a basis of what they span, duplicated adapters have more rows than columns.
        rule, allowed = (CONVERGED, 1e-3) if name == "duplicated" else descent(case)
        given = {"weights": WEIGHTS, "backend": backend, **rule}
        expected = dense(at_one(loaded, "do", **given), "x")
        assert (
            distance(dense(at_one(loaded, "knots", inner="do", **given), "x"), expected) < allowed
        )
        u, v = bases(case, "core")
        a = [x.double() @ v for x in case.a]
        small = paper.do_merging(a, [u.T @ b for b in case.exact_b()], case.omegas, **rule)
        merged = at_one(loaded, "core", inner="do", **given)
        assert distance(dense(merged, "x"), u @ small @ v.T) < allowed, name
        assert merged.report["x"].rank == case.exact_rank


def test_what_the_signs_of_the_factors_and_their_split_change():
    """knots: nothing, it sees the updates alone. core: nothing by signs, but much by the split."""
    case = CASES["odd d"]
    flipped = Case([-a for a in case.a], [-b for b in case.b], case.scalings)
    scaled = Case([3 * case.a[0], *case.a[1:]], [case.b[0] / 3, *case.b[1:]], case.scalings)
    for method in ("knots", "core"):
        usual, turned, split = (
            dense(at_one(adapters({"x": c}), method, inner="ties", **TORCH), "x")
            for c in (case, flipped, scaled)
        )
        assert distance(turned, usual) < 1e-6
        assert (distance(split, usual) < 1e-5) == (method == "knots")


def test_equal_singular_values_leave_the_basis_open_and_what_it_spans_not():
    """Updates without a preferred direction: the sum is theirs, and ties merges in some basis."""
    a, b = torch.eye(4, 9), torch.eye(7, 8)
    loaded = [from_tensors({"x": (a, b[:, :4])}), from_tensors({"x": (a, b[:, 3:7])})]
    expected = dense(at_one(loaded, "linear"), "x")
    for method in ("knots", "core"):
        assert distance(dense(at_one(loaded, method, inner="linear"), "x"), expected) < 1e-6
        merged = dense(at_one(loaded, method, inner="ties", density=1.0, **TORCH), "x")
        assert torch.linalg.matrix_rank(torch.cat([merged, expected], 1)) <= 7
        assert not merged[:, 4:].any()


@both
def test_the_largest_entries_of_the_whole_model_in_shared_bases(method):
    cases = {name: CASES[name] for name in GROUP}
    parts = {name: inside(case, method) for name, case in cases.items()}
    least = [smallest_kept([values[i] for values in parts.values()], 0.1) for i in range(3)]
    given = {"inner": "ties", "scope": "model", "density": 0.1, "weights": WEIGHTS}
    merged = at_one(adapters(cases), method, **given, **TORCH)
    alone = at_one(adapters({"odd d": cases["odd d"]}), method, **given, **TORCH)
    for name, case in cases.items():
        expected = shared(case, method, "ties", WEIGHTS, least=least)
        assert distance(dense(merged, name), expected) < 1e-5, name
    assert distance(dense(alone, "odd d"), dense(merged, "odd d")) > 1e-2


def test_a_shared_basis_in_another():
    case = CASES["odd d"]
    u, v = bases(case, "core")
    parts = inside(case, "core")
    turn = left_vectors(torch.cat(parts, 1))
    small = turn @ ties([turn.T @ x for x in parts], WEIGHTS)
    merged = at_one(adapters({"x": case}), "core", inner="knots", weights=WEIGHTS, **TORCH)
    assert distance(dense(merged, "x"), u @ small @ v.T) < 1e-5
    given = merged.report.recipe.options
    assert (given["inner"], given["density"]) == ("knots", 0.2)


@both
def test_a_module_that_not_all_adapters_have(method):
    case = CASES["odd d"]
    first, second, third = adapters({"x": case, "y": case})
    partial = from_tensors({"y": second.factors("y")}, case.scalings[1])
    given = {"inner": "dare", "weights": WEIGHTS, **TORCH}
    merged = at_one([first, partial, third], method, **given)
    whole = at_one([first, second, third], method, **given)
    assert distance(dense(merged, "y"), dense(whole, "y")) < 1e-6
    rest = Case(case.a[::2], case.b[::2], case.scalings[::2])
    u, v = bases(rest, method)
    small = dare(inside(rest, method), WEIGHTS[::2], owners=(0, 2))
    assert distance(dense(merged, "x"), u @ small @ v.T) < 1e-5


# directions


def recombined(
    case: Case,
    merge: Merge,
    omegas: Sequence[float] | None = None,
    orthogonalize: bool = True,
    rule: dict[str, Any] | None = None,
    **given: Any,
) -> Tensor:
    """The merged directions, of the norm of their weighted sum, with the merged magnitudes."""
    omegas = case.omegas if omegas is None else omegas
    found, sizes = apart(case, orthogonalize, rule)
    merged = merge(found, omegas, **given)
    gain = linear(found, omegas).norm() / merged.norm() if merged.any() else 0.0
    return gain * merged * total([abs(w) * x for w, x in zip(omegas, sizes, strict=True)])


def apart(
    case: Case, orthogonalize: bool = True, rule: dict[str, Any] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The directions D_i [m, n] and the magnitudes [n]."""
    rule = descent(case)[0] if rule is None else rule
    a, b = [x.double() for x in case.a], case.exact_b()
    if orthogonalize:
        a, _ = paper.descend(a, **rule)
        b = [x.T for x in paper.descend([x.T for x in b], **rule)[0]]
    directions, magnitudes = [], []
    for x, y in zip(a, b, strict=True):
        delta = y @ x
        sizes = delta.norm(dim=0)
        sizes = torch.where(sizes > paper.ZERO_COLUMN * y.norm() * x.norm(dim=0), sizes, 0.0)
        magnitudes.append(sizes)
        directions.append(torch.where(sizes > 0, delta / sizes, 0.0))
    return directions, magnitudes


def determined(inner: str, name: str) -> bool:
    """The columns of a direction of rank 1 differ in sign alone: rounding decides which of its
    entries are the largest."""
    return name != "64 adapters" and (inner != "ties" or 1 not in CASES[name].ranks)


@pytest.mark.parametrize(
    ("inner", "name"),
    [run for run in itertools.product(("tsvm", "ties", "dare"), CASES) if determined(*run)],
)
def test_another_method_on_the_directions(inner, name):
    """Zero columns, R > d, negative weights and adapters of any sizes among them."""
    case = CASES[name]
    rule, allowed = descent(case)
    given = {"weights": case.weights, "scale": -0.3, "directions": inner, **rule, **TORCH}
    merged = at_one(adapters({"x": case}), form="deltas", **given)
    expected = -0.3 * recombined(case, INNER[inner])
    assert distance(merged.delta("x").double(), expected) < allowed


@pytest.mark.parametrize(
    ("inner", "backend"), [(i, b) for i in ("tsvm", "ties", "opcm") for b in backends(i)]
)
def test_directions_without_the_descent_and_on_every_backend(inner, backend):
    case = CASES["odd d"]
    given = {"directions": inner, "orthogonalize": False, "weights": WEIGHTS, "backend": backend}
    merged = at_one(adapters({"x": case}), form="deltas", **given)
    expected = recombined(case, INNER[inner], orthogonalize=False)
    assert distance(merged.delta("x").double(), expected) < 1e-5


@pytest.mark.parametrize("backend", AVAILABLE)
def test_directions_merged_by_linear_are_do_to_the_bit(backend):
    cases = {name: CASES[name] for name in GROUP}
    loaded = adapters(cases)
    settings = Settings(1.0, torch.float32, backend)
    run = prepared(Chosen(TABLE["do"], TABLE["do"].options()), (), settings)
    named = at_one(loaded, directions="linear", weights=WEIGHTS, backend=backend)
    close = at_one(loaded, directions="cat", weights=WEIGHTS, backend=backend)
    stacks = [Plan.make(loaded, WEIGHTS).stack(name) for name in named.names]
    own = run(stacks, settings, grams(stacks, [True] * 3, backend))
    for name, factors in zip(named.names, own, strict=True):
        a, b = named.factors(name)
        if len(factors.a) == cases[name].exact_rank:
            assert torch.equal(a, factors.a)
            assert torch.equal(b, factors.b)
        else:
            assert distance(b.double() @ a.double(), factors.b.double() @ factors.a.double()) < 1e-6
        assert distance(dense(close, name), dense(named, name)) < 1e-5
        for side in ("a", "b"):
            assert getattr(close.report[name], side) == getattr(named.report[name], side)
        sizes = named.report[name].magnitudes
        assert close.report[name].magnitudes == pytest.approx(sizes, rel=1e-5)


@pytest.mark.parametrize("name", GROUP)
def test_a_power_of_the_directions_spectrum(name):
    case = CASES[name]

    def halved(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        size = sum(abs(w) * v.norm() for w, v in zip(weights, values, strict=True))
        return raised(linear(values, weights), size, 0.5)

    rule, allowed = descent(case)
    merged = at_one(adapters({"x": case}), power=0.5, weights=WEIGHTS, **rule, **TORCH)
    assert distance(dense(merged, "x"), recombined(case, halved, case.omegas)) < allowed


def test_svd_of_the_directions_truncates_what_is_recombined():
    case = CASES["odd d"]
    merged = at_one(adapters({"x": case}), directions="svd", weights=WEIGHTS, **FEW, **TORCH)
    full = paper.do_merging(case.a, case.exact_b(), case.omegas, **FEW)
    u, s, vh = torch.linalg.svd(full)
    best = u[:, :5] @ s[:5].diag() @ vh[:5]
    assert distance(dense(merged, "x"), best) < 1e-5
    assert merged.report["x"].rank == 5
    assert merged.report["x"].energy_kept == pytest.approx(float(best.norm() / full.norm()) ** 2)


def test_directions_of_a_module_that_not_all_adapters_have():
    case = CASES["odd d"]
    first, second, third = adapters({"x": case, "y": case})
    partial = from_tensors({"y": second.factors("y")}, case.scalings[1])
    given = {"weights": WEIGHTS, "directions": "ties", "form": "deltas", **FEW, **TORCH}
    merged = at_one([first, partial, third], **given)
    rest = Case(case.a[::2], case.b[::2], case.scalings[::2])
    expected = recombined(rest, ties, [1 / 3, 2 / 3])
    assert distance(merged.delta("x").double(), expected) < 1e-5
    assert distance(merged.delta("y").double(), recombined(case, ties)) < 1e-5


def test_the_largest_entries_of_all_directions():
    cases = {name: CASES[name] for name in GROUP}
    rule, allowed = descent(*cases.values())
    parts = {name: apart(case, rule=rule)[0] for name, case in cases.items()}
    least = [smallest_kept([values[i] for values in parts.values()], 0.1) for i in range(3)]
    given = {"directions": "ties", "scope": "model", "density": 0.1, "form": "deltas"}
    merged = at_one(adapters(cases), weights=WEIGHTS, **given, **rule, **TORCH)
    for name, case in cases.items():
        expected = recombined(case, ties, rule=rule, least=least)
        assert distance(merged.delta(name).double(), expected) < allowed, name


@pytest.mark.parametrize("inner", ["ties", "dare"])
def test_directions_of_which_nothing_is_left(inner):
    merged = at_one(
        adapters({"x": CASES["odd d"]}), directions=inner, density=0.0, form="deltas", **TORCH
    )
    assert not merged.delta("x").any()


def test_directions_that_cancel_stay_rounding_noise():
    case = CASES["one adapter"]
    (adapter,) = adapters({"x": case})
    given = {"weights": [1, -1], "orthogonalize": False, **TORCH}
    for inner in ("tsvm", "iso_c", "wudi"):
        merged = at_one([adapter, adapter], directions=inner, **given)
        assert float(dense(merged, "x").norm()) < 1e-6 * float(case.deltas()[0].norm())


@pytest.mark.parametrize("given", [{"decouple": False}, {"renormalize": True}])
def test_directions_need_to_be_apart(given):
    with pytest.raises(dm.OptionError, match=r"^option 'directions': 'ties' needs decouple.*;"):
        at_one(adapters({"x": CASES["odd d"]}), directions="ties", **given)
    with pytest.raises(dm.OptionError, match=r"^option 'power': 0.5 needs decouple.*;"):
        at_one(adapters({"x": CASES["odd d"]}), power=0.5, **given)


# Groups


@contextlib.contextmanager
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One module a group."""
    with monkeypatch.context() as patch:
        patch.setattr(reader, "GROUP_BYTES", 1)
        patch.setattr(reader, "DENSE_BYTES", 1)
        yield


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("knots", {"scope": "model"}),
        ("core", {"inner": "opcm"}),
        ("core", {"inner": "ties", "pre": ["equalize"], "post": ["norm_match"]}),
        ("do", {"directions": "ties", "scope": "model"}),
        ("do", {"directions": "opcm", "pre": ["canonicalize"]}),
        ("ties", {"scope": "model", "pre": ["equalize"], "form": "deltas"}),
        ("dare", {"rank": 3, "post": ["subspace_boost"]}),
    ],
    ids=str,
)
def test_many_groups_merge_like_one(method, given, monkeypatch):
    cases = {name: CASES[name] for name in (*GROUP, "shared A")}
    steps: list[int] = []
    one = at_one(adapters(cases), method, **given, **TORCH)
    with small_groups(monkeypatch):
        told = {"progress": lambda done, total: steps.append(done)}
        many = at_one(adapters(cases), method, **given, **told, **TORCH)
    assert steps == [1, 2, 3, 4]
    for name in cases:
        assert distance(many.delta(name), one.delta(name)) < 1e-4, name


# Steps before and after


def by_hand(
    case: Case, method: str, pre: Sequence[str], post: Sequence[str], scale: float = 1.0
) -> Tensor:
    """One step after the other."""
    settings = Settings(scale, torch.float32, "torch")
    owners = tuple(range(len(case.ranks)))
    given = [Stack(("x",), owners, case.rows(), case.columns(), tuple(case.weights))]
    stacks: Sequence[Stack] = given
    for name in pre:
        stacks = PRE[name].run(stacks, settings)
    row = TABLE[method]
    merged = prepared(Chosen(row, row.options()), [stacks], settings)(stacks, settings)
    factors = [f for f in merged if isinstance(f, Factors)]
    for name in post:
        factors = POST[name].run(given, factors, settings)
    return factors[0].b.double() @ factors[0].a.double()


ALONE = tuple(name for name, row in PRE.items() if row.run)
"""Steps before that need nothing beside the factors."""


@pytest.mark.parametrize("pre", [*itertools.permutations(ALONE, 2), ALONE], ids=" ".join)
def test_steps_before_a_merge_are_taken_in_order(pre):
    case = CASES["odd d"]
    merged = at_one(adapters({"x": case}), "linear", weights=case.weights, pre=pre, **TORCH)
    assert distance(dense(merged, "x"), by_hand(case, "linear", pre, ())) < 1e-6
    assert merged.report.recipe.pre == tuple(pre)
    if set(pre) == {"equalize", "pico"}:
        assert distance(dense(merged, "x"), by_hand(case, "linear", pre[::-1], ())) > 1e-3


@pytest.mark.parametrize("method", ["linear", "do", "tsvm"])
@pytest.mark.parametrize("post", [*itertools.permutations(POST)], ids=" ".join)
def test_steps_after_a_merge_are_taken_in_order(post, method):
    """Matching the norm before it is boosted leaves another norm."""
    case = CASES["odd d"]
    given = {"weights": case.weights, "scale": -0.3, "pre": ["canonicalize"], "post": post}
    merged = at_one(adapters({"x": case}), method, **given, **TORCH)
    result = dense(merged, "x")
    assert distance(result, by_hand(case, method, ["canonicalize"], post, -0.3)) < 1e-5
    assert merged.report.recipe.post == tuple(post)
    norms = [abs(w) * float(d.norm()) for w, d in zip(case.weights, case.deltas(), strict=True)]
    wanted = 0.3 * sum(norms) / 3
    assert (float(result.norm()) == pytest.approx(wanted, rel=1e-5)) == (post[-1] == "norm_match")


@pytest.mark.parametrize("pre", [(), ("equalize",), ("pico",)], ids=str)
def test_svc_takes_the_adapters_as_the_method_does(pre):
    """tsvm finds singular triplets itself; of what core makes they are found afterwards."""
    cases = {"x": CASES["odd d"], "y": random_case((2, 4, 3), 19, 31, seed=1)}
    given = {"weights": WEIGHTS, "pre": pre, "post": ["svc"]}
    found = at_one(adapters(cases), "core", inner="tsvm", **given)
    expected = at_one(adapters(cases), "tsvm", **given)
    for name in cases:
        assert distance(dense(found, name), dense(expected, name)) < 1e-5


def test_svc_after_opcm_brings_updates_that_share_nothing_back():
    case = random_case((3, 2), 23, 19)
    for k, rows in enumerate((slice(0, 9), slice(9, None))):
        case.a[k][:, rows], case.b[k][rows] = 0, 0
    found = at_one(adapters({"x": case}), "opcm", post=["svc"])
    assert distance(dense(found, "x"), total(case.deltas())) < 1e-5


def test_steps_after_a_merge_come_after_the_truncation():
    """So that a norm that was matched stays matched."""
    case = CASES["odd d"]
    merged = at_one(adapters({"x": case}), "linear", rank=2, post=["norm_match"], **TORCH)
    u, s, vh = torch.linalg.svd(total(case.deltas()))
    best = u[:, :2] @ s[:2].diag() @ vh[:2]
    best *= sum(float(delta.norm()) for delta in case.deltas()) / 3 / best.norm()
    assert distance(dense(merged, "x"), best) < 1e-5
    kept = float(s[:2].square().sum() / s.square().sum())
    assert merged.report["x"].energy_kept == pytest.approx(kept)


@pytest.mark.parametrize("form", ["adapter", "deltas"])
def test_a_dense_result_is_cut_before_steps_in_any_form(form):
    case = CASES["odd d"]
    given = {"density": 0.5, "form": form, "post": ["norm_match"], **TORCH}
    merged = at_one(adapters({"x": case}), "ties", **given)
    u, s, vh = torch.linalg.svd(ties(case.deltas(), [1, 1, 1], density=0.5))
    best = u[:, :5] @ s[:5].diag() @ vh[:5]
    best *= sum(float(delta.norm()) for delta in case.deltas()) / 3 / best.norm()
    assert distance(merged.delta("x").double(), best) < 1e-4
    assert merged.report["x"].rank == 5
    assert merged.report["x"].energy_kept == pytest.approx(
        float(s[:5].square().sum() / s.square().sum()), rel=1e-4
    )


# Forms


@pytest.mark.parametrize("given", [{"rank": 3}, {"energy": 0.8}, {"rank": 2, "energy": 0.8}, {}])
@pytest.mark.parametrize("method", ["ties", "do"])
def test_a_dense_result_is_cut_to_a_rank_or_an_energy(method, given):
    """Without either to the largest rank of the adapters."""
    case = CASES["odd d"]
    options = {"directions": "ties", **FEW} if method == "do" else {}
    merged = at_one(adapters({"x": case}), method, **options, **given, **TORCH)
    full = at_one(adapters({"x": case}), method, form="deltas", **options, **TORCH)
    delta = full.delta("x").double()
    squares = torch.linalg.svdvals(delta).square()
    by_energy = 1 + int((squares.cumsum(0) < given.get("energy", 1.0) * squares.sum()).sum())
    k = min(given.get("rank", 10**6), by_energy) if given else 5
    assert merged.report["x"].rank == k
    kept = float(squares[:k].sum() / squares.sum())
    assert merged.report["x"].energy_kept == pytest.approx(kept, rel=1e-4)
    assert merged.report["x"].energy == pytest.approx(float(squares.sum()), rel=1e-4)
    error = float((dense(merged, "x") - delta).square().sum() / squares.sum())
    assert error == pytest.approx(1 - kept, abs=1e-4)
    assert full.report["x"].rank == min(delta.shape)
    assert full.report["x"].energy_kept == 1.0


def test_dense_updates_are_kept_in_memory_or_written(tmp_path):
    case = CASES["odd d"]
    loaded = adapters({"x": case})
    expected = ties(case.deltas(), [1, 1, 1])
    kept = at_one(loaded, "ties", form="deltas", **TORCH)
    assert distance(kept.delta("x").double(), expected) < 1e-6
    with pytest.raises(dm.OptionError, match=r"'deltas', which has no factors; merge with form="):
        kept.factors("x")
    kept.save(tmp_path / "saved")
    written = at_one(loaded, "ties", form="deltas", output=tmp_path / "written", **TORCH)
    for folder in ("saved", "written"):
        (tensor,) = load_file(tmp_path / folder / "deltas.safetensors").values()
        assert torch.equal(tensor, kept.delta("x"))
    with pytest.raises(dm.DomergeError):
        written.factors("x")


def test_updates_of_a_factor_method_as_dense_ones():
    case = CASES["odd d"]
    merged = at_one(adapters({"x": case}), "linear", form="deltas", **TORCH)
    assert distance(merged.delta("x").double(), total(case.deltas())) < 1e-6
    assert merged.report["x"].rank == sum(case.ranks)


def test_a_model_with_the_updates_added(tmp_path):
    case = CASES["odd d"]
    m, n = case.b[0].shape[0], case.a[0].shape[1]
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    base = tmp_path / "base"
    base.mkdir()
    save_file({"x.weight": weight}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    given = {"base": base, "output": tmp_path / "out", "weights": WEIGHTS, **TORCH}
    at_one(adapters({"x": case}), "ties", form="model", **given)
    (found,) = load_file(tmp_path / "out" / "model.safetensors").values()
    expected = weight.double() + ties(case.deltas(), WEIGHTS)
    assert distance(found.double(), expected) < 1e-6


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"form": "model"}, "option 'form': 'model' needs the base model; give its folder as base"),
        (
            {"form": "model", "base": "base"},
            "option 'form': 'model' is written, not kept in memory",
        ),
        ({"form": "deltas", "base": "base"}, "option 'base': 'base' is no folder"),
        ({"form": "delta"}, "option 'form': 'delta' is not known; did you mean 'deltas'?"),
        ({"pre": ["equalise"]}, "option 'pre': 'equalise' is not known; did you mean 'equalize'?"),
        ({"pre": ["norm_match"]}, "option 'pre': 'norm_match' is not known; use one of: "),
        ({"post": ["pico"]}, "option 'post': 'pico' is not known; use one of: "),
        ({"pre": "equalize"}, "option 'pre': is one name, not a list; say ['equalize']"),
        ({"method": "knots", "inner": "tie"}, "option 'inner': 'tie' is not known; did you mean"),
        ({"method": "knots", "inner": ["ties"]}, "option 'inner': ['ties'] is not known; did you"),
        (
            {"directions": "tiess"},
            "option 'directions': 'tiess' is not known; did you mean 'ties'?",
        ),
        ({"method": "knots", "densty": 0.5}, "did you mean 'density'?"),
        ({"method": "core", "density": 0.5}, "option 'density': method 'core' has no such option"),
        ({"method": "core", "inner": "ties", "density": 2}, "option 'density': 2 is too large"),
        (
            {"directions": "dare", "epsilon": 1.0},
            "option 'epsilon': method 'do' has no such option",
        ),
        (
            {"method": "linear", "inner": "ties"},
            "option 'inner': method 'linear' has no such option",
        ),
    ],
    ids=str,
)
def test_what_is_not_understood_is_told_in_one_line(given, line):
    with pytest.raises(dm.OptionError) as caught:
        at_one(adapters({"x": CASES["odd d"]}), **given)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


# Recipes and the command line

RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("do", {"gamma": 0.5, "rank": 4}),
    ("do", {"directions": "dare", "density": 0.3, "seed": 7, "pre": ["canonicalize"]}),
    ("do", {"directions": "knots", "inner": "dare", "seed": 3, "steps": 2, "energy": 0.9}),
    ("do", {"directions": "do", "gamma": 2.0}),
    ("do", {"power": 0.25}),
    ("tsvm", {"power": 0.5, "rank": 4}),
    ("knots", {"density": 0.5, "scope": "model", "post": ["norm_match", "subspace_boost"]}),
    ("knots", {"inner": "knots", "majority_sign_method": "frequency"}),
    ("knots", {"inner": "do", "sides": "A"}),
    ("core", {"inner": "iso_cts", "common": 0.5, "pre": ["equalize", "pico"]}),
    ("della", {"epsilon": 0.1, "seed": 5, "form": "deltas"}),
    ("ties", {"conventions": "mergekit", "rank": 3}),
]


@pytest.mark.parametrize(("method", "given"), RECIPES, ids=str)
def test_the_report_s_options_repeat_the_merge(method, given):
    loaded = adapters({name: CASES[name] for name in GROUP})
    first = at_one(loaded, method, weights=WEIGHTS, scale=0.7, **given, **TORCH)
    report = first.report
    told = json.loads(json.dumps(report.to_dict()))
    assert given.items() <= told["recipe"].items()
    again = dm.run(dm.Recipe.of_plain(told["recipe"]), loaded)
    assert again.report.recipe == report.recipe
    for name in first.names:
        assert torch.equal(again.delta(name), first.delta(name))
        assert again.report[name] == report[name]


COMMANDS: dict[str, dict[str, Any]] = {
    "--pre canonicalize equalize --post norm_match": {
        "pre": ["canonicalize", "equalize"],
        "post": ["norm_match"],
    },
    "--pre equalize canonicalize --method knots --inner dare --seed 3": {
        "pre": ["equalize", "canonicalize"],
        "method": "knots",
        "inner": "dare",
        "seed": 3,
    },
    "--method tsvm --power 0.5": {"method": "tsvm", "power": 0.5},
    "--method do --directions ties --density 0.4 --rank 3": {
        "method": "do",
        "directions": "ties",
        "density": 0.4,
        "rank": 3,
    },
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters in the current folder."""
    monkeypatch.chdir(tmp_path)
    case = CASES["odd d"]
    for name, a, b in zip("pqr", case.a, case.b, strict=True):
        write_adapter(tmp_path / name, {"layer": (a, b)})
    return ["p", "q", "r"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_composes_like_the_api(command, folders, capsys):
    assert cli.main(["merge", *folders, "-o", "out", "--backend", "torch", *command.split()]) == 0
    expected = dm.merge(folders, **COMMANDS[command], **TORCH)
    written = dm.load("out").factors("layer")
    assert all(map(torch.equal, written, expected.factors("layer")))
    card = Path("out/README.md").read_text(encoding="utf-8")
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    assert COMMANDS[command].items() <= recipe.items()


def test_the_command_line_writes_dense_updates(folders, capsys):
    arguments = ["--method", "ties", "--form", "deltas", "--backend", "torch", "--quiet"]
    assert cli.main(["merge", *folders, "-o", "out", *arguments]) == 0
    (tensor,) = load_file("out/deltas.safetensors").values()
    assert torch.equal(tensor, dm.merge(folders, "ties", form="deltas", **TORCH).delta("layer"))


@pytest.mark.parametrize(
    "command",
    [
        "--pre equalise",
        "--post norm",
        "--form model",
        "--form deltas --base base",
        "--method knots --inner tie",
        "--method core --density 0.5",
        "--method do --directions ties --no-decouple",
    ],
)
def test_the_command_line_refuses_in_one_line(command, folders, capsys):
    assert cli.main(["merge", *folders, "-o", "out", *command.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("domerge-fast: error: option ")
    assert told.count("\n") == 1
    assert not Path("out").exists()
