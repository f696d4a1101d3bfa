"""Every op on every backend against the oracle in float64, over the shapes that hurt.

Compared are products that are well defined: C is not where G is singular, but C X is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from support import on_device as ops
from support.close import assert_within
from support.on_device import AVAILABLE, FAST
from support.shapes import CASES, SIDES, Case, exact, random_case
from torch import Tensor

from domerge_fast.algebra.entry_rules import Draw, Election, Trim
from domerge_fast.algebra.lowrank import compress
from domerge_fast.algebra.side import Side
from domerge_fast.backends import factor_descent, paper, reference, registry
from domerge_fast.errors import OptionError
from domerge_fast.ops.orthogonalize import PENALTIES

pytestmark = pytest.mark.usefixtures("nan_poison")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXTREME = ("tiny", "huge", "tiny beside huge", "mixed sizes")  # beyond the range of float16
SINGLE = [name for name, case in CASES.items() if len(case.ranks) == 1]
COLLIDING = [name for name in CASES if name not in (*SINGLE, "all zero")]
LONG = ["usual", "d below R", "duplicated"]

GROUPS = {
    "usual": ["usual", "whole vectors", "odd d"],
    "others": [n for n in CASES if n not in ("usual", "whole vectors", "odd d", "R above 256")],
    "256": ["R above 256"],
}
"""The cases, those of a group in one call: what compiles or interprets kernels can take a few."""

every_group = pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
every_backend = pytest.mark.parametrize("backend", FAST)
every_layout = pytest.mark.parametrize("layout", SIDES)
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def storable(dtype: torch.dtype, name: str) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float16 and name in EXTREME else dtype


def coefficients(rows: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.eye(rows, rank) + 0.3 * torch.randn(rows, rank, generator=generator)


# Backends


def test_the_cpu_backend_is_available():
    assert registry.backends()["cpu"].why_not is None


def test_auto_takes_the_fastest_backend_and_the_environment_overrides_it(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    assert registry.choose("auto", "cpu") == "cpu"
    usable = [n for n, s in registry.backends().items() if s.available and s.devices != ("cpu",)]
    assert registry.choose("auto", "cuda") == usable[0]
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    assert registry.choose("auto", "cpu") == "reference"
    assert registry.choose("torch", "cpu") == "torch"


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("tirch", "cpu", "did you mean 'torch'"),
        ("cpu", "cuda", "'cpu' runs on cpu, not on cuda"),
    ],
)
def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error(name, device, words):
    with pytest.raises(OptionError, match=words):
        registry.choose(name, device)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_every_backend_has_every_op(backend):
    module = registry.load(ops.split(backend)[0])
    assert [op for op in registry.OPS if not callable(getattr(module, op, None))] == []


# gram, block_gram


@pytest.mark.parametrize("backend", AVAILABLE)
@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
@every_group
def test_gram(names, dtype, layout, backend):
    """Symmetric to the bit, which nobody may ask of a library's X X^T."""
    problems = [SIDES[layout](CASES[name], dtype) for name in names]
    singles = ops.gram(problems, dtype=torch.float32, backend=backend)
    doubles = ops.gram(problems, dtype=torch.float64, backend=backend)
    for name, problem, single, double in zip(names, problems, singles, doubles, strict=True):
        x = torch.cat(exact(problem))
        norms = x.norm(dim=1)
        size = norms[:, None] * norms
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        assert_within(single, x @ x.T, size, name=name)
        assert_within(double, x @ x.T, size, 1e-13, name=name)
        assert torch.equal(single, single.T), name
        assert torch.equal(double, double.T), name


@pytest.mark.parametrize("backend", AVAILABLE)
@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
@every_group
def test_block_gram(names, dtype, layout, backend):
    problems = [SIDES[layout](CASES[name], dtype) for name in names]
    for name, problem, packed in zip(
        names, problems, ops.block_gram(problems, backend=backend), strict=True
    ):
        assert packed.dtype == torch.float64
        grams = packed.split([r * r for r in problem.ranks])
        for x, gram in zip(exact(problem), grams, strict=True):
            norms, gram = x.norm(dim=1), gram.view(len(x), len(x))
            assert_within(gram, x @ x.T, norms[:, None] * norms, 1e-13, name=name)
            assert torch.equal(gram, gram.T), name


# apply


@every_backend
@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
@every_group
def test_apply(names, dtype, layout, backend):
    """X itself, and C X with as many rows as X, half as many, and one."""
    for out_dtype in {storable(dtype, name) for name in names}:
        chosen = [name for name in names if storable(dtype, name) == out_dtype]
        problems = [SIDES[layout](CASES[name]) for name in chosen]
        for share in (None, 1.0, 0.5, 0.0):
            cs = [
                None if share is None else coefficients(max(1, math.ceil(share * r)), r)
                for r in (p.rank for p in problems)
            ]
            results = ops.apply(cs, problems, out_dtype, backend=backend)
            for name, p, c, result in zip(chosen, problems, cs, results, strict=True):
                x = torch.cat(exact(p))
                expected = x if c is None else c.double() @ x
                size = x.abs() if c is None else c.double().abs() @ x.abs()
                assert result.dtype == out_dtype
                assert_within(result, expected, size, name=name)
                assert (result.T if p.in_columns else result).is_contiguous(), name


@every_backend
@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apply_to_low_precision_factors_computes_in_float32(dtype, layout, backend):
    problem = SIDES[layout](CASES["usual"], dtype)
    c, x = coefficients(20, problem.rank), torch.cat(exact(problem))
    (result,) = ops.apply([c], [problem], torch.float32, backend=backend)
    assert_within(result, c.double() @ x, c.double().abs() @ x.abs(), 1e-6)


