"""slerp, multislerp, robust and lego against their dense definitions in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.close import assert_close, distance
from support.merges import adapters, at_one, dense, merge_all
from support.shapes import CASES, Case, random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast.backends import registry
from domerge_fast.formats import from_tensors
from domerge_fast.methods import choose, lego
from domerge_fast.methods.base import Settings
from domerge_fast.methods.running import prepared

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
METHODS = ("slerp", "multislerp", "robust", "lego")
LEGO_OPTIONS: list[dict[str, Any]] = [
    {},
    {"clusters": 1},
    {"clusters": 3, "seed": 5},
    {"clusters": 1000},
    {"balance": True},
]

every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def pick(case: Case, *positions: int) -> Case:
    """Some of the case's adapters."""
    return Case(
        [case.a[i].clone() for i in positions],
        [case.b[i].clone() for i in positions],
        [case.scalings[i] for i in positions],
    )


def weighted(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    return torch.stack([c * delta for c, delta in zip(coefficients, deltas, strict=True)]).sum(0)


def normalized(weights: Sequence[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


PAIRS = {
    **{name: pick(case, 0, 1) for name, case in CASES.items() if len(case.a) > 1},
    "zero first": pick(CASES["zero factors"], 1, 3),
    "zero second": pick(CASES["zero factors"], 3, 2),
    "parallel": pick(CASES["duplicated"], 0, 2),
    "opposite": Case(CASES["duplicated"].a[::2], CASES["duplicated"].b[::2], [1.0, -2.0]),
}
EQUAL = {
    "usual": CASES["usual"],
    "whole vectors": CASES["whole vectors"],
    "shared A": CASES["shared A"],
    "odd d": random_case((5, 5, 5), 61, 33),
    "d below R": random_case((4, 4, 4), 7, 5),
    "d is 1": random_case((1, 1), 1, 1),
    "R above 256": random_case((90, 90, 90), 281, 271),
    "one adapter": CASES["one adapter"],
    "duplicated": pick(random_case((4, 4), 37, 31), 0, 1, 0),
    "zero update": random_case((3, 3, 3), 23, 19),
    "all zero": pick(CASES["all zero"], 0, 0),
    "weak rows": random_case((5, 5), 41, 29),
    "mixed sizes": random_case((4, 4, 4), 41, 29),
}
EQUAL["zero update"].a[1].zero_()
EQUAL["zero update"].b[2].zero_()
EQUAL["zero update"].b[0].zero_()
for index, power in enumerate((0, -4)):
    EQUAL["weak rows"].a[index][2:4] *= 10.0**power
for index, size in enumerate((1e-8, 1e4, 1.0)):
    EQUAL["mixed sizes"].a[index].mul_(size)
    EQUAL["mixed sizes"].b[index].mul_(size)


# The definitions, dense


def slerp(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The way along the great circle, each end with its own length."""
    one, other = (delta.norm() for delta in deltas)
    t = weights[1] / sum(weights)
    if not one * other or abs((deltas[0] * deltas[1]).sum() / (one * other)) > 0.9995:
        return (1 - t) * deltas[0] + t * deltas[1]
    start, end = deltas[0] / one, deltas[1] / other
    cosine = float((start * end).sum())
    across = end - cosine * start
    across /= across.norm()
    angle = math.acos(cosine)
    point = math.cos(t * angle) * start + math.sin(t * angle) * across
    # start and end span the circle: the point is their combination, stretched to their lengths.
    basis = torch.stack([start.flatten(), end.flatten()], 1)
    x = torch.linalg.lstsq(basis, point.flatten()).solution
    return x[0] * deltas[0] + x[1] * deltas[1]


def multislerp(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """As mergekit describes it, with the step in the tangent space."""
    shares = normalized(weights)
    norms = [float(delta.norm()) for delta in deltas]
    units = [delta / norm if norm else delta for delta, norm in zip(deltas, norms, strict=True)]
    mean = weighted(units, shares)
    if mean.norm() < 1e-8:
        return weighted(deltas, shares)
    mean /= mean.norm()
    tangent = weighted([unit - (unit * mean).sum() * mean for unit in units], shares)
    angle = tangent.norm()
    point = torch.cos(angle) * mean + torch.sinc(angle / math.pi) * tangent
    return sum(w * norm for w, norm in zip(shares, norms, strict=True)) * point


def largest(x: Tensor, density: float) -> Tensor:
    """x without the entries that are smaller than one of rank int(size (1 - density))."""
    least = x.abs().flatten().sort().values[max(1, int(x.numel() * (1 - density))) - 1]
    return x * (x.abs() >= least)


def robust(case: Case, weights: Sequence[float], density: float = 0.2) -> Tensor:
    if len(case.a) == 1:
        return weights[0] * case.deltas()[0]
    kept_a = [largest(a.double(), density) for a in case.a]
    kept_b = [largest(b.double(), density) for b in case.b]
    scales = []
    for a, kept in zip(case.a, kept_a, strict=True):
        rows = zip(a.double().abs().sum(1), kept.abs().sum(1), strict=True)
        p = torch.stack([whole / left if left else torch.ones_like(left) for whole, left in rows])
        scales.append(p.clamp_min(p.sort().values[int(0.8 * len(p))]))
    total = torch.stack(scales).sum(0)
    parts = zip(weights, case.scalings, kept_b, scales, strict=True)
    b = torch.stack([w * s * 2 * x * scale / total for w, s, x, scale in parts]).sum(0)
    return b @ (2 * torch.stack(kept_a).sum(0))


def units(case: Case, weights: Sequence[float], balance: bool) -> tuple[Tensor, Tensor]:
    """Rows of the A_i and of the w_i s_i B_i^T, all of them."""
    a = torch.cat([x.double() for x in case.a])
    parts = zip(case.exact_b(), weights, strict=True)
    b = torch.cat([w * x.T for x, w in parts])
    if balance:
        length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
        length = (length_a * length_b).sqrt()
        a = torch.where(length > 0, a * length / length_a, 0.0)
        b = torch.where(length > 0, b * length / length_b, 0.0)
    return a, b


def seeds(points: Tensor, clusters: int, seed: int) -> list[int]:
    """k-means++ on points in the space they are in."""
    draws = torch.rand(clusters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chances, chosen = torch.ones(len(points), dtype=torch.float64), []
    nearest = chances * math.inf
    for draw in draws.tolist():
        sums = chances.cumsum(0)
        passed = int((sums <= draw * sums[-1]).sum())
        chosen.append(min(passed, len(points) - 1))
        chances = nearest = nearest.minimum((points - points[chosen[-1]]).square().sum(1))
    return chosen


def k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Labels, after Lloyd's iteration."""
    if clusters == len(points):
        return torch.arange(clusters)
    centres, labels = points[seeds(points, clusters, seed)], None
    while True:
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        found = distances.argmin(1)
        if labels is not None and torch.equal(labels, found):
            return labels
        labels = found
        centres = torch.stack(
            [
                points[labels == c].mean(0) if (labels == c).any() else points[0] + math.inf
                for c in range(clusters)
            ]
        )


def lego_merge(
    case: Case,
    weights: Sequence[float],
    clusters: int = 0,
    balance: bool = False,
    seed: int = 0,
) -> tuple[Tensor, int]:
    """ΔW and its rank."""
    case = case.as_read
    a, b = units(case, weights, balance)
    points = torch.cat([a, b], 1)
    order = points.norm(dim=1).argsort(descending=True, stable=True)
    points = points[order]
    count = min(clusters or max(case.ranks), len(points))
    labels = k_means(points, count, seed)
    merged, rank = a.new_zeros(b.shape[1], a.shape[1]), 0
    for c in range(count):
        members = points[labels == c]
        if not len(members) or not members.any():
            continue
        mean = members.mean(0)
        mean *= members.norm(dim=1).mean() / mean.norm()
        merged += mean[a.shape[1] :, None] * mean[: a.shape[1]]
        rank += 1
    return math.sqrt(max(case.ranks) / count) * merged, min(max(rank, 1), *merged.shape)


# Against the definitions


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (-0.5, 2.0), (0.25, -1.0)], ids=str)
def test_slerp_is_its_dense_definition(weights):
    merged = at_one(adapters(PAIRS), "slerp", weights=weights, scale=-0.3, backend="torch")
    for name, case in PAIRS.items():
        expected = -0.3 * slerp(case.deltas(), weights)
        assert_close(dense(merged, name), expected, 1e-5, name=name)
        assert merged.report[name].rank == case.exact_rank, name


def test_multislerp_is_its_dense_definition():
    merged = merge_all(CASES, "multislerp", scale=-0.3, backend="torch")
    for name, case in CASES.items():
        expected = -0.3 * multislerp(case.deltas(), case.weights)
        assert_close(dense(merged, name), expected, 1e-5, name=name)
        assert merged.report[name].rank == case.exact_rank, name


@pytest.mark.parametrize("density", [0.2, 0.0, 1.0])
def test_robust_is_its_dense_definition(density):
    merged = merge_all(EQUAL, "robust", scale=-0.3, density=density, backend="torch")
    for name, case in EQUAL.items():
        expected = -0.3 * robust(case, case.weights, density)
        assert_close(dense(merged, name), expected, 1e-5, name=name)
        assert merged.report[name].rank == case.as_read.ranks[0], name


@pytest.mark.parametrize("options", LEGO_OPTIONS, ids=str)
def test_lego_is_its_dense_definition(options):
    merged = merge_all(CASES, "lego", scale=-0.3, backend="torch", **options)
    for name, case in CASES.items():
        expected, rank = lego_merge(case, case.weights, **options)
        assert_close(dense(merged, name), -0.3 * expected, 1e-5, name=name)
        assert merged.report[name].rank == rank, name


@every_backend
@pytest.mark.parametrize("method", ["slerp", "multislerp", "robust"])
def test_modules_of_any_shapes_and_backends_merge_together(method, backend):
    source = PAIRS if method == "slerp" else EQUAL if method == "robust" else CASES
    definition = {"slerp": slerp, "multislerp": multislerp}.get(method)
    cases = {name: source[name] for name in ("odd d", "d below R", "shared A", "mixed sizes")}
    weights = [1, -0.5, 2][: len(cases["odd d"].a)]
    merged = at_one(adapters(cases), method, weights=weights, backend=backend)
    for name, case in cases.items():
        expected = definition(case.deltas(), weights) if definition else robust(case, weights)
        assert distance(dense(merged, name), expected) < 1e-5, name


@every_backend
@pytest.mark.parametrize("options", LEGO_OPTIONS, ids=str)
def test_lego_on_modules_of_any_shapes_and_backends(options, backend):
    """Some of the same ranks in one batch, some not."""
    cases = {f"{n}x{m}": random_case((3, 5, 2), n, m, n) for n, m in ((61, 33), (40, 50), (7, 5))}
    cases |= {name: CASES[name] for name in ("odd d", "d below R", "duplicated", "mixed sizes")}
    merged = at_one(adapters(cases), "lego", weights=[1, -0.5, 2], backend=backend, **options)
    for name, case in cases.items():
        expected, rank = lego_merge(case, case.weights, **options)
        assert distance(dense(merged, name), expected) < 1e-5, name
        assert merged.report[name].rank == rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_factors_are_merged_in_float32(method, dtype):
    case = pick(EQUAL["odd d"], 0, 1)
    rounded = Case([a.to(dtype) for a in case.a], [b.to(dtype) for b in case.b], case.scalings)
    merged = at_one(adapters({"x": rounded}), method, weights=[1, 2], dtype="float32")
    low = at_one(adapters({"x": rounded}), method, weights=[1, 2])
    expected = {
        "slerp": lambda: slerp(rounded.deltas(), [1, 2]),
        "multislerp": lambda: multislerp(rounded.deltas(), [1, 2]),
        "robust": lambda: robust(rounded, [1, 2]),
        "lego": lambda: lego_merge(rounded, [1, 2])[0],
    }[method]()
    assert distance(dense(merged, "x"), expected) < 1e-5
    assert {x.dtype for x in low.factors("x")} == {dtype}
    assert 0 < distance(dense(low, "x"), expected) < 4 * torch.finfo(dtype).eps


# Against mergekit


def dense_pairs() -> list[Case]:
    names = ("usual", "odd d", "d below R", "R above 128", "parallel", "opposite")
    return [PAIRS[name] for name in names]


def test_slerp_is_mergekits():
    theirs = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    for case, t in itertools.product(dense_pairs(), (0.0, 0.3, 0.5, 1.0)):
        one, other = (delta[None] for delta in case.deltas())
        expected = theirs(torch.tensor([t], dtype=torch.float64), one, other)[0]
        weights = [1 - t, t]
        merged = at_one(adapters({"x": case}), "slerp", weights=weights)
        assert distance(dense(merged, "x"), expected) < 1e-5


def test_multislerp_is_mergekits():
    theirs = pytest.importorskip("mergekit.merge_methods.multislerp").multislerp
    base = pytest.importorskip("mergekit.merge_methods.base")
    cases = [*dense_pairs(), *(CASES[n] for n in ("usual", "odd d", "mixed sizes", "64 adapters"))]
    for case in cases:
        for weights in (case.weights, [1.0] * len(case.a)):
            group = base.TensorGroup.from_tensors(case.deltas())
            given = base.PerInputValues(list(enumerate(weights)))
            expected = theirs.implementation(group, weight=given)
            merged = at_one(adapters({"x": case}), "multislerp", weights=weights)
            assert distance(dense(merged, "x"), expected) < 1e-5


# slerp and multislerp


def test_slerp_starts_at_one_adapter_and_ends_at_the_other():
    case = PAIRS["odd d"]
    one, other = case.deltas()
    for weights, expected in (([1, 0], one), ([0, 2], other), ([1e9, 1], one)):
        merged = at_one(adapters({"x": case}), "slerp", weights=weights)
        assert distance(dense(merged, "x"), expected) < 1e-6


def test_slerp_keeps_the_length_of_updates_that_are_equally_long():
    case = random_case((3, 3), 40, 30)
    for b, delta in zip(case.b, case.deltas(), strict=True):
        b /= float(delta.norm())
    for t in (0.2, 0.5, 1.7):
        merged = at_one(adapters({"x": case}), "slerp", weights=[1 - t, t])
        assert float(dense(merged, "x").norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("cosine", "linear"), [(0.9994, False), (0.9996, True)])
def test_slerp_is_linear_above_its_threshold(cosine, linear):
    """e_1 and a vector at a given angle from it: an arc has length 1 all along, a chord has not."""
    a = torch.eye(2)[:1]
    b = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    pair = [from_tensors({"x": (a, row[:, None])}) for row in b]
    merged = dense(at_one(pair, "slerp"), "x")
    assert (distance(merged, (b.T @ torch.ones(2, 1) / 2 @ a).double()) < 1e-6) is linear


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
def test_how_an_update_is_split_into_factors_does_not_matter(method):
    case = PAIRS["odd d"]
    generator = torch.Generator().manual_seed(1)
    mixed = Case([], [], case.scalings)
    for a, b in zip(case.a, case.b, strict=True):
        mixer = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        mixed.a.append((mixer @ a.double()).float())
        mixed.b.append((b.double() @ torch.linalg.inv(mixer)).float())
    expected, result = (dense(at_one(adapters({"x": c}), method), "x") for c in (case, mixed))
    assert distance(result, expected) < 1e-5


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
def test_factors_whose_product_cancels_are_no_update(method):
    """B A = 0 exactly, but not of its Grams: the other adapter alone has a direction."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 200, generator=generator)
    b, c = (torch.rand(1500, 1, generator=generator).mul(2**23).round().div(2**23) for _ in "bc")
    nothing = from_tensors({"x": (torch.cat([a, a, a]), torch.cat([b, c, -(b + c)], 1))})
    case = random_case((3,), 200, 1500)
    merged = at_one([nothing, *adapters({"x": case})], method)
    assert distance(dense(merged, "x"), case.deltas()[0] / 2) < 1e-6


def test_slerp_refuses_a_third_adapter():
    with pytest.raises(
        dm.OptionError, match=r"slerp is between two adapters, and 3 have 'x'; use 'multislerp'"
    ):
        at_one(adapters({"x": CASES["odd d"]}), "slerp")


def test_slerp_takes_three_adapters_that_meet_two_at_a_time():
    case = CASES["odd d"]
    first, second, third = (
        from_tensors(dict.fromkeys(names, (case.a[i], case.b[i])), case.scalings[i])
        for i, names in enumerate(("xy", "xz", "yz"))
    )
    merged = at_one([first, second, third], "slerp", weights=[1, 2, 4])
    for name, (i, j) in {"x": (0, 1), "y": (0, 2), "z": (1, 2)}.items():
        weights = [2.0**i, 2.0**j]
        expected = slerp([case.deltas()[i], case.deltas()[j]], weights)
        assert distance(dense(merged, name), expected) < 1e-6


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
@pytest.mark.parametrize("weights", [(1, -1), (-0.5, 0.5)])
def test_weights_that_add_up_to_nothing_are_refused(method, weights):
    with pytest.raises(dm.OptionError, match=r"'weights': .* module 'x' add up to zero; give oth"):
        at_one(adapters({"x": PAIRS["odd d"]}), method, weights=weights)


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
def test_only_the_weights_ratio_counts(method):
    loaded = adapters({"x": PAIRS["odd d"]})
    results = [
        dense(at_one(loaded, method, weights=weights), "x")
        for weights in ((1, 3), (0.1, 0.3), (-2, -6))
    ]
    assert distance(results[1], results[0]) < 1e-6
    assert distance(results[2], results[0]) < 1e-6


def test_multislerp_refuses_three_directions_that_cancel():
    case = CASES["one adapter"]
    same = adapters({"x": case})[0]
    opposite = from_tensors({"x": same.factors("x")}, -3 * case.scalings[0])
    with pytest.raises(
        dm.OptionError, match=r"'weights': the updates of module 'x' cancel out.*; give others, or"
    ):
        at_one([same, same, opposite], "multislerp", weights=[1, 1, 2])


def test_multislerp_of_two_opposite_updates_is_linear():
    case = PAIRS["opposite"]
    merged = at_one(adapters({"x": case}), "multislerp")
    assert distance(dense(merged, "x"), weighted(case.deltas(), [0.5, 0.5])) < 1e-6


# robust


def test_robust_refuses_different_ranks():
    with pytest.raises(
        dm.DomergeError,
        match=r"^adapter number 2, module 'x': .* 5 is not the 3 of adapter number 1; bring them",
    ):
        at_one(adapters({"x": CASES["odd d"]}), "robust")


@pytest.mark.parametrize(("density", "problem"), [(-1.0, "small"), (1.5, "large")])
def test_a_density_that_is_no_share_is_refused(density, problem):
    with pytest.raises(dm.OptionError, match=f"'density': .* is too {problem}; use at"):
        at_one(adapters({"x": EQUAL["odd d"]}), "robust", density=density)


def test_robust_has_cross_terms_and_depends_on_the_split():
    """Pruned of nothing, it is the product of the sums: as the authors' code adds them."""
    case = EQUAL["odd d"]
    merged = dense(at_one(adapters({"x": case}), "robust", density=1.0), "x")
    a = torch.stack(case.a).sum(0).double()
    b = torch.stack(case.exact_b()).sum(0)
    assert distance(merged, 4 / 3 * b @ a) < 1e-6
    turned = Case([a.flip(0) if i else a for i, a in enumerate(case.a)], [], case.scalings)
    turned.b.extend(b.flip(1) if i else b for i, b in enumerate(case.b))
    assert distance(dense(at_one(adapters({"x": turned}), "robust"), "x"), merged) > 0.1


# lego


def test_units_that_many_adapters_share_are_found():
    """The same three rank-1 parts in every adapter, in another order and a little off."""
    case = random_case((3,), 60, 50)
    generator = torch.Generator().manual_seed(3)
    noisy = Case([], [], [case.scalings[0]] * 4)
    for _ in range(4):
        order = torch.randperm(3, generator=generator)
        noisy.a.append(case.a[0][order] + 1e-4 * torch.randn(3, 60, generator=generator))
        noisy.b.append(case.b[0][:, order] + 1e-4 * torch.randn(50, 3, generator=generator))
    merged = at_one(adapters({"x": noisy}), "lego")
    assert distance(dense(merged, "x"), case.deltas()[0]) < 1e-3
    assert merged.report["x"].rank == 3


def test_lego_does_not_depend_on_the_order_of_ranks_but_on_their_split():
    case = CASES["odd d"]
    turned = Case([a.flip(0) for a in case.a], [b.flip(1) for b in case.b], case.scalings)
    moved = Case([a / 10**i for i, a in enumerate(case.a)], [], case.scalings)
    moved.b.extend(10**i * b for i, b in enumerate(case.b))
    usual, other_order, other_split = (
        dense(at_one(adapters({"x": c}), "lego", clusters=4), "x") for c in (case, turned, moved)
    )
    assert distance(other_order, usual) < 1e-6
    assert distance(other_split, usual) > 0.1
    balanced, again = (
        dense(at_one(adapters({"x": c}), "lego", clusters=4, balance=True), "x")
        for c in (case, moved)
    )
    assert distance(again, balanced) < 1e-5


def test_lego_does_not_depend_on_the_other_modules():
    cases = {name: CASES[name] for name in ("d below R", "duplicated", "mixed sizes", "odd d")}
    together = at_one(adapters(cases), "lego", clusters=4)
    for name, case in cases.items():
        alone = at_one(adapters({name: case}), "lego", clusters=4)
        assert all(map(torch.equal, alone.factors(name), together.factors(name)))


def test_the_seed_decides_where_clusters_start():
    loaded = adapters({"x": CASES["usual"]})
    results = [dense(at_one(loaded, "lego", seed=seed), "x") for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert distance(results[2], results[0]) > 1e-3


def test_no_unit_is_closer_to_another_cluster():
    """Lloyd's fixed point, and clusters that k-means++ leaves with a sum of squares that is no
    more than that of the first units as centres."""
    points = torch.cat(units(CASES["usual"], [1.0] * 4, False), 1)
    means = lego.centroids((points @ points.T)[None], 16, 0)[0]
    labels = means.argmax(0)
    centres = torch.stack([points[labels == c].mean(0) for c in range(16)])
    squares = (points[:, None] - centres).square().sum(2)
    assert torch.equal(squares.argmin(1), labels)
    by_hand = (points[:, None] - points[:16]).square().sum(2).amin(1).sum()
    assert squares.amin(1).sum() < by_hand


def test_fewer_distinct_units_than_clusters_make_fewer_ranks():
    case = pick(CASES["shared A"], 0, 0, 0)
    merged = at_one(adapters({"x": case}), "lego", clusters=7)
    assert merged.report["x"].rank == 4
    assert distance(dense(merged, "x"), math.sqrt(4 / 7) * case.deltas()[0]) < 1e-6


def test_units_that_cancel_leave_nothing():
    case = CASES["one row"]
    a, b = case.a[0], case.b[0]
    pair = [from_tensors({"x": (s * a, s * b)}) for s in (1, -1)]
    merged = at_one(pair, "lego")
    assert not dense(merged, "x").any()
    assert merged.report["x"].rank == 1


# All of them


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_nothing_out(method):
    assert not dense(at_one(adapters({"x": EQUAL["all zero"]}), method), "x").any()
    settings = Settings(1.0, torch.float32, "auto")
    run = prepared(choose(method, {}), [], settings)
    assert run([], settings) == []


def test_multislerp_of_many_that_are_nothing_is_nothing():
    merged = at_one(adapters({"x": pick(CASES["all zero"], 0, 1, 0)}), "multislerp")
    assert not dense(merged, "x").any()


@every_backend
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_comes_back(method, backend):
    """With its weight, except where only the weights' ratio counts."""
    case = CASES["one adapter"]
    merged = at_one(adapters({"x": case}), method, weights=[-3], backend=backend)
    factor = 1 if method in ("slerp", "multislerp") else -3
    assert distance(dense(merged, "x"), factor * case.deltas()[0]) < 1e-6
    assert merged.report["x"].rank == case.ranks[0]


# What test_methods.py asks of every method, with inputs that slerp and robust take

TWO_OF_ONE_RANK = {
    name: pick(EQUAL[name], 0, 1) for name in ("odd d", "d below R", "shared A", "weak rows")
}


@every_backend
@pytest.mark.parametrize("method", ["slerp", "robust"])
def test_the_order_of_the_adapters_does_not_matter(method, backend):
    cases = TWO_OF_ONE_RANK
    loaded = adapters(cases)
    first = at_one(loaded, method, weights=[1, -0.5], backend=backend)
    second = at_one(loaded[::-1], method, weights=[-0.5, 1], backend=backend)
    for name in cases:
        assert distance(dense(second, name), dense(first, name)) < 1e-5


@every_backend
@pytest.mark.parametrize("method", ["slerp", "robust"])
def test_adapters_of_weight_zero_and_missing_modules_are_absent(method, backend):
    case = pick(EQUAL["odd d"], 0, 1)
    loaded = adapters({"x": case, "y": case})
    extra = from_tensors({"x": loaded[0].factors("x"), "z": loaded[0].factors("x")})
    partial = from_tensors({"y": loaded[1].factors("y")}, case.scalings[1])
    options = {"backend": backend}
    merged = at_one([loaded[0], extra, partial], method, weights=[2, 0, -1], **options)
    assert merged.names == ("x", "y")
    both = at_one(loaded, method, weights=[2, -1], **options)
    assert all(map(torch.equal, merged.factors("y"), both.factors("y")))
    factor = 1 if method == "slerp" else 2
    assert distance(dense(merged, "x"), factor * case.deltas()[0]) < 1e-6


@every_backend
@pytest.mark.parametrize("method", ["slerp", "robust"])
def test_slerp_and_robust_can_be_cut(method, backend):
    cases = TWO_OF_ONE_RANK
    exact = at_one(adapters(cases), method, backend=backend)
    by_energy = at_one(adapters(cases), method, energy=0.9, backend=backend)
    by_rank = at_one(adapters(cases), method, energy=0.9, rank=1, backend=backend)
    for name in cases:
        u, s, vh = torch.linalg.svd(dense(exact, name), full_matrices=False)
        squares = s.square()
        k = 1 + int((squares.cumsum(0) < 0.9 * squares.sum()).sum())
        assert by_energy.report[name].rank == k
        assert distance(dense(by_energy, name), u[:, :k] @ s[:k].diag() @ vh[:k]) < 1e-4
        assert distance(dense(by_rank, name), u[:, :1] @ s[:1].diag() @ vh[:1]) < 1e-4
