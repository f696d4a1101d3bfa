"""The elementwise methods against PEFT, mergekit and dense definitions, in float64.

Rivals get the same random numbers: torch.bernoulli is replaced by those that entries.py defines.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from peft.utils import merge_utils
from support.close import assert_close, assert_within, distance
from support.merges import at_one
from support.on_device import AVAILABLE, split
from support.shapes import CASES, random_case
from test_entries import numbers
from torch import Tensor

import domerge_fast as dm
from domerge_fast import OptionError
from domerge_fast.adapters import Adapter
from domerge_fast.adapters.plan import Plan
from domerge_fast.engine import reader
from domerge_fast.formats import from_tensors
from domerge_fast.methods import choose
from domerge_fast.methods.base import Settings
from domerge_fast.methods.running import prepared

WEIGHTS = [1.0, -0.5, 2.0]
SCALE = -1.5
SEED = 5
TINY = 1e-5  # of an entry
DENSITIES = (0.0, TINY, 0.2, 0.77, 1.0)
NAMES = ("odd d", "d below R", "duplicated", "mixed sizes")
MISSING = {(1, "odd d"), (0, "mixed sizes")}

pytestmark = pytest.mark.filterwarnings("ignore:The density 1:UserWarning")
every_backend = pytest.mark.parametrize("backend", AVAILABLE)

Taus = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Library:
    """Adapters, and for every module the τ_i [m, n] in float64 by the adapter's place."""

    adapters: list[Adapter]
    taus: dict[str, Taus]


def library(count: int, dtype: torch.dtype = torch.float32) -> Library:
    taus: dict[str, Taus] = {}
    adapters = []
    for i in range(count):
        cases = {name: CASES[name] for name in NAMES if (i, name) not in MISSING}
        factors = {name: (c.a[i].to(dtype), c.b[i].to(dtype)) for name, c in cases.items()}
        scalings = {name: c.scalings[i] for name, c in cases.items()}
        adapters.append(from_tensors(factors, scalings, name=f"adapter-{i}"))
        for name, (a, b) in factors.items():
            taus.setdefault(name, {})[i] = scalings[name] * b.double() @ a.double()
    return Library(adapters, taus)


LIBRARIES = {
    "float32": library(3),
    "bfloat16": library(3, torch.bfloat16),
    "one adapter": library(1),
}
every_library = pytest.mark.parametrize("of", LIBRARIES)


def merge(adapters: Sequence[Adapter], method: str, backend: str, **options: object) -> dm.Merged:
    name, device = split(backend)
    return at_one(adapters, method, form="deltas", backend=name, device=device, **options)


def check(
    lib: Library,
    expected: Callable[[str, Taus, list[float]], Tensor],
    method: str,
    backend: str,
    **options: object,
) -> None:
    """The merge of every module is what is expected(name, its τ_i, their weights)."""
    weights = WEIGHTS[: len(lib.adapters)]
    merged = merge(lib.adapters, method, backend, weights=weights, scale=SCALE, **options)
    assert set(merged.names) == set(lib.taus)
    for name, taus in lib.taus.items():
        found = merged.delta(name).cpu()
        assert found.dtype == torch.float32
        wanted = SCALE * expected(name, taus, [weights[i] for i in taus])
        assert distance(found, wanted) < 1e-6, (name, options)


def drawn(name: str, taus: Taus) -> dict[int, Tensor]:
    """The random numbers of a module's entries [m, n], by the adapter's place."""
    module = zlib.crc32(name.encode())
    return {i: numbers(SEED, module, i, *tau.shape) for i, tau in taus.items()}


@pytest.fixture
def dice(monkeypatch) -> Callable[[str, Taus], None]:
    """dice(name, taus): the next draws of torch.bernoulli are those of the module's entries."""
    rolls: Iterator[Tensor] = iter(())

    def bernoulli(p: Tensor) -> Tensor:
        return (next(rolls) < p.float()).to(p.dtype)

    def load(name: str, taus: Taus) -> None:
        nonlocal rolls
        rolls = iter(drawn(name, taus).values())

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return load