@every_backend
def test_blocks_of_one_problem_may_differ_in_dtype_and_memory_layout(backend):
    case = CASES["d below R"]
    strided = case.a[2].repeat(1, 2)[:, ::2]
    blocks = (case.a[0].half(), case.a[1].T.contiguous().T, strided)
    for order in itertools.permutations(blocks):
        problem = Side(order, (2.0, -0.5, 1.0))
        x = torch.cat(exact(problem))
        norms = x.norm(dim=1)
        assert_within(ops.gram([problem], backend=backend)[0], x @ x.T, norms[:, None] * norms)
        (copy,) = ops.apply([None], [problem], torch.float32, backend=backend)
        assert_within(copy, x, 0.0)


# orthogonalize


@functools.cache
def oracle(name: str, penalty: str, steps: int, tol: float) -> tuple[list[Tensor], list[float]]:
    return paper.descend(exact(CASES[name].rows()), penalty, 1.0, steps, tol)


Descent = tuple[list[Tensor], list[float], Tensor]


def descend_all(
    problems: list[list[Tensor]], backend: str, penalty: str = "squared", **rule
) -> list[Descent]:
    """Xhat, the statistics and C from the Grams of each problem's blocks in float64."""
    stacks = [torch.cat(x) for x in problems]
    grams, ranks = [(x @ x.T).float() for x in stacks], [[len(b) for b in x] for x in problems]
    cs, stats = ops.orthogonalize(grams, ranks, penalty=penalty, backend=backend, **rule)
    assert stats.shape == (len(problems), 5)
    assert all(c.dtype == torch.float32 and c.shape == g.shape for c, g in zip(cs, grams))
    return [
        (list((c.double() @ x).split(r)), row, c)
        for x, r, c, row in zip(stacks, ranks, cs, stats.tolist(), strict=True)
    ]


def descend(x: list[Tensor], backend: str, penalty: str = "squared", **rule) -> Descent:
    (found,) = descend_all([x], backend, penalty, **rule)
    return found


def assert_blocks_within(x_hat, expected, x, tolerance: float):
    """Every adapter's error is below a share of its own norm (and of 1e-6 of the whole)."""
    whole = float(torch.cat(x).norm())
    for result, value, block in zip(x_hat, expected, x, strict=True):
        error, size = float((result - value).norm()), float(block.norm()) + 1e-6 * whole
        assert error <= tolerance * size


@every_backend
@every_penalty
@every_group
def test_some_steps_of_the_descent(names, penalty, backend):
    """The Frobenius norm has a kink where a step ends, which costs digits."""
    for steps in (1, 3):
        few = [n for n in names if penalty == "frobenius" or n == "64 adapters"]
        chosen = few if steps == 1 else [n for n in names if n not in few]
        blocks = [exact(CASES[name].rows()) for name in chosen]
        moved = descend_all(blocks, backend, penalty, steps=steps, tol=0.0)
        for name, x, (x_hat, found, _) in zip(chosen, blocks, moved, strict=True):
            expected, stats = oracle(name, penalty, steps, 0.0)
            assert found[0] == stats[0] == (steps if name in COLLIDING else 0), name
            assert_blocks_within(x_hat, expected, x, 1e-5 if penalty == "squared" else 5e-4)
            assert found[1:] == pytest.approx(stats[1:], rel=1e-3, abs=1e-6 * found[1]), name
            assert found[1] == pytest.approx(stats[1], rel=1e-6), name


@every_backend
@every_penalty
@pytest.mark.parametrize("name", LONG)
def test_the_descent_arrives_where_the_oracle_does(name, penalty, backend):
    expected, stats = oracle(name, penalty, 50, 1e-6)
    x = exact(CASES[name].rows())
    x_hat, found, _ = descend(x, backend, penalty, tol=1e-6)
    assert found[2] == pytest.approx(stats[2], rel=1e-5)
    assert_blocks_within(x_hat, expected, x, 1e-4)


@functools.cache
def loss_before(name: str, penalty: str) -> float:
    x = exact(CASES[name].rows())
    return float(paper.loss(x, x, penalty))


@every_backend
@every_penalty
@every_group
def test_the_statistics_are_those_of_the_result(names, penalty, backend):
    names = [name for name in names if name in COLLIDING]
    blocks = [exact(CASES[name].rows()) for name in names]
    moved = descend_all(blocks, backend, penalty, steps=3)
    for name, x, (x_hat, (_, before, after, left, change), _) in zip(
        names, blocks, moved, strict=True
    ):
        assert before == pytest.approx(loss_before(name, penalty), rel=1e-5), name
        assert after == pytest.approx(float(paper.loss(x_hat, x, penalty)), rel=1e-5), name
        shift = torch.cat(x_hat) - torch.cat(x)
        size = float(torch.cat(x).norm())
        assert change == pytest.approx(float(shift.norm()) / size, rel=1e-3, abs=1e-6), name
        energies = [cross_energy(parts) for parts in (x, x_hat)]
        assert left == pytest.approx(energies[1] / energies[0], rel=1e-3, abs=1e-6), name


def cross_energy(x: list[Tensor]) -> float:
    stacked = torch.cat(x)
    own = torch.block_diag(*(b @ b.T for b in x))
    return float((stacked @ stacked.T - own).square().sum())


