"""`do` on adapters that are read in batches, against the objective and the method in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.close import assert_close, distance
from support.make import write_adapter
from support.merges import adapters, at_one, dense
from support.shapes import CONVERGED, Case, random_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import domerge_fast as dm
from domerge_fast import AdapterError, OptionError
from domerge_fast.algebra.side import Side
from domerge_fast.backends.descent import in_gram_form
from domerge_fast.backends.reference import orthogonalize_factors
from domerge_fast.engine import streamed
from domerge_fast.methods.streamed import choice
from domerge_fast.methods.streamed.descent import Descent, Rule

SETS = {
    "at random": (0.0, 1.0),
    "30 % shared": (0.3, 1.0),
    "90 % shared": (0.9, 1.0),
    "norms spread 36 times": (0.0, 36.0),
}
"""How much of the adapters' energy lies in one space of their rank, and how far norms are apart."""
TOL = 1e-3


def library(count: int, rank: int, d: int, shared: float, spread: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(rank, d, generator=generator)
    found = []
    for i in range(count):
        own = torch.randn(rank, d, generator=generator)
        mixed = torch.randn(rank, rank, generator=generator) @ common / math.sqrt(rank)
        size = spread ** (i / (count - 1) - 0.5)
        found.append(size * (math.sqrt(1 - shared) * own + math.sqrt(shared) * mixed))
    return found


def objective(x_hat: Sequence[Tensor], x: Sequence[Tensor], gamma: float) -> float:
    """f by its definition, in float64."""
    n = torch.stack([own.double().norm() for own in x])
    hat = torch.cat([own.double() for own in x_hat])
    owner = torch.arange(len(x)).repeat_interleave(torch.tensor([len(own) for own in x]))
    apart = owner[:, None] != owner
    pairs = (hat @ hat.T).square() / (n[owner][:, None] * n[owner])
    moved = (hat - torch.cat([own.double() for own in x])).square().sum()
    return float(pairs[apart].sum() + gamma * moved)


def descended(x: Sequence[Tensor], tol: float, parts: int = 3) -> tuple[Descent, list[Tensor]]:
    """The descent on one side, read in some parts, and the Xhat_i."""
    cuts = [range(k * len(x) // parts, (k + 1) * len(x) // parts) for k in range(parts)]
    sides = [Side(tuple(x[at.start : at.stop]), (1.0,) * len(at)) for at in cuts]
    found = Descent(x[0].shape[1], Rule(1.0, 50, tol))
    for side in sides:
        found.measure(side)
    found.settle()
    while not found.done:
        for side, at in zip(sides, cuts):
            found.step(side, at)
        found.settle()
    rows = [block for side, at in zip(sides, cuts) for block in found.moved(side, at)]
    return found, [2.0**found.power * y[: len(own)] for y, own in zip(rows, x)]


# The descent


@pytest.mark.parametrize("name", SETS)
def test_it_ends_within_tol_of_the_optimum(name):
    x = library(100, 3, 32, *SETS[name])
    side = Side(tuple(x), (1.0,) * len(x))
    (best,), _ = orthogonalize_factors([side], 1.0, 300, 1e-10)
    least = objective(best.split(3), x, 1.0)
    found, x_hat = descended(x, TOL)
    reached = objective(x_hat, x, 1.0)
    assert -1e-6 < reached / least - 1 < TOL
    assert reached < 0.9 * objective(x, x, 1.0)
    _, before, after, *_ = found.row
    assert before == pytest.approx(objective(x, x, 1.0), rel=1e-5)
    assert after == pytest.approx(reached, rel=1e-5)
    assert reached - least < 4.0**found.power * found.gap + 1e-6 * least
    assert found.passes < 12
    assert not found.few


def over(x: list[Tensor]) -> tuple[float, Descent]:
    """What is left at the default tolerance, as a share of the optimum's f."""
    gram = torch.cat(x).double() @ torch.cat(x).double().T
    ranks = tuple(len(block) for block in x)
    _, stats = in_gram_form(gram[None], ranks, "squared", 1.0, 300, 1e-11)
    found, x_hat = descended(x, TOL)
    return objective(x_hat, x, 1.0) / float(stats[0, 2]) - 1, found


@pytest.mark.parametrize(
    ("count", "rank", "d", "shared", "spread"), [(100, 3, 32, 0.0, 300), (50, 4, 96, 0.0, 300)]
)
def test_what_the_own_blocks_leave_is_in_the_estimate(count, rank, d, shared, spread):
    """Of norms 300 times apart eight rounds do not find them: it ends above `tol`, and says so."""
    left, found = over(library(count, rank, d, shared, spread))
    assert TOL < left < found.gap / found.after
    assert not found.is_within


@pytest.mark.parametrize(("count", "spread"), [(8, 1.0), (12, 6.0), (20, 6.0), (20, 36.0)])
def test_it_says_where_adapters_are_too_few_for_its_estimate(count, spread):
    left, found = over(library(count, 4, 96, 0.9, spread))
    assert left > TOL
    assert left > found.gap / found.after
    assert found.few


def test_ranks_may_differ_and_zeros_and_vanishing_adapters_stay():
    x = [own[: 1 + k % 3] for k, own in enumerate(library(30, 3, 16, 0.5, 1.0))]
    x[4], x[7] = torch.zeros_like(x[4]), 1e-8 * x[7]
    _, x_hat = descended(x, TOL)
    assert [len(own) for own in x_hat] == [len(own) for own in x]
    assert_close(x_hat[4], x[4])
    assert_close(x_hat[7], x[7])
    assert distance(x_hat[5], x[5]) > 0.1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_change_nothing(size):
    x = library(30, 3, 16, 0.3, 4.0)
    _, usual = descended(x, TOL)
    _, large = descended([size * own for own in x], TOL)
    for one, other in zip(usual, large):
        assert_close(other / size, one, 1e-4)


# Merges


def cases() -> dict[str, Case]:
    """A module that all have, of different ranks; others that some lack; one that one has."""
    return {
        "all": random_case((3, 2, 4) * 8, 24, 16),
        "some": random_case((2,) * 40, 9, 20, seed=1),
        "one": random_case((3,), 8, 12, seed=2),
    }


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"decouple": False},
    {"renormalize": True},
    {"sides": "A"},
    {"sides": "B"},
    {"orthogonalize": False},
    {"steps": 0},
    {"gamma": 3.0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_merge_is_that_of_all_at_once(options):
    given, weights = adapters(cases()), ([1.0, -0.5, 2.0] * 14)[:40]
    given_options = CONVERGED | {"weights": weights, "scale": -0.7} | options
    whole = at_one(given, "do", descent="whole", **given_options)
    found = at_one(given, "do", descent="streamed", **given_options)
    plain = {"orthogonalize": False}.items() <= options.items() or options.get("steps") == 0
    for name in whole.names:
        assert_close(dense(found, name), dense(whole, name), 1e-5 if plain else 6e-2, name=name)
        assert found.report[name].rank == min(dense(found, name).shape)
        sides = [(getattr(x.report[name], side) is None) for x in (whole, found) for side in "ab"]
        assert sides[:2] == sides[2:]
        for adapter, norm in whole.report[name].magnitudes.items():
            mine = found.report[name].magnitudes[adapter]
            assert mine == pytest.approx(norm, rel=1e-4 if plain else 0.1)


def test_how_adapters_are_read_changes_no_more_than_rounding(monkeypatch):
    given = adapters(cases())
    usual = at_one(given, "do", descent="streamed")
    back = at_one(given[::-1], "do", descent="streamed")
    monkeypatch.setattr(streamed, "PART_BYTES", 1)
    monkeypatch.setattr(streamed, "STATE_BYTES", 1)
    one_by_one = at_one(given, "do", descent="streamed")
    for name in usual.names:
        assert_close(dense(back, name), dense(usual, name), 1e-4, name=name)
        assert_close(dense(one_by_one, name), dense(usual, name), 1e-4, name=name)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_a_merge_of_large_or_small_factors_is_as_large_or_small(size):
    x, y = library(30, 2, 12, 0.3, 1.0), library(30, 2, 10, 0.0, 1.0)
    factors = [{"x": (a, b.T.contiguous())} for a, b in zip(x, y)]
    other = [{"x": (size * a, size * b.T.contiguous())} for a, b in zip(x, y)]
    usual, found = (
        at_one([dm.from_tensors(f) for f in own], "do", descent="streamed", dtype="float32")
        for own in (factors, other)
    )
    assert_close(dense(found, "x") / size**2, dense(usual, "x"), 1e-4)


def test_lambda_is_about_that_of_all_at_once():
    given = adapters({name: case for name, case in cases().items() if name != "one"})
    whole, found = (dm.merge(given, "do", descent=x) for x in ("whole", "streamed"))
    assert found.report.scale == pytest.approx(whole.report.scale, rel=0.15)
    alone = dm.merge(adapters(cases()), "do", descent="streamed")
    case = cases()["one"]
    assert_close(dense(alone, "one"), case.deltas()[0], 1e-5)


class _Largest(TorchDispatchMode):
    """The largest tensor that anything makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.nbytes)
        return found


def test_no_tensor_grows_with_the_number_of_adapters(monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 16)

    def largest(count: int, descent: str) -> int:
        x, y = library(count, 4, 64, 0.3, 1.0), library(count, 4, 48, 0.0, 1.0)
        given = [dm.from_tensors({"x": (a, b.T.contiguous())}) for a, b in zip(x, y)]
        with _Largest() as seen:
            dm.merge(given, "do", descent=descent, backend="torch")
        return seen.nbytes

    few = largest(60, "streamed")
    assert largest(480, "streamed") == few
    assert largest(480, "whole") > 4 * few


def test_files_are_read_and_written_and_the_report_says_how(tmp_path, monkeypatch):
    x, y = library(30, 2, 12, 0.3, 1.0), library(30, 2, 10, 0.0, 1.0)
    paths = [
        write_adapter(tmp_path / f"{k}", {"x": (a.bfloat16(), b.T.bfloat16())})
        for k, (a, b) in enumerate(zip(x, y))
    ]
    asked = dm.merge(paths, "do", descent="streamed", output=tmp_path / "asked")
    (note,) = [note for note in asked.report.notes if "in batches" in note]
    assert note.endswith(" % of f")
    few = dm.merge(paths[:8], "do", descent="streamed").report.notes
    assert any("or some times that, as single adapters hold a large share" in n for n in few)
    assert asked.report.recipe.options["descent"] == "streamed"
    assert "in batches" in (tmp_path / "asked" / "README.md").read_text()
    monkeypatch.setattr(choice, "MOST_BYTES", 1)
    taken = dm.merge(paths, "do", output=tmp_path / "taken")
    assert any("in batches" in note for note in taken.report.notes)
    assert not any("in batches" in n for n in dm.merge(paths, "do", descent="whole").report.notes)
    one, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("asked", "taken")
    )
    assert one == other
    assert dm.load(tmp_path / "taken").modules["x"].rank == 10
    interference = taken.report.interference
    assert interference
    assert interference.tables is None
    assert interference.norms[3] == pytest.approx(
        float((y[3].T.bfloat16().double() @ x[3].bfloat16().double()).norm()), rel=1e-5
    )


def test_cuts_and_dense_outputs_are_those_of_the_merge(tmp_path):
    given = adapters({"all": cases()["all"]})
    merged = dense(at_one(given, "do", descent="streamed", dtype="float32"), "all")
    cut = at_one(given, "do", descent="streamed", rank=3, dtype="float32")
    u, s, vh = torch.linalg.svd(merged)
    assert_close(dense(cut, "all"), (u[:, :3] * s[:3]) @ vh[:3], 1e-3)
    kept = float(s[:3].square().sum() / s.square().sum())
    assert cut.report["all"].energy_kept == pytest.approx(kept, rel=1e-4)
    again = dm.merge(given, "do", descent="streamed", rank=3, dtype="float32")
    scale = again.report.scale
    assert float(dense(again, "all").norm()) == pytest.approx(
        scale * float(merged.norm()), rel=1e-3
    )
    deltas = at_one(given, "do", descent="streamed", form="deltas", output=tmp_path / "deltas")
    assert deltas.report["all"].rank == 16


# Refusals


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"penalty": "frobenius"}, "penalty 'frobenius'"),
        ({"gamma": 0.0}, "gamma 0"),
        ({"directions": "ties"}, "directions 'ties'"),
        ({"pre": ["equalize"]}, "the step 'equalize'"),
        ({"post": ["svc"]}, "the step 'svc'"),
    ],
    ids=str,
)
def test_what_takes_all_adapters_at_once_is_refused_where_batches_are_asked_for(
    options, what, monkeypatch
):
    given = adapters({"all": cases()["all"]})
    with pytest.raises(
        OptionError, match=f"'descent': {what} takes all adapters at once; "
    ) as info:
        dm.merge(given, "do", descent="streamed", **options)
    assert "\n" not in str(info.value)
    monkeypatch.setattr(choice, "MOST_BYTES", 1)
    assert not any("in batches" in n for n in dm.merge(given, "do", **options).report.notes)


def test_a_factor_that_is_not_finite_is_refused():
    given = adapters({"all": cases()["all"]})
    a, b = given[5].factors("all")
    a[0, 1] = math.nan
    given[5] = dm.from_tensors({"all": (a, b)}, name="broken")
    with pytest.raises(AdapterError, match=r"broken.*NaN in lora_A"):
        dm.merge(given, "do", descent="streamed")


def test_batches_are_not_prepared():
    given = adapters({"all": cases()["all"]})
    with pytest.raises(
        OptionError, match="'descent': adapters that are read in batches are not prepared"
    ):
        dm.prepare(given, "do", descent="streamed")


def test_an_estimate_tells_what_it_holds():
    given = adapters({"all": cases()["all"]})
    recipe = dm.Recipe.make(method="do", descent="streamed")
    assert dm.estimate(recipe, given).memory > streamed.STATE_BYTES


@pytest.mark.parametrize(
    ("gap", "said"), [(0.0, "0"), (4.321e-7, "4.3e-05"), (0.00043, "0.043"), (1.83, "180")]
)
def test_what_is_left_is_said_in_two_digits(gap, said):
    assert streamed.estimated(gap, False) == f"at most {said} % of f"