# PEFT

OF_PEFT = [
    ("ties", {}),
    ("ties", {"majority_sign_method": "frequency"}),
    ("ties", {"conventions": "paper", "scope": "tensor"}),
    ("dare", {}),
    ("dare", {"conventions": "paper"}),
    ("dare_ties", {}),
    ("dare_ties", {"majority_sign_method": "frequency", "conventions": "paper"}),
    ("magnitude_prune", {}),
]


@every_backend
@every_library
@pytest.mark.parametrize(("method", "options"), OF_PEFT, ids=str)
def test_it_is_what_peft_computes(method, options, of, backend, dice):
    theirs = getattr(merge_utils, "dare_linear" if method == "dare" else method)
    vote = {k: v for k, v in options.items() if k == "majority_sign_method"}
    random = {"seed": SEED} if "dare" in method else {}
    for density in DENSITIES if of == "float32" else (0.3,):
        if density == 0 and random:
            continue  # PEFT divides by it

        def expected(name: str, taus: Taus, weights: list[float], density=density) -> Tensor:
            dice(name, taus)
            given = torch.tensor(weights, dtype=torch.float64)
            return theirs(list(taus.values()), given, density, **vote)

        check(LIBRARIES[of], expected, method, backend, density=density, **options, **random)


@every_backend
@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_where_every_entry_is_dropped_nothing_is_left(method, backend):
    merged = merge(LIBRARIES["float32"].adapters, method, backend, density=0.0)
    for name in merged.names:
        assert not merged.delta(name).any()


# mergekit

OF_MERGEKIT = [
    ("ties", {}, {}),
    ("ties", {"majority_sign_method": "frequency"}, {}),
    ("dare", {}, {}),
    ("dare_ties", {}, {}),
    ("dare_ties", {"majority_sign_method": "frequency"}, {}),
    ("della", {"epsilon": 0.15}, {"epsilon": 0.15}),
    ("della", {"majority_sign_method": "frequency", "epsilon": 0.01}, {"epsilon": 0.01}),
    ("della", {"epsilon": 0.0}, {"epsilon": 0.0}),
    *(("breadcrumbs", {"outliers": x}, {"gamma": x}) for x in (0.0, 0.01, 0.3, 1.0)),
]


@every_backend
@every_library
@pytest.mark.parametrize(("method", "options", "theirs"), OF_MERGEKIT, ids=str)
def test_it_is_what_mergekit_computes(method, options, theirs, of, backend, dice):
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    base = pytest.importorskip("mergekit.merge_methods.base")
    rival = registry.get("dare_linear" if method == "dare" else method)
    if options.get("majority_sign_method") == "frequency":
        rival = dataclasses.replace(rival, consensus_method=arithmetic.ConsensusMethod.count)
    given = dict(options)
    if method != "breadcrumbs":
        given["conventions"] = "mergekit"
    if method in ("dare", "dare_ties", "della"):
        given["seed"] = SEED
    least = 0.2 if method == "della" else 0.0
    for density in DENSITIES if of == "float32" else (0.3,):
        if 0 < density < least:
            continue  # density - epsilon would not be a probability

        def expected(name: str, taus: Taus, weights: list[float], density=density) -> Tensor:
            dice(name, taus)
            zero = torch.zeros_like(next(iter(taus.values())))
            group = base.TensorGroup.from_tensors([zero, *taus.values()], base_index=0)
            parameters = {
                key: dict.fromkeys(range(1, len(taus) + 1), value)
                for key, value in (("density", density), *theirs.items())
            }
            return rival.merge_group(
                group,
                weight=dict(enumerate(weights, 1)),
                normalize=rival.default_normalize,
                rescale=rival.default_rescale,
                int8_mask=False,
                **{"lambda": 1.0},
                **parameters,
            )

        check(LIBRARIES[of], expected, method, backend, density=density, **given)


# The papers