@every_backend
@every_penalty
@pytest.mark.parametrize("name", ["usual", "mixed sizes", "d is 1"])
def test_the_objective_never_rises(name, penalty, backend):
    x = exact(CASES[name].rows())
    losses = []
    for steps in range(6):
        x_hat, stats, _ = descend(x, backend, penalty, steps=steps, tol=0.0)
        assert stats[0] <= steps
        losses.append(float(paper.loss(x_hat, x, penalty)))
    assert all(new <= old * (1 + 1e-6) for old, new in itertools.pairwise(losses))
    assert losses[1] < 0.999 * losses[0]


@every_backend
@every_penalty
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_factors_has_no_influence(scale, penalty, backend):
    x = exact(CASES["odd d"].rows())
    x_hat, stats, _ = descend(x, backend, penalty, steps=6)
    scaled, found, _ = descend([scale * b for b in x], backend, penalty, steps=6)
    assert found[0] == stats[0]
    assert found[1] / scale**2 == pytest.approx(stats[1], rel=1e-5)
    assert found[2] / scale**2 == pytest.approx(stats[2], rel=1e-5)
    assert_blocks_within([b / scale for b in scaled], x_hat, x, 1e-5)


@every_backend
@every_penalty
def test_no_steps_is_the_identity(penalty, backend):
    _, stats, c = descend(exact(CASES["usual"].rows()), backend, penalty, steps=0)
    assert torch.equal(c, torch.eye(64))
    assert stats[0] == 0
    assert stats[1] == stats[2] > 0
    assert stats[3:] == [1.0, 0.0]


@every_backend
@every_penalty
@pytest.mark.parametrize("name", [*SINGLE, "all zero", "apart"])
def test_nothing_moves_where_nothing_collides(name, penalty, backend):
    apart = list(torch.eye(7).double().split([2, 4, 1]))
    x = apart if name == "apart" else exact(CASES[name].rows())
    _, stats, c = descend(x, backend, penalty)
    assert torch.equal(c, torch.eye(len(c)))
    assert stats[0] == stats[3] == stats[4] == 0


@every_backend
@every_penalty
def test_without_gamma_the_overlap_goes_and_with_a_large_one_nothing_moves(penalty, backend):
    x = exact(CASES["odd d"].rows())
    _, free, _ = descend(x, backend, penalty, gamma=0.0, steps=30, tol=0.0)
    assert free[3] < 1e-3
    assert free[2] < 1e-2 * free[1]
    _, held, c = descend(x, backend, penalty, gamma=1e6)
    assert 0 < held[4] < 1e-5
    assert held[2] < held[1]
    assert float((c - torch.eye(len(c))).abs().max()) < 1e-4


@every_backend
@every_penalty
def test_it_stops_where_the_oracle_does(penalty, backend):
    name = "odd d"
    x = exact(CASES[name].rows())
    steps = []
    for tol in (1e-1, 1e-2, 1e-4):
        _, (taken, _, after, *_), _ = descend(x, backend, penalty, steps=200, tol=tol)
        expected = oracle(name, penalty, 200, tol)[1]
        assert taken == expected[0]
        assert after == pytest.approx(expected[2], rel=1e-4)
        steps.append(taken)
    assert 1 <= steps[0] <= steps[1] < steps[2] < 200


def narrow(name: str, layout: str) -> Side:
    """A side of a module cut to 5 columns, so that R > d."""
    problem = SIDES[layout](CASES[name])
    if problem.in_columns:
        return Side(tuple(x.T[:5].T for x in problem.blocks), problem.scales)
    return Side(tuple(x[:, :5].contiguous() for x in problem.blocks), problem.scales)


@every_backend
@every_layout
@pytest.mark.parametrize("name", ["d below R", "R above 256", "duplicated", "zero factors"])
def test_the_descent_on_the_factors_ends_where_the_descent_on_the_gram_does(name, layout, backend):
    problem = narrow(name, layout)
    x = exact(problem)
    rule = {"gamma": 2.0, "steps": 200, "tol": 1e-10}
    (result,), stats = ops.orthogonalize_factors([problem], backend=backend, **rule)
    on_gram, found, _ = descend(x, backend, **rule)
    assert_blocks_within(result.double().split([len(b) for b in x]), on_gram, x, 2e-3)
    assert stats[0, 1:3].tolist() == pytest.approx(found[1:3], rel=1e-4)


@functools.cache
def on_factors(name: str, steps: int, tol: float) -> tuple[Tensor, list[float]]:
    """The rule in float64."""
    problem = CASES[name].rows()
    x, stats = factor_descent.in_factor_form(
        torch.cat(exact(problem)), problem.ranks, 1.0, steps, tol
    )
    return x, stats.tolist()


