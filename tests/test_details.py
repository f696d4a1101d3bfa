"""What a report tells module by module, against its dense formulas."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from support.make import random_factors
from test_interference import MODULES, adapter, cosine, deltas, overlap, owned
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter
from domerge_fast.engine import details
from domerge_fast.formats import from_tensors

COUNT = 3
GIVEN = [owned(i) for i in range(COUNT)]
UPDATES = [deltas(x) for x in GIVEN]


def loaded() -> list[Adapter]:
    return [adapter(x, f"{i}") for i, x in enumerate(GIVEN)]


def energies(modules: list[Tensor]) -> list[float]:
    """Sums over matrices of σ_k^2, the largest first."""
    found = [torch.linalg.svdvals(x.double()).square() for x in modules]
    longest = max(map(len, found))
    rows = [torch.cat([x, torch.zeros(longest - len(x)).double()]) for x in found]
    return torch.stack(rows).sum(0).tolist()


def assert_energies(found: tuple[float, ...], expected: list[float]) -> None:
    """What is beyond the rank is 0, and so it is where it was counted."""
    size = sum(expected)
    for one, other in itertools.zip_longest(found, expected, fillvalue=0.0):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6 * size)


def test_overlaps_of_every_module():
    found = dm.inspect(loaded(), report="details").details
    assert set(found.modules) == {name for name in MODULES if name in GIVEN[1]}
    for name, told in found.modules.items():
        owners = [i for i in range(COUNT) if name in GIVEN[i]]
        pairs = list(itertools.combinations(owners, 2))
        ones = [{name: GIVEN[i][name]} if i in owners else {} for i in range(COUNT)]
        for side, value in enumerate((told.rows, told.columns)):
            means = [overlap(ones[i], ones[j], side) for i, j in pairs]
            assert value == pytest.approx(statistics.fmean(means), rel=1e-5)
        cosines = {(i, j): cosine(UPDATES[i][name], UPDATES[j][name]) for i, j in pairs}
        assert told.cosine == pytest.approx(statistics.fmean(map(abs, cosines.values())), rel=1e-4)
        assert told.pair == max(cosines, key=lambda pair: abs(cosines[pair]))
        assert told.strongest == pytest.approx(cosines[told.pair], rel=1e-4)


def test_spectra_of_the_adapters():
    found = dm.inspect(loaded(), report="details").details
    assert found.sampled == len(MODULES)
    for told, update in zip(found.energies, UPDATES, strict=True):
        assert_energies(told, energies(list(update.values())))


def test_spectra_are_of_a_sample(monkeypatch):
    monkeypatch.setattr(details, "MOST_SPECTRA", 2)
    found = dm.inspect(loaded(), report="details").details
    names = sorted(MODULES)[::3]
    assert found.sampled == len(names) == 2
    for told, update in zip(found.energies, UPDATES, strict=True):
        assert_energies(told, energies([update[n] for n in names if n in update]))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("do", {}),
        ("linear", {"weights": [1.0, -2.0, 0.5]}),
        ("tsvm", {}),
        ("svd", {"rank": 2}),
        ("linear", {"pre": ["equalize"]}),
        ("ties", {}),
        ("ties", {"form": "deltas"}),
        ("slerp", {"scale": 2.0, "base": 2}),
    ],
)
def test_shares_and_spectrum_of_the_merge(method, options):
    options = dict(options)
    few = options.pop("base", COUNT)
    report_of = dm.merge(loaded()[:few], method, report="details", **options)
    report = report_of.report
    merged = {name: report_of.delta(name).double() for name in report_of.names}
    for name in report_of.names:
        told = report[name].shares
        assert [*told] == [str(i) for i in range(few) if name in GIVEN[i]]
        for key, share in told.items():
            update = UPDATES[int(key)][name]
            size = merged[name].norm() / update.norm()
            expected = (merged[name] * update).sum() / update.norm() ** 2
            assert share == pytest.approx(float(expected), abs=1e-5 * float(size) + 1e-9)
    if options.get("form") == "deltas":
        assert report.energies is None
    else:
        assert_energies(report.energies, energies(list(merged.values())))


@pytest.mark.parametrize("sizes", [(1e-20, 1e20), (1e-12, 1.0), (1.0, 1e9)])
def test_shares_of_adapters_far_from_one(sizes):
    shapes = {"x": (40, 56), "y": (9, 7)}
    factors = [random_factors(shapes, 4, seed=i) for i in range(2)]
    factors[1] = {n: (sizes[0] * a, sizes[1] * b) for n, (a, b) in factors[1].items()}
    given = [from_tensors(f, name=f"{i}") for i, f in enumerate(factors)]
    merged = dm.merge(given, "linear", report="details")
    for name in shapes:
        delta = merged.delta(name).double()
        for share, own in zip(merged.report[name].shares.values(), factors, strict=True):
            a, b = (x.double() for x in own[name])
            expected = (delta * (b @ a)).sum() / (b @ a).norm() ** 2
            assert share == pytest.approx(float(expected), rel=1e-4)


def test_modules_alike_are_told_apart():
    shapes = {f"layers.{i}.q_proj": (24, 32) for i in range(6)}
    given = [from_tensors(random_factors(shapes, 4, seed=i), name=f"{i}") for i in range(2)]
    merged = dm.merge(given, "do", report="details")
    for name in shapes:
        delta = merged.delta(name).double()
        for share, own in zip(merged.report[name].shares.values(), given, strict=True):
            a, b = (x.double() for x in own.factors(name))
            expected = (delta * (b @ a)).sum() / (b @ a).norm() ** 2
            assert share == pytest.approx(float(expected), rel=1e-4)


def test_without_details_there_are_none():
    report = dm.merge(loaded(), "do").report
    assert report.interference.details is None
    assert report.energies is None
    assert all(module.shares == {} for module in report.modules.values())
    assert dm.inspect(loaded()).details is None


def test_details_are_not_prepared():
    with pytest.raises(dm.OptionError, match="'details' are of a merge"):
        dm.prepare(loaded(), "linear", report="details")