def elected_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean over the values with the sign of their sum."""
    v = torch.stack(list(values))
    agree = torch.where(v.sum(0) >= 0, v > 0, v < 0)
    w = torch.tensor(weights, dtype=v.dtype)[:, None, None]
    return (w * v * agree).sum(0) / agree.sum(0).clamp(min=1)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * v for w, v in zip(weights, values, strict=True))


def of_model(lib: Library, density: float, outliers: float = 0.0) -> dict[str, Taus]:
    """τ_i where |τ_i| is, of all modules together, among the density N that remain below the
    outliers N largest."""
    bounds = {}
    for i in range(len(lib.adapters)):
        sizes = torch.cat([taus[i].abs().flatten() for taus in lib.taus.values() if i in taus])
        count, kept = len(sizes), int(density * len(sizes))
        last = max(1, kept, count - int(outliers * count))
        low = sizes.kthvalue(last - kept + 1).values if kept else torch.inf
        bounds[i] = low, sizes.kthvalue(last).values
    return {
        name: {
            i: torch.where((tau.abs() >= bounds[i][0]) & (tau.abs() <= bounds[i][1]), tau, 0.0)
            for i, tau in taus.items()
        }
        for name, taus in lib.taus.items()
    }


@every_backend
@every_library
def test_ties_of_the_paper_trims_over_the_whole_model(of, backend):
    lib = LIBRARIES[of]
    for density in DENSITIES:
        trimmed = of_model(lib, density)
        check(
            lib,
            lambda name, taus, weights, v=trimmed: elected_mean(v[name].values(), weights),
            "ties",
            backend,
            density=density,
            conventions="paper",
        )


@every_backend
@pytest.mark.parametrize(
    ("method", "options"),
    [("magnitude_prune", {}), ("breadcrumbs", {"outliers": 0.1}), ("breadcrumbs", {"outliers": 1})],
    ids=str,
)
def test_entries_may_be_sought_in_the_whole_model(method, options, backend):
    lib = LIBRARIES["float32"]
    for density in DENSITIES:
        trimmed = of_model(lib, density, **options if density < 1 else {})
        check(
            lib,
            lambda name, taus, weights, v=trimmed: weighted_sum(v[name].values(), weights),
            method,
            backend,
            density=density,
            scope="model",
            **options,
        )


@every_backend
@every_library
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.2, 0.19), (0.7, 0.0), (1.0, 0.3)])
def test_della_of_the_paper(density, epsilon, of, backend):
    def expected(name: str, taus: Taus, weights: list[float]) -> Tensor:
        values = []
        for i, tau in taus.items():
            ranks = tau.abs().argsort(1).argsort(1)
            p = torch.full_like(tau, density)
            if density < 1:
                p += epsilon * (2 * ranks / (tau.shape[1] - 1) - 1)
            values.append(torch.where(drawn(name, taus)[i] < p.float(), tau / p, 0.0))
        return elected_mean(values, weights)

    options = {"density": density, "epsilon": epsilon, "seed": SEED}
    check(LIBRARIES[of], expected, "della", backend, **options)


@every_backend
@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_what_is_dropped_depends_on_the_seed_alone(method, backend):
    adapters = LIBRARIES["float32"].adapters

    def merged(seed: int) -> list[Tensor]:
        made = merge(adapters, method, backend, seed=seed)
        return [made.delta(name).cpu() for name in made.names]

    first = merged(1)
    torch.manual_seed(123)
    assert all(map(torch.equal, first, merged(1)))
    for seed in (2, 1 | 1 << 32, 2**63 - 1):
        assert not any(map(torch.equal, first, merged(seed)))


@every_backend
def test_dare_keeps_the_expected_sum(backend):
    case = random_case((4,), 120, 100)
    adapter = from_tensors({"x": (case.a[0], case.b[0])})
    delta = case.b[0].double() @ case.a[0].double()
    merged = merge([adapter], "dare", backend, density=0.25).delta("x").cpu().double()
    kept = merged != 0
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.02)
    assert_close(merged[kept], delta[kept] / 0.25)
    assert float((merged * delta).sum()) == pytest.approx(float(delta.square().sum()), rel=0.1)


# Thresholds


def of_bits(shape: tuple[int, int]) -> Tensor:
    """Numbers from 2^-20 to 2^57: of far smaller ones in a factor no digits are kept."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0x35800000, 0x5C000000, shape, dtype=torch.int32, generator=generator)
    return bits.view(torch.float32) * (1 - 2 * torch.randint(0, 2, shape, generator=generator))