@pytest.mark.parametrize("name", CASES)
def test_the_rule_on_the_factors_ends_at_the_literal_descents_optimum(name):
    """In float64, without rising; and the statistics are the literal ones."""
    x = exact(CASES[name].rows())
    expected, _ = oracle(name, "squared", 300, 1e-12)
    result, stats = on_factors(name, 300, 1e-12)
    blocks = list(result.split([len(b) for b in x]))
    before, best = float(paper.loss(x, x)), float(paper.loss(expected, x))
    found = float(paper.loss(blocks, x))
    assert found <= before
    # What is left of f where norms are far apart has the roundings of what there was.
    rounding = 1e-11 * before
    assert found <= best * (1 + 1e-9) + rounding
    assert found == pytest.approx(best, rel=2e-4)  # two optima where d is 1
    assert stats[1:3] == pytest.approx([before, found], rel=1e-9, abs=rounding)
    left = [float(paper.loss(y, x, "squared", 0.0)) for y in (blocks, x)]
    assert stats[3] == pytest.approx(left[0] / left[1] if left[1] else 0.0, abs=1e-9)
    moved, size = (float(torch.cat(y).norm()) for y in ([b - y for b, y in zip(blocks, x)], x))
    assert stats[4] == pytest.approx(moved / size if size else 0.0, abs=1e-9)
    assert stats[5] == pytest.approx(reference._scaled(x, blocks), abs=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 10.0])
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("name", [n for n in COLLIDING if n != "mixed sizes"])  # 800 times apart
def test_the_descent_on_the_factors_ends_within_tol_of_the_optimum(name, tol, gamma):
    problem = narrow(name, "rows")
    x = torch.cat(exact(problem))
    _, stats = factor_descent.in_factor_form(x, problem.ranks, gamma, 300, tol)
    _, best = factor_descent.in_factor_form(x, problem.ranks, gamma, 1000, 1e-13)
    assert float(stats[2]) <= float(best[2]) * (1 + tol)


def assert_steps_on_the_factors(names: Sequence[str], backend: str) -> None:
    for steps in (1, 3):
        chosen = [name for name in names if (name == "64 adapters") == (steps == 1)]
        problems = [CASES[name].rows() for name in chosen]
        results, stats = ops.orthogonalize_factors(problems, steps=steps, tol=0.0, backend=backend)
        for name, p, result, row in zip(chosen, problems, results, stats.tolist(), strict=True):
            expected, found = on_factors(name, steps, 0.0)
            assert result.dtype == torch.float32
            ranks = list(p.ranks)
            assert_blocks_within(
                result.double().split(ranks), list(expected.split(ranks)), exact(p), 1e-5
            )
            assert row == pytest.approx(found, rel=1e-3, abs=1e-6), name


@every_backend
@every_group
def test_some_steps_of_the_descent_on_the_factors(names, backend):
    assert_steps_on_the_factors(names, backend)


def test_the_descent_on_the_factors_piece_by_piece(monkeypatch):
    monkeypatch.setattr(factor_descent, "SQUARE_COLUMNS", 16)
    monkeypatch.setattr(factor_descent, "PIECE", 100)
    assert_steps_on_the_factors(tuple(CASES), "torch")


@every_backend
def test_no_step_leaves_the_factors_as_they_are(backend):
    problem = CASES["usual"].rows()
    (result,), stats = ops.orthogonalize_factors([problem], steps=0, backend=backend)
    assert_blocks_within(
        result.double().split(list(problem.ranks)), exact(problem), exact(problem), 1e-6
    )
    assert stats[0, 0] == stats[0, 4] == stats[0, 5] == 0
    assert stats[0, 1] == stats[0, 2] > 0
    assert stats[0, 3] == 1


# apply_decouple


