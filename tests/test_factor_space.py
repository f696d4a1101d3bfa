"""Methods in orthonormal coordinates against their dense definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.close import assert_close, distance
from support.merges import LEVELLING, adapters, at_one, dense, merge_all
from support.shapes import CASES, Case, random_case
from torch import Tensor

from domerge_fast.backends import registry
from domerge_fast.methods import choose
from domerge_fast.methods.base import Settings
from domerge_fast.methods.running import prepared
from domerge_fast.methods.spectral.space import NOISE, SUPPORT

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
SETTINGS = Settings(1.0, torch.float32, "auto")
DENSE: dict[str, Callable[..., Tensor]] = {}
OPTIONS = {
    "tsvm": [{}, {"power": 0.5}, {"power": 0.0}],
    "dc_merge": [{}, {"smoothing": "linear"}, {"smoothing": "none", "entries": 3.0}],
    "iso_c": [{}],
    "iso_cts": [{}, {"common": 0.5}, {"common": 0.0}, {"common": 1.0}],
    "subspace_boost": [{}, {"beta": 0.3}, {"beta": 0.0}],
    "wudi": [{}, {"ridge": 0.5}, {"ridge": 0.0}],
    "pico": [{}],
    "cat": [{}],
    "linear": [{}, {"power": 0.5}, {"power": 0.0}],
    "doge": [{}, {"subspace": 0.4, "eta": 1.0, "damping": 0.03}],
}
RUNS = [pytest.param(m, o, id=f"{m} {o}") for m, options in OPTIONS.items() for o in options]


def updates(case: Case, weights: Sequence[float]) -> list[Tensor]:
    return [w * delta for w, delta in zip(weights, case.deltas(), strict=True)]


# The definitions, dense. Each takes the updates τ_i with the case's weights, and the case.


def definition(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    DENSE[function.__name__] = function
    return function


def spectrum(update: Tensor, size: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T without the singular values that are noise of something of norm `size`."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    k = int((s > NOISE * size).sum())
    return u[:, :k], s[:k], vh[:k]


def orth(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, on the span of x."""
    if not x.shape[1]:
        return x
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = int((s > SUPPORT * s[0]).sum())
    return u[:, :k] @ vh[:k]


def mean(s: Tensor) -> float:
    return float(s.mean()) if len(s) else 0.0


def raised(merged: Tensor, size: Tensor | float, power: float) -> Tensor:
    """The singular values to a power, the norm kept. size: of what it was merged from."""
    if power == 1:
        return merged
    u, s, vh = spectrum(merged, size)
    values = s**power
    return u @ (values * s.norm() / values.norm()).diag() @ vh


@definition
def cat(deltas: Sequence[Tensor], case: Case) -> Tensor:
    return torch.stack(list(deltas)).sum(0)


@definition
def linear(deltas: Sequence[Tensor], case: Case, power: float = 1.0) -> Tensor:
    return raised(cat(deltas, case), sum(delta.norm() for delta in deltas), power)


@definition
def tsvm(deltas: Sequence[Tensor], case: Case, power: float = 1.0) -> Tensor:
    u, s, vh = zip(*(spectrum(delta, delta.norm()) for delta in deltas))
    merged = orth(torch.cat(u, 1)) @ torch.cat(s).diag() @ orth(torch.cat(vh).T).T
    return raised(merged, torch.cat(s).norm(), power)


@definition
def dc_merge(
    deltas: Sequence[Tensor], case: Case, smoothing: str = "mean", entries: float = 1.0
) -> Tensor:
    parts = [spectrum(delta, delta.norm()) for delta in deltas]
    ranks = [min(r, *delta.shape) for r, delta in zip(case.ranks_read, deltas)]
    left, right = (
        orth(torch.cat([u for u, *_ in parts], 1)),
        orth(torch.cat([v.T for *_, v in parts], 1)),
    )
    mask = torch.block_diag(*(torch.ones(len(s), len(s), dtype=torch.bool) for _, s, _ in parts))
    kept = []
    for (u, s, vh), rank in zip(parts, ranks):
        inside = left.T @ u @ smoothed(s, smoothing).diag() @ vh @ right
        count = min(round(entries * rank), inside.numel())
        least = inside.abs().flatten().sort().values[-count] if count else 0.0
        kept.append(torch.where(inside.abs() >= (1 - 1e-9) * least, inside, 0.0))
    total = sum(kept)
    noise = NOISE * sum(x.abs() for x in kept)
    agreeing = [(x.sign() == total.sign()) & (total.abs() > noise) for x in kept]
    chosen = sum(x * yes for x, yes in zip(kept, agreeing))
    return left @ (mask * chosen / sum(yes.double() for yes in agreeing).clamp_min(1)) @ right.T