def integers(high: int, shape: tuple[int, int] = (37, 29)) -> Tensor:
    generator = torch.Generator().manual_seed(high)
    return torch.randint(-high, high + 1, shape, generator=generator).float()


VALUES = {
    "duplicates": integers(3),
    "all equal": torch.full((7, 9), -2.5),
    "signs": integers(1),
    "mostly zeros": integers(1) * integers(2) * (integers(5) > 3),
    "zeros": torch.zeros(5, 4),
    "denormal": integers((1 << 16) - 1) * 2.0**-149,
    "around the least normal": integers(500) * 2.0**-134,
    "all sizes": of_bits((40, 30)),
    "one row": integers(100, (1, 65)),
    "one entry": torch.tensor([[-3.0]]),
}


def exactly(values: Tensor) -> Adapter:
    """The adapter whose update is these values to the bit."""
    return from_tensors({"x": (torch.eye(values.shape[1]), values)})


@every_backend
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("of", VALUES)
def test_thresholds_are_those_of_sorting(of, scope, backend):
    given = [exactly(VALUES[of])]
    values = merge(given, "magnitude_prune", backend, density=1.0).delta("x").cpu()
    if backend.startswith("torch"):  # a library may round products with the identity
        assert_within(values, VALUES[of].double(), VALUES[of].double().abs(), 2.0**-23)
    else:
        assert torch.equal(values, VALUES[of])
    ordered = values.abs().flatten().sort().values
    count = len(ordered)
    for density in (0.0, 0.01, 0.25, 0.5, 0.99, 1.0):
        kept = int(density * count)
        low = ordered[count - kept] if kept else torch.inf
        expected = torch.where(values.abs() >= low, values, 0.0)
        options = {"density": density, "scope": scope}
        found = merge(given, "magnitude_prune", backend, **options).delta("x").cpu()
        assert torch.equal(found, expected), density
        if density in (0.0, 1.0):
            continue
        first = max(0, count - kept - int(0.1 * count))
        low, high = (ordered[first], ordered[first + kept - 1]) if kept else (torch.inf, 0.0)
        expected = torch.where((values.abs() >= low) & (values.abs() <= high), values, 0.0)
        found = merge(given, "breadcrumbs", backend, outliers=0.1, **options)
        assert torch.equal(found.delta("x").cpu(), expected), density


SCOPED = ("ties", "magnitude_prune", "breadcrumbs")


@every_backend
@pytest.mark.parametrize("method", SCOPED)
def test_of_one_module_the_model_is_that_module(method, backend):
    case = CASES["odd d"]
    adapters = [
        from_tensors({"x": pair}, name=f"{i}") for i, pair in enumerate(zip(case.a, case.b))
    ]
    one, other = (
        merge(adapters, method, backend, density=0.3, scope=scope).delta("x")
        for scope in ("tensor", "model")
    )
    assert one.any()
    assert torch.equal(one, other)