def decouple(
    case: Case, c: Tensor | None, backend: str, renormalize: bool = False, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    b = case.columns()
    results, norms = ops.apply_decouple(
        [c],
        [case.rows()],
        ops.block_gram([b], backend=backend),
        [case.omegas],
        1.5,
        dtype,
        full=ops.gram([b], dtype=torch.float64, backend=backend) if renormalize else None,
        backend=backend,
    )
    return results[0], norms[0]


@functools.cache
def literal_decouple(name: str, moved: bool, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW [m, n], its columns' magnitudes [n] and the adapters' norms."""
    case = CASES[name]
    a, rank = torch.cat(exact(case.rows())), sum(case.ranks)
    a = (coefficients(rank, rank).double() @ a if moved else a).split(list(case.ranks))
    deltas = [bi @ ai for ai, bi in zip(a, case.exact_b(), strict=True)]
    magnitude = sum(abs(w) * d.norm(dim=0) for w, d in zip(case.omegas, deltas, strict=True))
    expected = paper.do_merging(
        a, case.exact_b(), case.omegas, orthogonalize=False, renormalize=renormalize, scale=1.5
    )
    return expected, magnitude, torch.stack([d.norm() for d in deltas])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@every_group
def test_apply_decouple(names, renormalize, moved, dtype, backend):
    """B A' against the literal merge; an error counts against its column's magnitude."""
    names = [name for name in names if storable(dtype, name) == dtype]
    cases = [CASES[name] for name in names]
    b, ranks = [case.columns() for case in cases], [sum(case.ranks) for case in cases]
    results, found = ops.apply_decouple(
        [coefficients(rank, rank) if moved else None for rank in ranks],
        [case.rows() for case in cases],
        ops.block_gram(b, backend=backend),
        [case.omegas for case in cases],
        1.5,
        dtype,
        full=ops.gram(b, dtype=torch.float64, backend=backend) if renormalize else None,
        backend=backend,
    )
    for name, case, result, norms in zip(names, cases, results, found, strict=True):
        expected, magnitude, expected_norms = literal_decouple(name, moved, renormalize)
        stacked_b = torch.cat(case.exact_b(), 1)
        assert result.dtype == dtype
        assert result.is_contiguous(), name
        rounding = torch.finfo(dtype).eps / 2 * (stacked_b.abs() @ result.double().abs())
        allowed = 1.5e-5 * magnitude + rounding
        assert_within(stacked_b @ result.double(), expected, allowed, 1.0, name)
        assert norms.dtype == torch.float64
        assert_within(norms, expected_norms, expected_norms, name=name)


@every_backend
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_column_that_b_maps_to_zero_has_no_direction(renormalize, backend):
    """Column 4 of B_1 A_1 is 0, that of A_1 is not: rounding must not become a direction."""
    case = random_case((3, 2), 20, 15)
    case.b[1][:, 1] = case.b[1][:, 0]
    case.a[1][1, 4] = -case.a[1][0, 4]
    result, _ = decouple(case, None, backend, renormalize)
    assert torch.equal(result[3:, 4], torch.zeros(2))
    assert (result[:3] != 0).all()
    assert (result[3:, :4] != 0).all()


@every_backend
def test_an_adapter_may_have_any_rank(backend):
    """More rows than a kernel finds the root of, beside one of few."""
    case = random_case((270, 3), 33, 300)
    result, norms = decouple(case, None, backend)
    deltas = [b @ a.double() for a, b in zip(case.a, case.exact_b(), strict=True)]
    magnitude = sum(abs(w) * d.norm(dim=0) for w, d in zip(case.omegas, deltas, strict=True))
    parts = [w * d / d.norm(dim=0) for w, d in zip(case.omegas, deltas, strict=True)]
    expected = 1.5 * (parts[0] + parts[1]) * magnitude
    assert_within(torch.cat(case.exact_b(), 1) @ result.double(), expected, 1.5e-5 * magnitude, 1.0)
    sizes = torch.stack([d.norm() for d in deltas])
    assert_within(norms, sizes, sizes)


def test_roots_of_adapters_of_a_rank_are_found_in_one_decomposition(monkeypatch):
    cases = [random_case((3, 4, 3), 20, 15, seed) for seed in range(3)]
    b, decomposed = [case.columns() for case in cases], []
    eigh = torch.linalg.eigh

    def watched(x: Tensor) -> tuple[Tensor, Tensor]:
        decomposed.append(tuple(x.shape))
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    ops.apply_decouple(
        [None] * 3,
        [case.rows() for case in cases],
        ops.block_gram(b, backend="torch"),
        [case.omegas for case in cases],
        1.0,
        torch.float32,
        full=ops.gram(b, dtype=torch.float64, backend="torch"),
        backend="torch",
    )
    assert sorted(decomposed) == [(3, 4, 4), (3, 10, 10), (6, 3, 3)]


@every_backend
def test_columns_that_cancel_are_zero_when_renormalized(backend):
    """The same update twice with opposite weights has no direction to renormalize."""
    case = random_case((3, 3), 20, 15)
    case = Case([case.a[0]] * 2, [case.b[0]] * 2, [1.0, 1.0])
    b = case.columns()
    (result,), _ = ops.apply_decouple(
        [None],
        [case.rows()],
        ops.block_gram([b], backend=backend),
        [[0.5, -0.5]],
        1.0,
        torch.float32,
        full=ops.gram([b], dtype=torch.float64, backend=backend),
        backend=backend,
    )
    assert torch.equal(result, torch.zeros(6, 20))


# truncate


@functools.cache
def whole(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A case's stacked A and B, and ΔW [m, n] in float64 with its singular values."""
    case = CASES[name]
    a = torch.cat(case.a)
    b = torch.cat([s * x for x, s in zip(case.b, case.scalings, strict=True)], 1)
    delta = b.double() @ a.double()
    return a, b, delta, torch.linalg.svdvals(delta)


def cut_all(names, backend: str, dtype=torch.float32, **limits):
    """Of every case: its name, factors, the share kept, ΔW and its singular values."""
    pairs = [whole(name)[:2] for name in names]
    cuts, shares = ops.truncate(pairs, out_dtype=dtype, backend=backend, **limits)
    for name, (a, b), kept in zip(names, cuts, shares, strict=True):
        yield name, a, b, kept, *whole(name)[2:]


def cut(name: str, backend: str, dtype=torch.float32, **limits):
    """The same of one case, without its name."""
    ((_, *rest),) = cut_all([name], backend, dtype, **limits)
    return rest


def assert_best_approximation(a: Tensor, b: Tensor, delta: Tensor, values: Tensor, tolerance):
    """The error of rank k is the norm of the other singular values (Eckart and Young)."""
    error = float((b.double() @ a.double() - delta).norm())
    tail = float(values[len(a) :].norm())
    assert error <= tail + tolerance * float(values.norm())


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("rank", [1, 3, 10**6])
@every_group
def test_truncate_to_a_rank(names, rank, backend):
    for name, a, b, kept, delta, values in cut_all(names, backend, rank=rank):
        k = min(rank, sum(CASES[name].ranks), *delta.shape)
        assert (a.shape, b.shape) == ((k, delta.shape[1]), (delta.shape[0], k)), name
        assert_best_approximation(a, b, delta, values, 1e-5)
        total = float(values.square().sum())
        share = float(values[:k].square().sum()) / total if total else 1.0
        assert kept == pytest.approx(share, abs=1e-6), name


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@every_group
def test_truncate_to_an_energy_takes_the_smallest_rank(names, energy, backend):
    for name, a, b, kept, delta, values in cut_all(names, backend, energy=energy):
        shares = values.square().cumsum(0)
        k = 1 + int((shares < energy * shares[-1]).sum()) if shares[-1] > 0 else 1
        assert len(a) == k, name
        assert kept >= energy, name
        assert_best_approximation(a, b, delta, values, 1e-5)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_of_rank_and_energy_the_smaller_wins(backend):
    by_energy = len(cut("usual", backend, energy=0.5)[0])
    assert len(cut("usual", backend, energy=0.5, rank=by_energy + 1)[0]) == by_energy
    assert len(cut("usual", backend, energy=0.5, rank=by_energy - 1)[0]) == by_energy - 1


@pytest.mark.parametrize("backend", AVAILABLE)
def test_truncated_factors_are_balanced(backend):
    a, b, _, _, values = cut("odd d", backend, rank=4)
    expected = torch.diag(values[:4])
    for gram in (a.double() @ a.double().T, b.double().T @ b.double()):
        assert_within(gram, expected, float(values[0]))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_truncate_rounds_its_result_once(dtype, backend):
    a, b, _, delta, values = cut("usual", backend, dtype, rank=8)
    assert a.dtype == b.dtype == dtype
    exact_a, exact_b, *_ = cut("usual", backend, rank=8)
    rounded = exact_b.to(dtype).double() @ exact_a.to(dtype).double()
    best = exact_b.double() @ exact_a.double()
    error = float((b.double() @ a.double() - best).norm())
    assert error <= 2 * float((rounded - best).norm())
    assert_best_approximation(a, b, delta, values, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_truncate_keeps_what_is_left_after_cancellation(backend):
    """ΔW = B A - (B + E) A with a small E: float32 Grams or products would lose it."""
    case = CASES["odd d"]
    small = 1e-3 * torch.randn(33, 5, generator=torch.Generator().manual_seed(1))
    pair = (torch.cat([case.a[1], case.a[1]]), torch.cat([case.b[1], -(case.b[1] + small)], 1))
    delta = pair[1].double() @ pair[0].double()
    ((a, b),), (kept,) = ops.truncate([pair], rank=5, backend=backend)
    assert kept == pytest.approx(1.0, abs=1e-9)
    assert float((b.double() @ a.double() - delta).norm()) <= 1e-6 * float(delta.norm())


# block_products


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("ranks", [(1,), (2, 3), (16, 1, 20)])
def test_block_products(ranks, backend):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, sum(ranks), sum(ranks), generator=generator)
    x[1] *= 1e30  # products and sums are in float64
    y[1] *= 1e30
    found = ops.block_products(list(x), list(y), ranks, backend=backend)
    assert found.shape == (3, len(ranks), len(ranks))
    assert found.dtype == torch.float64
    for p in range(3):
        products = x[p].double() * y[p].double()
        for i, rows in enumerate(products.split(ranks)):
            for j, block in enumerate(rows.split(ranks, 1)):
                error = abs(float(found[p, i, j] - block.sum()))
                assert error <= 1e-13 * float(block.abs().sum())


def test_block_products_refuse_matrices_of_another_size():
    with pytest.raises(ValueError, match="does not fit the ranks"):
        ops.block_products([torch.ones(4, 4)], [torch.ones(4, 4)], (2, 3), backend="cpu")


# largest


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("top", [math.nan, math.inf, -math.inf, 3.5, -3.5])
def test_largest_finds_a_single_value(top, dtype, backend):
    plain = torch.full((3, 37), -0.25, dtype=dtype)
    for index in range(0, plain.numel(), 11):
        spoiled = plain.clone()
        spoiled.view(-1)[index] = top
        tensors = [plain, spoiled, -plain.T, spoiled.T, spoiled[:, ::2], plain[:, ::2], plain[:0]]
        found = ops.largest(tensors, backend=backend)
        in_slice = abs(top) if index % 37 % 2 == 0 else 0.25
        expected = [0.25, abs(top), 0.25, abs(top), in_slice, 0.25, 0.0]
        assert found.dtype == torch.float64
        assert torch.equal(found.nan_to_num(-1), torch.tensor(expected).double().nan_to_num(-1))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_largest_has_every_magnitude_exactly(dtype, backend):
    limits = torch.finfo(dtype)
    values = [0.0, limits.smallest_normal, limits.tiny / 2, limits.eps, 1.0, limits.max]
    tensors = [torch.tensor([-x, 0.0], dtype=dtype) for x in values]
    found = ops.largest(tensors, backend=backend)
    assert found.tolist() == [-float(x[0]) for x in tensors]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_nan_is_above_infinity(backend):
    x = torch.tensor([math.inf, math.nan, -math.inf])
    assert bool(ops.largest([x.flip(0), x, x[:1]], backend=backend)[:2].isnan().all())


@pytest.mark.parametrize("backend", AVAILABLE)
def test_largest_of_dtypes_side_by_side(backend):
    tensors = [torch.tensor([[2.0**-k]], dtype=dtype) for k, dtype in enumerate(DTYPES)]
    assert ops.largest(tensors, backend=backend).tolist() == [1.0, 0.5, 0.25]
    assert ops.largest([], backend=backend).tolist() == []


@pytest.mark.parametrize("backend", AVAILABLE)
def test_largest_of_no_elements_is_zero(backend):
    empty = torch.empty(0), torch.empty(3, 0).bfloat16()
    assert ops.largest(empty, backend=backend).tolist() == [0.0, 0.0]
    assert ops.largest([torch.ones(3), *empty], backend=backend).tolist() == [1.0, 0.0, 0.0]


# All ops


def run(op: str, backend: str, names=tuple(CASES)) -> list[Tensor]:
    """An op on several modules in one call, everything it returns in one list."""
    cases = [CASES[name] for name in names]
    a, b = [case.rows() for case in cases], [case.columns() for case in cases]
    c = [coefficients(p.rank, p.rank) for p in a]
    if op in ("gram", "block_gram"):
        return ops.call(op, [*a, *b], backend=backend)
    if op == "apply":
        return ops.apply([*c, *c], [*a, *b], torch.float32, backend=backend)
    if op.startswith("orthogonalize on"):
        penalty = op.split()[-1]
        grams = [g.float() for g in reference.gram(a)]
        ranks = [p.ranks for p in a]
        found, stats = ops.orthogonalize(grams, ranks, penalty=penalty, steps=1, backend=backend)
        return [*found, *stats]
    if op == "orthogonalize_factors":
        found, stats = ops.orthogonalize_factors(b, steps=1, backend=backend)
        return [*found, *stats]
    if op == "truncate":
        pairs = [(torch.cat(case.a), torch.cat(case.b, 1)) for case in cases]
        found, kept = ops.truncate(pairs, rank=5, backend=backend)
        return [*itertools.chain(*found), torch.tensor(kept)]
    omegas, blocks = [case.omegas for case in cases], reference.block_gram(b)
    full = reference.gram(b)
    found, norms = ops.apply_decouple(
        c, a, blocks, omegas, 2.0, torch.float32, full=full, backend=backend
    )
    return [*found, *norms]


OPS = [
    "gram",
    "block_gram",
    "apply",
    "orthogonalize on squared",
    "orthogonalize on frobenius",
    "apply_decouple",
]


@every_backend
@pytest.mark.parametrize("op", [*OPS, "orthogonalize_factors", "truncate"])
def test_the_same_call_twice_is_bitwise_equal(op, backend):
    first, second = run(op, backend), run(op, backend)
    assert len(first) >= len(CASES)
    assert all(map(torch.equal, first, second))


@every_backend
@pytest.mark.parametrize("op", [*OPS, "orthogonalize_factors"])
def test_one_call_for_all_modules_gives_what_single_calls_give(op, backend):
    names = ("tiny", "usual", "huge", "one adapter", "mixed sizes", "odd d")
    if op in ("gram", "block_gram", "apply"):
        names = tuple(CASES)
    together = run(op, backend, names)
    alone = [run(op, backend, (name,)) for name in names]
    sides = len(alone[0])
    for k, x in enumerate(together):
        y = alone[k % len(names)][k // len(names)]
        assert_within(x, y.double(), float(y.abs().max()))
    assert len(together) == sides * len(names)


@pytest.mark.parametrize("backend", registry.TABLE)
def test_no_problems_give_no_results(backend):
    """Whether the backend can run here or not: a group may have nothing for an op to do."""
    assert ops.gram([], backend=backend) == []
    assert ops.block_gram([], backend=backend) == []
    assert ops.apply([], [], torch.float32, backend=backend) == []
    c, stats = ops.orthogonalize([], [], backend=backend)
    assert c == []
    assert stats.shape == (0, 5)
    assert ops.apply_decouple([], [], [], [], 1.0, torch.float32, backend=backend) == ([], [])
    assert ops.truncate([], rank=1, backend=backend) == ([], [])


@contextlib.contextmanager
def set_as_of_old() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def set_by_device() -> Iterator[None]:
    """After which torch refuses to tell its setting of old."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this torch has no setting by device")
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("reduced", [set_as_of_old, set_by_device])
def test_products_have_the_precision_of_float32_whatever_the_caller_allows(reduced, monkeypatch):
    """Code that trains often allows TF32 or bfloat16 products: not in a merge."""
    ops_of_products = "gram", "apply", "apply_decouple", "orthogonalize on squared"
    for op in ops_of_products:
        run(op, "torch", ("usual",))
    seen = set()
    matmul = Tensor.__matmul__

    def watched(x: Tensor, y: Tensor) -> Tensor:
        seen.add(x.dtype)
        return matmul(x, y)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    with reduced():
        for op in ops_of_products:
            run(op, "torch", ("usual",))
        delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
        assert all(x.dtype == torch.float32 for x in compress(delta, 4, None)[:2])
    assert seen == {torch.float64}


# Input that does not fit

P = CASES["odd d"].rows()
REFUSED = {
    "a Gram of (9, 9) does not fit": lambda: ops.orthogonalize([torch.eye(9)], [(3, 5, 2)]),
    "C must be [K, 10]": lambda: ops.apply([torch.eye(9)], [P], torch.float32),
    "C must be [K, 10], got (10,)": lambda: ops.apply([torch.ones(10)], [P], torch.float32),
    "do not fit the ranks": lambda: ops.apply_decouple(
        [None], [P], [torch.zeros(37)], [[1.0] * 3], 1.0, torch.float32
    ),
    "omegas do not fit": lambda: ops.apply_decouple(
        [None], [P], [torch.zeros(38)], [[1.0] * 2], 1.0, torch.float32
    ),
    "do not multiply": lambda: ops.truncate([(torch.ones(3, 4), torch.ones(5, 2))], rank=1),
    "one scale a block": lambda: ops.gram([Side(P.blocks, (1.0,))]),
    "a side needs": lambda: ops.gram([Side((), ())]),
    "blocks must be [r_i, 61]": lambda: ops.gram([Side((P.blocks[0], torch.ones(2, 60)), (1, 1))]),
    "floating point": lambda: ops.gram([Side((torch.ones(2, 3, dtype=torch.int8),), (1.0,))]),
    "in one side": lambda: ops.gram(
        [Side((torch.ones(2, 3), torch.ones(2, 3, device="meta")), (1.0, 1.0))]
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused(words):
    with pytest.raises(ValueError, match=re.escape(words)):
        REFUSED[words]()


def anywhere(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix on another device than all others."""
    return torch.ones(shape, dtype=dtype, device="meta")


AWAY = Side((anywhere(3, 4), anywhere(2, 4)), (1.0, 1.0))
HERE = Side((torch.ones(3, 4), torch.ones(2, 4)), (1.0, 1.0))
K, SQUARE = torch.ones(13, dtype=torch.float64), torch.eye(5)
TRIMS, DRAW = [Trim(), Trim()], Draw(1, 2, (0, 1))


def decouple_of(c: Tensor, side: Side, k: Tensor, full: Tensor) -> object:
    return ops.apply_decouple(
        [c], [side], [k], [[0.5, 0.5]], 1.0, torch.float32, full=[full], backend="torch"
    )


ELSEWHERE: dict[str, Callable[[], object]] = {
    "gram": lambda: ops.gram([HERE, AWAY]),
    "block_gram": lambda: ops.block_gram([AWAY, HERE]),
    "block_products": lambda: ops.block_products([SQUARE], [anywhere(5, 5)], [3, 2]),
    "block_products: stacks": lambda: ops.block_products(SQUARE[None], anywhere(1, 5, 5), [3, 2]),
    "orthogonalize": lambda: ops.orthogonalize([SQUARE, anywhere(5, 5)], [[3, 2]] * 2),
    "orthogonalize_factors": lambda: ops.orthogonalize_factors([HERE, AWAY]),
    "apply: X": lambda: ops.apply([SQUARE, None], [HERE, AWAY], torch.float32),
    "apply: C": lambda: ops.apply([None, anywhere(5, 5)], [HERE, HERE], torch.float32),
    "apply_decouple: C": lambda: decouple_of(anywhere(5, 5), HERE, K, SQUARE),
    "apply_decouple: X": lambda: decouple_of(SQUARE, AWAY, K, SQUARE),
    "apply_decouple: blocks": lambda: decouple_of(
        SQUARE, HERE, anywhere(13, dtype=torch.float64), SQUARE
    ),
    "apply_decouple: full": lambda: decouple_of(SQUARE, HERE, K, anywhere(5, 5)),
    "truncate": lambda: ops.truncate([(torch.ones(3, 4), anywhere(5, 3))], rank=1),
    "largest": lambda: ops.largest([torch.ones(3), anywhere(3)]),
    "block_largest": lambda: ops.block_largest([HERE, AWAY]),
    "entry_counts": lambda: ops.entry_counts(HERE, AWAY),
    "entry_sums": lambda: ops.entry_sums(HERE, AWAY, TRIMS, DRAW),
    "entry_merge": lambda: ops.entry_merge(AWAY, HERE, TRIMS, [1.0, 1.0], Election(), DRAW),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_on_another_device_is_refused(name):
    with pytest.raises(ValueError, match=r"^tensors on cpu and on meta in one call; bring all to"):
        ELSEWHERE[name]()


def test_every_op_refuses_what_is_on_another_device():
    assert {name.split(":")[0] for name in ELSEWHERE} == set(registry.OPS)


# Sides of several modules


def of_several(seeds: Sequence[int], transposed: bool, d: int) -> Side:
    """The side of modules alike, whose blocks are stored as adapters' A's are, or as their B's."""
    ranks, scales = (3, 2), (1.5, 1.0)
    made = [random_case(ranks, d, d, seed=seed) for seed in seeds]
    blocks = [x for case in made for x in (case.b if transposed else case.a)]
    return Side.of(blocks, scales, ranks, d, transposed, count=len(seeds))


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if ":" not in str(b)])
@pytest.mark.parametrize("transposed", [False, True])
def test_sides_of_several_modules_are_as_good_as_one_by_one(backend, transposed):
    """To the bit, beside sides of another size and of one module."""
    several = [of_several([1, 2, 3], transposed, 23), of_several([4], transposed, 64)]
    sides = [*several, of_several([5], transposed, 19).each()[0]]
    given = [[x] if x.count is None else x.each() for x in sides]
    singles = [one for x in given for one in x]
    grams = ops.gram(sides, backend=backend)
    turns, stats = ops.orthogonalize(grams, [x.ranks for x in sides], backend=backend)
    own = ops.gram(singles, backend=backend)
    own_turns, own_stats = ops.orthogonalize(own, [x.ranks for x in singles], backend=backend)
    packed = ops.block_gram(sides, backend=backend)
    own_packed = ops.block_gram(singles, backend=backend)
    pairs = [
        (grams, own),
        (turns, own_turns),
        (packed, own_packed),
        (
            ops.apply(turns, sides, torch.bfloat16, backend=backend),
            ops.apply(own_turns, singles, torch.bfloat16, backend=backend),
        ),
        (
            ops.apply([None] * 3, sides, torch.float32, backend=backend),
            ops.apply([None] * 5, singles, torch.float32, backend=backend),
        ),
    ]
    for full in (None, grams):
        whole = None if full is None else [x.double() for x in own]
        of_sides = full and [x.double() for x in full]
        common = 0.5, torch.float32
        a, norms = ops.apply_decouple(
            turns, sides, packed, [(0.7, 0.3)] * 3, *common, full=of_sides, backend=backend
        )
        own_a, own_norms = ops.apply_decouple(
            own_turns, singles, own_packed, [(0.7, 0.3)] * 5, *common, full=whole, backend=backend
        )
        pairs += [(a, own_a), (norms, own_norms)]
    for found, expected in pairs:
        each = [y for x, s in zip(found, sides) for y in ([x] if s.count is None else x)]
        for x, y in zip(each, expected, strict=True):
            assert torch.equal(x, y)
    assert torch.equal(stats, own_stats)
    tops = [ops.block_largest(x, backend=backend) for x in (sides, singles)]
    assert torch.equal(*tops)