def smoothed(s: Tensor, smoothing: str) -> Tensor:
    if smoothing == "none" or not len(s):
        return s
    ratio = min(5.0, float(s[0] / s[-1])) if smoothing == "linear" else 1.0
    shape = torch.linspace(ratio, 1, len(s), dtype=torch.float64)
    return s.sum() * shape / shape.sum()


@definition
def iso_c(deltas: Sequence[Tensor], case: Case) -> Tensor:
    u, s, vh = spectrum(cat(deltas, case), sum(delta.norm() for delta in deltas))
    return mean(s) * u @ vh


@definition
def iso_cts(deltas: Sequence[Tensor], case: Case, common: float = 0.8) -> Tensor:
    u, s, vh = spectrum(cat(deltas, case), sum(delta.norm() for delta in deltas))
    own = min(round((len(s) - int(common * len(s))) / len(deltas)), len(s) // len(deltas))
    k = len(s) - own * len(deltas)
    parts = [(u[:, :k], s[:k], vh[:k])]
    for delta in deltas:
        rest = delta - u[:, :k] @ u[:, :k].T @ delta
        ui, si, vhi = spectrum(rest, delta.norm())
        parts.append((ui[:, :own], si[:own], vhi[:own]))
    u, s, vh = zip(*parts)
    return mean(torch.cat(s)) * orth(torch.cat(u, 1)) @ orth(torch.cat(vh).T).T


@definition
def subspace_boost(deltas: Sequence[Tensor], case: Case, beta: float = 0.01) -> Tensor:
    u, s, vh = spectrum(cat(deltas, case), sum(delta.norm() for delta in deltas))
    if not len(s):
        return cat(deltas, case)
    k = next(k for k in range(len(s)) if s[: k + 1].sum() >= beta * s.sum())
    return u @ s.clamp_min(float(s[k])).diag() @ vh


@definition
def wudi(deltas: Sequence[Tensor], case: Case, ridge: float = 1e-3) -> Tensor:
    units = [(delta, delta / delta.norm()) for delta in deltas if delta.norm() > 0]
    pull = ridge * torch.eye(case.a[0].shape[1], dtype=torch.float64)
    reads = sum((unit.T @ unit for _, unit in units), pull)
    sums = sum((delta @ unit.T @ unit for delta, unit in units), ridge * cat(deltas, case))
    return sums @ torch.linalg.pinv(reads, rtol=SUPPORT**2, hermitian=True)


@definition
def pico(deltas: Sequence[Tensor], case: Case) -> Tensor:
    u, s, vh = torch.linalg.svd(torch.cat([b.double() for b in case.b], 1), full_matrices=False)
    share = s.square() / s.square().sum() if s.any() else s
    alpha = 1 / (1 + (len(deltas) - 1) * share)
    b = (u @ (alpha * s).diag() @ vh).split(list(case.ranks), 1)
    gains = [w * c for w, c in zip(case.weights, case.scalings, strict=True)]
    merged = sum(g * bi @ a.double() for g, bi, a in zip(gains, b, case.a, strict=True))
    size = torch.stack([delta.norm() for delta in deltas]).mean()
    return merged * size / merged.norm() if merged.any() else merged


@definition
def doge(
    deltas: Sequence[Tensor],
    case: Case,
    eta: float = 0.3,
    subspace: float = 1 / 6,
    damping: float = 0.1,
) -> Tensor:
    """With the gradient of the loss by autograd, and conjugate gradients on [m, n]."""
    own = [delta / w for delta, w in zip(deltas, case.weights)]
    if len(deltas) == 1 or not any(x.any() for x in own):
        return deltas[0]
    mean = sum(x.norm() for x in own) / sum(bool(x.any()) for x in own)
    begin = sum(eta * mean / x.norm() * d for d, x in zip(deltas, own) if x.any())
    units = [torch.nn.functional.normalize(d, dim=1, eps=1e-300) for d in deltas]
    shared = shared_left(deltas, subspace)
    if shared.shape[1] == len(begin):
        return begin

    def off(x: Tensor) -> Tensor:
        return x - shared @ (shared.T @ x)

    def loss(x: Tensor) -> Tensor:
        rows = [(unit * (d - begin - off(x))).sum(1) for unit, d in zip(units, deltas)]
        return torch.stack(rows).square().sum() + damping * off(x).square().sum()

    return begin + off(least(loss, torch.zeros_like(begin)))


def shared_left(deltas: Sequence[Tensor], share: float) -> Tensor:
    """The first left singular vectors of all those of the updates; none of equal ones."""
    left = torch.cat([spectrum(d, d.norm())[0] for d in deltas], 1)
    u, s, _ = torch.linalg.svd(left, full_matrices=False)
    values = [*s.square().tolist(), 0.0]
    k = min(round(share * left.shape[1]), len(s))
    while k and values[k - 1] - values[k] <= 1e-6 * values[0]:
        k -= 1
    return u[:, :k]


def least(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Where a quadratic loss is least, by conjugate gradients."""

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    first = slope(x)
    gradient, along = first, -first
    while gradient.norm() > 1e-10 * first.norm():
        change = slope(along) - first
        x = x - (gradient * along).sum() / (along * change).sum() * along
        following = slope(x)
        along = following.square().sum() / gradient.square().sum() * along - following
        gradient = following
    return x


# Against the definitions


@pytest.mark.parametrize(("method", "options"), RUNS)
def test_a_method_is_its_dense_definition(method, options):
    merged = merge_all(CASES, method, scale=-0.3, backend="torch", **options)
    for name, case in CASES.items():
        expected = -0.3 * DENSE[method](updates(case, case.weights), case, **options)
        assert_close(dense(merged, name), expected, 1e-5, name=name)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("method", DENSE)
def test_modules_of_any_shapes_and_backends_merge_together(method, backend):
    """Some of the same ranks in one batch, some not."""
    cases = {f"{n}x{m}": random_case((3, 5, 2), n, m, n) for n, m in ((61, 33), (40, 50), (7, 5))}
    cases |= {name: CASES[name] for name in ("odd d", "d below R", "duplicated", "mixed sizes")}
    merged = at_one(adapters(cases), method, weights=[1, -0.5, 2], backend=backend)
    for name, case in cases.items():
        expected = DENSE[method](updates(case, case.weights), case)
        assert distance(dense(merged, name), expected) < 1e-5, name


@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts", "wudi"])
def test_an_adapter_that_is_given_twice_adds_no_direction(method):
    case = CASES["odd d"]
    loaded = adapters({"x": case})
    once = dense(at_one(loaded, method, weights=[2, 1, 1]), "x")
    twice = dense(at_one([loaded[0], *loaded], method), "x")
    for merged in (once, twice):
        assert torch.linalg.matrix_rank(merged, rtol=1e-5) == sum(case.ranks)
    if method == "iso_c":
        assert distance(twice, once) < 1e-5


@pytest.mark.parametrize("method", ["tsvm", "wudi", "pico", "cat"])
@pytest.mark.parametrize("name", ["one adapter", "one row"])
def test_one_adapter_comes_back_with_its_weight(name, method):
    case = CASES[name]
    merged = at_one(adapters({"x": case}), method, weights=[-3])
    assert distance(dense(merged, "x"), -3 * case.deltas()[0]) < 1e-6
    assert merged.report["x"].rank == case.ranks[0]


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_one_adapter_is_made_isotropic(method):
    case = CASES["one adapter"]
    merged = at_one(adapters({"x": case}), method, weights=[-3])
    u, s, vh = torch.linalg.svd(-3 * case.deltas()[0], full_matrices=False)
    expected = s[:4].mean() * u[:, :4] @ vh[:4]
    assert distance(dense(merged, "x"), expected) < 1e-6
    assert merged.report["x"].rank == 4


@pytest.mark.parametrize("method", ["linear", "tsvm"])
@pytest.mark.parametrize("power", [0.5, 0.0])
def test_a_power_keeps_the_norm_and_changes_one_adapter_too(method, power):
    case = CASES["one adapter"]
    merged = dense(at_one(adapters({"x": case}), method, power=power, weights=[-3]), "x")
    u, s, vh = torch.linalg.svd(-3 * case.deltas()[0], full_matrices=False)
    expected = u[:, :4] @ (s[:4] ** power).diag() @ vh[:4]
    assert distance(merged, expected * s.norm() / expected.norm()) < 1e-6
    assert distance(merged, -3 * case.deltas()[0]) > 0.1


@pytest.mark.parametrize("method", ["linear", "tsvm"])
def test_opposite_adapters_leave_nothing_to_raise(method):
    (adapter,) = adapters({"x": CASES["one adapter"]})
    merged = at_one([adapter, adapter], method, power=0.0, weights=[1, -1], dtype="float32")
    size = float(CASES["one adapter"].deltas()[0].norm())
    assert float(dense(merged, "x").norm()) < 1e-6 * size


def test_vectors_that_depend_on_each_other_and_others_in_one_batch():
    cases = {"apart": random_case((4, 4, 4), 37, 31, 1), "shared A": CASES["shared A"]}
    merged = merge_all(cases, "tsvm", power=0.5)
    for name, case in cases.items():
        expected = tsvm(updates(case, case.weights), case, 0.5)
        assert_close(dense(merged, name), expected, 1e-5, name=name)
    own = [spectrum(d, d.norm())[1] for d in updates(cases["apart"], [1, -0.5, 2])]
    values = torch.cat(own).sort(descending=True).values.sqrt()
    found = torch.linalg.svdvals(dense(merged, "apart"))[:12]
    assert_close(found / found.norm(), values / values.norm(), 1e-5)


def test_dc_merge_of_adapters_that_do_not_meet_is_tsvm_of_smoothed_ones():
    case = random_case((4, 4), 20, 16)
    case.b[0][8:], case.b[1][:8] = 0, 0
    case.a[0][:, 10:], case.a[1][:, :10] = 0, 0
    loaded = adapters({"x": case})
    merged = at_one(loaded, "dc_merge", weights=[1, -2])
    expected = at_one(loaded, "tsvm", weights=[1, -2], pre=["smooth"])
    assert distance(dense(merged, "x"), dense(expected, "x")) < 1e-5


@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts", "wudi", "dc_merge", "doge"])
def test_how_an_update_is_split_into_factors_does_not_matter(method):
    case = CASES["usual"]
    generator = torch.Generator().manual_seed(1)
    mixed = Case([], [], case.scalings)
    for a, b in zip(case.a, case.b, strict=True):
        mixer = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        mixed.a.append((mixer @ a.double()).float())
        mixed.b.append((b.double() @ torch.linalg.inv(mixer)).float())
    expected, result = (
        dense(at_one(adapters({"x": c}), method, dtype="float32"), "x") for c in (case, mixed)
    )
    assert distance(result, expected) < 1e-4


def test_pico_depends_on_the_split():
    case = CASES["usual"]
    moved = Case([a / (i + 1) for i, a in enumerate(case.a)], [], case.scalings)
    moved.b.extend((i + 1) * b for i, b in enumerate(case.b))
    expected, result = (dense(at_one(adapters({"x": c}), "pico"), "x") for c in (case, moved))
    assert distance(result, expected) > 1e-2


def test_wudi_is_the_minimum_and_its_ridge_leads_to_the_sum():
    case = CASES["usual"]
    loaded = adapters({"x": case})
    deltas = case.deltas()
    total = torch.stack(deltas).sum(0)

    def interference(update: Tensor, ridge: float) -> Tensor:
        parts = [((update - d) @ d.T).square().sum() / d.square().sum() for d in deltas]
        return torch.stack(parts).sum() + ridge * (update - total).square().sum()

    merged = dense(at_one(loaded, "wudi", ridge=0.01), "x").requires_grad_()
    (slope,) = torch.autograd.grad(interference(merged, 0.01), merged)
    start = total.clone().requires_grad_()
    (steepest,) = torch.autograd.grad(interference(start, 0.01), start)
    assert slope.norm() < 1e-5 * steepest.norm()
    assert distance(dense(at_one(loaded, "wudi", ridge=1e6), "x"), total) < 1e-5


@pytest.mark.parametrize("method", DENSE)
def test_nothing_in_nothing_out(method):
    merged = at_one(adapters({"x": CASES["all zero"]}), method)
    assert not dense(merged, "x").any()
    run = prepared(choose(method, {}), [], SETTINGS)
    assert run([], SETTINGS) == []


@pytest.mark.parametrize("method", DENSE)
def test_opposite_adapters_leave_no_noise_behind(method):
    """τ - τ: the sums are nothing, and rounding noise is not blown up to the size of something."""
    loaded = adapters({"x": CASES["one adapter"]})
    merged = at_one([loaded[0], loaded[0]], method, weights=[1, -1], dtype="float32")
    size = float(CASES["one adapter"].deltas()[0].norm())
    assert float(dense(merged, "x").norm()) < 1e-6 * size
    if method in LEVELLING:
        assert merged.report["x"].rank == 1


def test_an_adapter_within_the_common_directions_has_none_of_its_own():
    """Inputs and outputs apart: all of the strong adapter's directions are common, and no other."""
    case = random_case((4, 4), 20, 16)
    case.b[0][8:], case.b[1][:8] = 0, 0
    case.a[0][:, 10:], case.a[1][:, :10] = 0, 0
    case.a[1] *= 1e-3
    merged = at_one(adapters({"x": case}), "iso_cts", common=0.5)
    assert distance(dense(merged, "x"), iso_cts(case.deltas(), case, 0.5)) < 1e-5
    assert merged.report["x"].rank == 6


def test_a_direction_without_strength_is_left_out():
    """Three adapters that share their A: no more than its rank is left of the sum of theirs."""
    merged = at_one(adapters({"x": CASES["shared A"]}), "iso_c")
    a, b = merged.factors("x")
    assert merged.report["x"].rank == len(a) == 4
    assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("method", [name for name in DENSE if name not in ("cat", "linear")])
@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (6, 6), (30, 5)])
def test_the_rank_is_never_above_the_module_s(n, m, method):
    case = random_case((4, 5, 3), n, m)
    merged = at_one(adapters({"x": case}), method, weights=case.weights)
    expected = DENSE[method](updates(case, case.weights), case)
    assert distance(dense(merged, "x"), expected) < 1e-5
    assert merged.report["x"].rank == min(n, m)