@every_backend
@pytest.mark.parametrize("method", SCOPED)
def test_the_order_of_modules_and_their_groups_do_not_matter(method, backend, monkeypatch):
    name, device = split(backend)
    if device != "cpu":
        pytest.skip("what is asked of the method does not depend on the device")
    plan = Plan.make(LIBRARIES["float32"].adapters, WEIGHTS)
    stacks = [plan.stack(module) for module in plan.names]
    chosen = choose(method, {"scope": "model", "density": 0.3})
    settings = Settings(1.0, torch.float32, name)

    def merged(groups: list[list]) -> dict[str, Tensor]:
        run = prepared(chosen, groups, settings)
        results = [
            (s.name, made) for group in groups for s, made in zip(group, run(group, settings))
        ]
        return {module: made.delta for module, made in results}

    together = merged([stacks])
    for groups in ([[s] for s in reversed(stacks)], [stacks[2:], stacks[:2]]):
        apart = merged(groups)
        assert all(torch.equal(together[module], apart[module]) for module in together)
    monkeypatch.setattr(reader, "DENSE_BYTES", 1)
    options = {"scope": "model", "density": 0.3, "weights": WEIGHTS}
    whole = merge(LIBRARIES["float32"].adapters, method, backend, **options)
    assert all(torch.equal(together[module], whole.delta(module)) for module in together)


THREADED = [
    *((method, {"density": 0.3}) for method in SCOPED),
    ("dare", {"conventions": "mergekit"}),
    ("dare_ties", {}),
    ("della", {}),
]


@every_backend
@pytest.mark.parametrize(("method", "options"), THREADED, ids=str)
def test_threads_change_no_bit(method, options, backend):
    case = random_case((16, 24), 210, 190)
    adapters = [
        from_tensors({"x": pair}, name=f"{i}") for i, pair in enumerate(zip(case.a, case.b))
    ]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(merge(adapters, method, backend, **options).delta("x"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


# Factors, refusals


@every_backend
def test_an_adapter_is_cut_to_the_largest_rank_and_says_what_it_keeps(backend):
    lib = LIBRARIES["float32"]
    name, device = split(backend)
    options = {"backend": name, "device": device, "weights": WEIGHTS}
    merged = at_one(lib.adapters, "ties", **options)
    whole = merge(lib.adapters, "ties", backend, weights=WEIGHTS)
    most = max(len(adapter.factors(m)[0]) for adapter in lib.adapters for m in adapter.modules)
    for module in merged.names:
        delta = whole.delta(module).double()
        a, b = merged.factors(module)
        assert len(a) == min(most, *delta.shape)
        lost = float((delta - b.double() @ a.double()).square().sum() / delta.square().sum())
        row = merged.report[module]
        assert row.energy_kept == pytest.approx(1 - lost, abs=1e-5)
        assert row.energy == pytest.approx(float(delta.square().sum()), rel=1e-5)
        best = torch.linalg.svdvals(delta).square()
        assert 1 - lost >= 0.995 * float(best[: len(a)].sum() / best.sum())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *((m, {"density": 1.5}, "'density': 1.5 is too large; use at most 1") for m in SCOPED),
        ("dare", {"density": -0.1}, "'density': -0.1 is too small; use at least 0"),
        ("dare_ties", {"density": "half"}, "'density': 'half' is not a finite number"),
        ("breadcrumbs", {"outliers": 1.1}, "'outliers': 1.1 is too large; use at most 1"),
        ("della", {"epsilon": 0.5}, r"'epsilon': 0.5 takes probabilities 0.5 ± 0.5 out of (0, 1)"),
        ("della", {"density": 0.9}, "'epsilon': 0.15 takes probabilities 0.9 ± 0.15 out of"),
        ("della", {"epsilon": -0.1}, "'epsilon': -0.1 is too small; use at least 0"),
        ("della", {"conventions": "peft"}, "'peft' is not known; use one of: paper, mergekit"),
        ("ties", {"conventions": "mergkit"}, "'mergkit' is not known; did you mean 'mergekit'?"),
        ("ties", {"scope": "module"}, "'scope': 'module' is not known; did you mean 'model'?"),
        ("ties", {"majority_sign_method": "mean"}, "use one of: total, frequency"),
        ("dare", {"seed": -1}, "'seed': -1 is too small; use at least 0"),
        ("dare", {"seed": 2**63}, "'seed': 9223372036854775808 is too large"),
        ("dare", {"scope": "model"}, "'scope': method 'dare' has no such option"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(method, options, message):
    with pytest.raises(OptionError) as error:
        at_one(LIBRARIES["float32"].adapters, method, form="deltas", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
