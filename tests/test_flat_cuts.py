"""A cut between equal singular values is refused; without one, the order of adapters has no say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.close import distance
from support.make import random_factors, write_adapter
from support.merges import LEVELLING, at_one, dense

import domerge_fast as dm
from domerge_fast import FlatCut, ops
from domerge_fast.adapters import Adapter
from domerge_fast.algebra.cuts import check_cut
from domerge_fast.backends import registry
from domerge_fast.cli import main as cli
from domerge_fast.methods import TABLE

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
BY_ORDER = ("opcm", "dare", "dare_ties", "della")  # in order; draws keyed by position
SHAPES = {"q": (48, 32), "up": (30, 40)}


def adapters(count: int = 3, rank: int = 4) -> list[Adapter]:
    return [
        dm.from_tensors(random_factors(SHAPES, rank, seed=k), name=f"a{k}") for k in range(count)
    ]


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("method", LEVELLING)
def test_equal_singular_values_are_not_cut(method, backend, tmp_path):
    given = adapters()
    for cut in ({"rank": 4}, {"energy": 0.5}, {"rank": 11}, {"rank": 1}, {"rank": 9, "energy": 1}):
        with pytest.raises(FlatCut, match=r"^module '(q|up)': a cut to rank \d+ falls between"):
            at_one(given, method, backend=backend, output=tmp_path / "out", **cut)
        assert not (tmp_path / "out").exists()
    exact = at_one(given, method, backend=backend)
    for cut in ({"rank": 12}, {"rank": 20}, {"energy": 1.0}):
        merged = at_one(given, method, backend=backend, **cut)
        for name in SHAPES:
            assert distance(dense(merged, name), dense(exact, name)) < 1e-6


@pytest.mark.parametrize("method", ["linear", "svd", "tsvm"])
def test_a_flat_power_is_not_cut_and_a_larger_one_is(method):
    with pytest.raises(FlatCut, match="module 'q': a cut to rank 4 falls between equal"):
        at_one(adapters(), method, power=0.0, rank=4)
    assert at_one(adapters(), method, power=0.5, rank=4).report["q"].rank == 4
    assert at_one(adapters(), method, power=0.0, rank=12).report["q"].rank == 12


@pytest.mark.parametrize(
    "options",
    [
        {"method": "knots", "inner": "iso_c"},
        {"method": "core", "inner": "subspace_boost"},
        {"method": "core", "inner": "iso_cts"},
    ],
    ids=str,
)
def test_nor_inside_another_method(options):
    with pytest.raises(FlatCut, match="module 'q': a cut to rank 5"):
        at_one(adapters(), rank=5, **options)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    folders = [
        str(write_adapter(tmp_path / str(k), random_factors(SHAPES, 4, seed=k))) for k in range(2)
    ]
    words = ["merge", *folders, "-o", str(tmp_path / "out"), "--method", "iso_c", "--rank", "2"]
    assert cli.main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("domerge-fast: error: module 'q': a cut to rank 2 falls between equal")
    assert line.endswith("use a method whose cut is defined (svd, tsvm)\n")
    assert len(line) < 300


@pytest.mark.parametrize("method", ["svd", "tsvm", "linear", "cat"])
def test_a_method_is_not_told_to_use_itself(method):
    """Adapters of orthonormal factors, side by side."""
    a, b = torch.eye(8, 12), torch.eye(16, 8)
    given = [dm.from_tensors({"q": (a[k : k + 4], b[:, k : k + 4])}) for k in (0, 4)]
    with pytest.raises(FlatCut) as error:
        at_one(given, method, rank=6)
    assert str(error.value).endswith("say another rank, or take 'linear' without rank and energy")
    assert at_one(given, method, rank=8).report["q"].rank == 8
    assert at_one(given, "linear").report["q"].rank == 8


def test_iso_cts_does_not_part_what_iso_c_made_equal():
    """It takes the first directions of a sum itself."""
    flat = [at_one(adapters(2), "iso_c").factors(name) for name in SHAPES]
    (first,) = [dm.from_tensors(dict(zip(SHAPES, flat)))]
    with pytest.raises(FlatCut, match="module 'q'"):
        at_one([first], "iso_cts")
    assert at_one([first], "iso_c").names == tuple(SHAPES)


def test_a_spectrum_is_cut_where_it_is_not_flat():
    given = adapters()
    boosted = at_one(given, "subspace_boost", beta=0.5)
    for name in SHAPES:
        values = torch.linalg.svdvals(dense(boosted, name))[:12]
        distinct = int((values[:-1] - values[1:] > 1e-3 * values[0]).sum())
        assert 1 < distinct < 9
    merged = at_one(given, "subspace_boost", beta=0.5, rank=2)
    assert {r.rank for r in merged.report.modules.values()} == {2}
    with pytest.raises(FlatCut):
        at_one(given, "subspace_boost", beta=0.5, rank=10)


def test_dense_results_are_checked_as_well():
    """One adapter with orthonormal factors, every entry of which is kept."""
    a = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(0))).Q.T
    b = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(1))).Q
    adapter = dm.from_tensors({"x": (a.contiguous(), b)})
    for cut in ({"rank": 3}, {"energy": 0.5}):
        with pytest.raises(FlatCut, match="module 'x': a cut to rank 3"):
            at_one([adapter], "magnitude_prune", density=1.0, **cut)
    whole = at_one([adapter], "magnitude_prune", density=1.0, rank=6)
    assert distance(dense(whole, "x"), b.double() @ a.double()) < 1e-5


@pytest.mark.parametrize("backend", AVAILABLE)
def test_what_is_zero_or_noise_may_be_cut_anywhere(backend):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, generator=generator), torch.randn(30, 3, generator=generator)
    twice = torch.cat([a, a]), torch.cat([b, -b], 1)
    wide = torch.cat([a, a]), torch.cat([b, b], 1)
    zero = torch.zeros(4, 20), torch.zeros(30, 4)
    narrow = torch.randn(8, 5, generator=generator) @ a[:, :5].T, torch.randn(2, 8)
    for rank in range(1, 9):
        ops.truncate([zero, twice, wide, narrow], rank=rank, backend=backend)
    ops.truncate([zero, wide], energy=1.0, backend=backend)
    found, kept = ops.truncate([wide], rank=3, backend=backend)
    assert distance(found[0][1].double() @ found[0][0].double(), 2 * b.double() @ a.double()) < 1e-6
    assert kept == [pytest.approx(1.0)]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_pair_with_the_cut_is_named_by_its_place(backend):
    eye = torch.eye(6)
    fine = eye[:4] * torch.arange(4, 0, -1.0)[:, None], eye[:, :4]
    for pairs, at in (([fine, (eye[:4], eye[:, :4])], 1), ([(eye, torch.ones(2, 6)), fine], None)):
        if at is None:
            ops.truncate(pairs, rank=2, backend=backend)
            continue
        with pytest.raises(FlatCut, match=f"matrix {at}: a cut to rank 2") as caught:
            ops.truncate(pairs, rank=2, backend=backend)
        assert caught.value.at == at
    large = torch.cat([eye, eye]), torch.cat([eye, eye], 1)  # R above both sides
    with pytest.raises(FlatCut, match="matrix 1"):
        ops.truncate([fine, large], rank=2, backend=backend)


@pytest.mark.parametrize("method", ["linear", "tsvm", "do", "pico", "wudi"])
def test_sums_of_adapters_may_be_cut_everywhere(method):
    shapes = {f"x{k}": (160, 128) for k in range(3)} | {"square": (130, 128)}
    given = [dm.from_tensors(random_factors(shapes, 16, seed=k)) for k in range(7)]
    shared = [dm.from_tensors(random_factors(shapes, 16, seed=9))] * 2
    for sources in (given, given + shared):
        merged = at_one(sources, method)
        for name in merged.names:
            values = torch.linalg.svdvals(dense(merged, name))
            for kept in range(1, len(values)):
                check_cut(values, kept)


@pytest.mark.parametrize("method", [m for m in TABLE if m not in BY_ORDER])
@pytest.mark.parametrize("cut", [{}, {"rank": 3}, {"energy": 0.8}], ids=str)
def test_the_order_of_the_adapters_does_not_matter(cut, method):
    given = adapters(2 if method == "slerp" else 3)
    options = {"steps": 3, "tol": 0.0} if method == "do" else {}
    merges = []
    for order in (given, given[::-1]):
        try:
            merges.append(at_one(order, method, **cut, **options))
        except FlatCut:
            assert method in LEVELLING
            assert cut
    assert len(merges) in (0, 2)
    for name in SHAPES if merges else ():
        assert distance(dense(merges[1], name), dense(merges[0], name)) < 1e-4, name


def test_a_sequential_sum_is_not_cut_between_equal_values(tmp_path: Path):
    flat = at_one(adapters(2), "iso_c")
    state = dm.Sequential.start(tmp_path / "state", rank=3)
    with pytest.raises(FlatCut, match="module 'q': a cut to rank 3"):
        state.add(dm.from_tensors({name: flat.factors(name) for name in SHAPES}))
    state.add(adapters(1)[0])
