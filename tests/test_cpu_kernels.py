"""The C++ kernels, on every instruction set of this machine, against float64 computations.

Fresh memory is NaN in all of these tests: what a kernel leaves unwritten shows.
"""

from __future__ import annotations

import functools

import pytest
import torch
from support.close import assert_close
from support.shapes import CASES, SIDES, exact, random_case
from torch import Tensor

from domerge_fast import _C
from domerge_fast.algebra.side import Side
from domerge_fast.backends import (
    cpu,
    descent,
    factor_descent,
    long_products,
    paper,
    reference,
)
from domerge_fast.backends import torch as library

pytestmark = pytest.mark.usefixtures("nan_poison")

HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(HALF_UNIT)
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "baseline")
PENALTIES = ("squared", "frobenius")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if request.param not in _C.isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("DOMERGE_CPU_ISA", request.param)
    assert _C.isa() == request.param
    return request.param


# What is expected does not depend on the instruction set: it is computed once.


@functools.cache
def problems(side: str, dtype: torch.dtype) -> dict[str, Side]:
    """Every case whose numbers the dtype can hold."""
    found = {name: SIDES[side](case, dtype) for name, case in CASES.items()}
    return {n: p for n, p in found.items() if all(b.isfinite().all() for b in p.blocks)}


@functools.cache
def stacked(problem: Side) -> Tensor:
    return torch.cat(exact(problem))


def coefficients(k: int, r: int, seed: int = 0) -> Tensor:
    return torch.randn(k, r, generator=torch.Generator().manual_seed(seed))


def assert_within(result: Tensor, expected: Tensor, allowed: Tensor, name: str) -> None:
    """|result - expected| <= allowed, entry by entry; equal where not finite."""
    difference = (result.double() - expected.double()).abs()
    same = result.double() == expected.double()
    good = same | (difference <= allowed)
    assert good.all(), f"{name}: {difference[~good].max():.3g}, {allowed[~good].min():.3g} allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_gram(isa, side, dtype):
    chosen = problems(side, dtype)
    single = cpu.gram(list(chosen.values()))
    double = cpu.gram(list(chosen.values()), torch.float64)
    for (name, p), g32, g64 in zip(chosen.items(), single, double, strict=True):
        x = stacked(p)
        sizes = x.norm(dim=1)
        scale = sizes[:, None] * sizes
        assert g32.dtype == torch.float32
        assert torch.equal(g32, g32.T), name
        assert_within(g32, x @ x.T, 1e-6 * scale, name)
        assert_within(g64, x @ x.T, 1e-14 * scale, name)


@functools.cache
def block_gram(problem: Side) -> Tensor:
    return reference.block_gram([problem])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_block_gram(isa, side, dtype):
    chosen = problems(side, dtype)
    results = cpu.block_gram(list(chosen.values()))
    for (name, p), packed in zip(chosen.items(), results, strict=True):
        expected = block_gram(p)
        assert_within(packed, expected, 1e-13 * expected.abs().max().expand_as(packed), name)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_apply(isa, side, dtype, out_dtype):
    chosen = problems(side, dtype)
    for shape in ("identity", "square", "truncating", "widening"):
        cs = []
        for p in chosen.values():
            k = {"square": p.rank, "truncating": (p.rank + 1) // 2, "widening": p.rank + 3}
            cs.append(None if shape == "identity" else coefficients(k[shape], p.rank))
        results = cpu.apply(cs, list(chosen.values()), out_dtype)
        for (name, p), c, y in zip(chosen.items(), cs, results, strict=True):
            x = stacked(p)
            full = torch.eye(p.rank).double() if c is None else c.double()
            expected = full @ x
            rounding = HALF_UNIT[out_dtype] * expected.abs() + 2.0**-25
            if out_dtype is not torch.float16:
                rounding = HALF_UNIT[out_dtype] * expected.abs()
            two_parts = isa == "amx" and dtype is torch.bfloat16 and out_dtype is not torch.float32
            arithmetic = (2.0**-16 if two_parts else 1e-6) * (full.abs() @ x.abs())
            assert y.dtype == out_dtype
            assert (y.T if p.in_columns else y).is_contiguous(), name
            inside = expected.to(out_dtype).isfinite()
            allowed = torch.where(inside, 1.01 * rounding + arithmetic, 0.0)
            assert_within(y, expected.to(out_dtype).where(~inside, expected), allowed, name)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_long_products_are_the_same_with_any_number_of_threads(isa, out_dtype):
    """Beside one that the kernel makes, and one without C; C of more rows than a block's. With
    numbers in two parts where the result has 16 bits and there are such products."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1500, 70, generator=generator)
    long = Side(tuple(x.split([900, 600])), (0.5, -2.0))
    one, short = Side((x,), (1.0,)), Side((x[:30],), (3.0,))
    cs = [coefficients(290, 1500), None, coefficients(8, 30), coefficients(10, 1500, seed=1)]
    sides = [long, long, short, one]
    assert [long_products.is_long(c, p) for c, p in zip(cs, sides, strict=True)] == [1, 0, 0, 1]
    usual = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(cpu.apply(cs, sides, out_dtype))
    torch.set_num_threads(usual)
    for c, p, y, again in zip(cs, sides, *results, strict=True):
        full = torch.eye(p.rank).double() if c is None else c.double()
        expected = full @ stacked(p)
        assert y.dtype == out_dtype
        assert torch.equal(y, again)
        sums = full.abs() @ stacked(p).abs()
        in_parts = _C.half_long_products() and out_dtype is not torch.float32
        share = 2.0**-16 if in_parts else 1e-6
        allowed = HALF_UNIT[out_dtype] * 1.01 * expected.abs() + share * sums + 2.0**-25
        assert_within(y, expected, allowed, "a product")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(1100, 33, 70), (4200, 300, 550), (1, 1, 1)])
def test_long_products_lose_little(isa, shape, half):
    """Sums beyond what is packed at once, and more rows and columns than a block's; none of whole
    squares. Rounded to bfloat16, the numbers of those in parts would be 2^-9 off."""
    if half and not _C.half_long_products():
        pytest.skip("this instruction set has none that are faster")
    share = 2.0**-16 if half else 1e-6
    depth, rows, columns = shape
    generator = torch.Generator().manual_seed(depth)
    left = torch.randn(depth, rows, generator=generator)
    right = torch.randn(depth, columns, generator=generator)
    found = torch.full((rows + 1, columns), 7.0)
    _C.long_product(left.data_ptr(), right.data_ptr(), *shape, found.data_ptr(), half, 2)
    assert (found[rows] == 7).all()
    expected = left.double().T @ right.double()
    most = share * (left.abs().double().T @ right.abs().double())
    assert_within(found[:rows], expected, most, "a product")
    assert float((found[:rows] - expected).norm()) <= share * float(expected.norm())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_conversions_are_exact(isa, half):
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(half)[None]
    up = cpu.apply([None], [Side((every,), (1.0,))], torch.float32)[0]
    torch.testing.assert_close(up, every.float(), rtol=0, atol=0, equal_nan=True)
    generator = torch.Generator().manual_seed(0)
    low, high = -(2**31), 2**31 - 1
    bits = torch.randint(low, high, (100_003,), generator=generator, dtype=torch.int64)
    middles = torch.arange(65536) * 65536 + 32768 - 2**31
    near = (every.float().view(torch.int32).long() + torch.tensor([[4096], [-1], [1]])).flatten()
    floats = torch.cat([bits, middles, near]).to(torch.int32).view(torch.float32)[None]
    down = cpu.apply([None], [Side((floats,), (1.0,))], half)[0]
    torch.testing.assert_close(down, floats.to(half), rtol=0, atol=0, equal_nan=True)


@functools.cache
def cross_energy(problem: Side) -> float:
    return paper._cross_energy(exact(problem))


@functools.cache
def loss_before(problem: Side, penalty: str, gamma: float) -> float:
    return float(paper.loss(exact(problem), exact(problem), penalty, gamma))


@functools.cache
def first_steps(problem: Side, penalty: str) -> tuple[list[Tensor], list[float]]:
    return paper.descend(exact(problem), penalty, 1.0, 3, 0.0)


@functools.cache
def after_thirty_steps(problem: Side, penalty: str) -> float:
    """The objective, from the same descent in float64."""
    x = stacked(problem)
    stats = descent.in_gram_form((x @ x.T)[None], problem.ranks, penalty, 1.0, 30, 0.0)[1]
    return float(stats[0, 2])


@functools.cache
def wide_problem(columns: bool, dtype: torch.dtype) -> Side:
    """600 rows of 525 columns, of 150 adapters whose norms spread over a factor of 6."""
    generator = torch.Generator().manual_seed(1)
    shared, sizes = torch.randn(4, 525, generator=generator), torch.logspace(-0.8, 0, 150)
    blocks = [
        (size * (torch.randn(4, 525, generator=generator) + 0.5 * shared)).to(dtype)
        for size in sizes
    ]
    stored = [x.T.contiguous().T if columns else x for x in blocks]
    return Side(tuple(stored), tuple((0.5, -2.0, 1.0)[i % 3] for i in range(150)))


@functools.cache
def moved_in_float64(problem: Side, steps: int, tol: float) -> tuple[Tensor, Tensor]:
    return factor_descent.in_factor_form(stacked(problem), problem.ranks, 1.0, steps, tol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [False, True])
def test_the_descent_on_factors(isa, columns, dtype):
    problem = wide_problem(columns, dtype)
    (result,), stats = cpu.orthogonalize_factors([problem], 1.0, 4, 0.0)
    expected, found = moved_in_float64(problem, 4, 0.0)
    assert_close(result.double(), expected, 1e-5)
    assert stats[0].tolist() == pytest.approx(found.tolist(), rel=1e-4)


@pytest.mark.parametrize("tol", [1e-3, factor_descent.HALF_TOL])
def test_products_of_bfloat16_numbers_end_within_tol_of_the_optimum(isa, tol):
    problem = wide_problem(False, torch.bfloat16)
    (result,), stats = cpu.orthogonalize_factors([problem], 1.0, 50, tol)
    _, best = moved_in_float64(problem, 300, 1e-13)
    x = exact(problem)
    true = float(paper.loss(list(result.double().split(list(problem.ranks))), x))
    assert float(best[2]) <= true * (1 + 1e-9)
    assert true <= (1 + tol) * float(best[2])
    assert stats[0, 2] == pytest.approx(true, rel=2e-4)
    assert stats[0, 1] == pytest.approx(float(best[1]), rel=1e-3)


def test_products_of_bfloat16_numbers_are_made_where_the_tolerance_allows(monkeypatch):
    if not _C.half_products():
        pytest.skip("this machine has none that are faster")
    asked = []
    made = cpu._C.orthogonalize_factors

    def record(problems, out, stats, half, *rest):
        asked.append((half, len(out)))
        made(problems, out, stats, half, *rest)

    monkeypatch.setattr(cpu._C, "orthogonalize_factors", record)
    one_dominates = [x.clone() for x in wide_problem(False, torch.float32).blocks[:140]]
    one_dominates[0] *= 50
    problems = [
        wide_problem(False, torch.bfloat16),
        Side(tuple(x[:, :100] for x in wide_problem(False, torch.bfloat16).blocks), (1.0,) * 150),
        Side(tuple(one_dominates), (1.0,) * 140),
    ]
    cpu.orthogonalize_factors(problems, 1.0, 2, 1e-3)
    cpu.orthogonalize_factors(problems, 1.0, 2, factor_descent.HALF_TOL / 2)
    assert asked == [(True, 2), (False, 2), (False, 3)]


def test_the_descent_on_factors_does_not_depend_on_the_threads(isa):
    """One problem that takes all of them, and two that are each on one."""
    if isa == "baseline":
        pytest.skip("takes long")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1000, 1024, generator=generator)
    large = Side.split(x, (8,) * 125)
    problems = [large, wide_problem(False, torch.float32), wide_problem(True, torch.bfloat16)]
    usual = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results, stats = cpu.orthogonalize_factors(problems, 1.0, 2, 1e-3)
            found.append([*results, stats])
    finally:
        torch.set_num_threads(usual)
    assert all(map(torch.equal, *found))


def literal(problem: Side, c: Tensor, penalty: str, gamma: float) -> tuple[float, float, float]:
    """Loss, share of the cross energy left and relative change of C X, from X itself."""
    x = exact(problem)
    moved = c.double() @ torch.cat(x)
    x_hat = list(moved.split(list(problem.ranks)))
    energy = cross_energy(problem)
    left = paper._cross_energy(x_hat) / energy if energy > 0 else 0.0
    size = float(torch.cat(x).norm())
    change = float((moved - torch.cat(x)).norm()) / size if size > 0 else 0.0
    return float(paper.loss(x_hat, x, penalty, gamma)), left, change


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("gamma", [1.0, 0.01])
def test_the_descent_reports_the_truth_and_never_rises(isa, penalty, gamma):
    for side in SIDES:
        chosen = problems(side, torch.float32)
        grams = cpu.gram(list(chosen.values()))
        ranks = [p.ranks for p in chosen.values()]
        cs, stats = cpu.orthogonalize(grams, ranks, penalty, gamma, 20, 1e-6)
        for (name, p), c, row in zip(chosen.items(), cs, stats.tolist(), strict=True):
            steps, before, after, left, change = row
            loss, true_left, true_change = literal(p, c, penalty, gamma)
            start = loss_before(p, penalty, gamma)
            assert before == pytest.approx(start, rel=1e-4), name
            assert after == pytest.approx(loss, rel=1e-3, abs=1e-5 * start), name
            assert after <= before, name
            assert left == pytest.approx(true_left, rel=1e-2, abs=1e-5), name
            assert change == pytest.approx(true_change, rel=1e-3, abs=1e-5), name
            assert 0 <= steps <= 20


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_first_steps_are_those_of_the_reference(isa, penalty):
    for name, p in problems("rows", torch.float32).items():
        c, stats = cpu.orthogonalize(cpu.gram([p]), [p.ranks], penalty, 1.0, 3, 0.0)
        x_hat, expected = first_steps(p, penalty)
        size = float(stacked(p).norm())
        error = float((c[0].double() @ stacked(p) - torch.cat(x_hat)).norm())
        assert error <= 2e-4 * size, f"{name}: {error / size}"
        assert stats[0, 2] == pytest.approx(expected[2], rel=1e-4), name


@pytest.mark.parametrize("penalty", PENALTIES)
def test_thirty_steps_get_as_far_as_in_float64(isa, penalty):
    for name in ("usual", "odd d", "rank 1 before 64", "64 adapters", "zero factors"):
        p = problems("columns", torch.float32)[name]
        row = cpu.orthogonalize(cpu.gram([p]), [p.ranks], penalty, 1.0, 30, 0.0)[1][0]
        assert row[2] <= after_thirty_steps(p, penalty) * (1 + 2e-3), name


@pytest.mark.parametrize("penalty", PENALTIES)
def test_nothing_to_descend_on(isa, penalty):
    lone = torch.randn(5, 9)
    apart = torch.block_diag(torch.eye(3), 2 * torch.eye(4))
    grams = [lone @ lone.T, apart, torch.zeros(6, 6), torch.ones(1, 1)]
    cs, stats = cpu.orthogonalize(grams, [(5,), (3, 4), (2, 4), (1,)], penalty)
    for c in cs:
        assert torch.equal(c, torch.eye(len(c)))
    assert stats[:, [0, 3, 4]].eq(0).all()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_descent_does_not_see_the_scale(isa, penalty):
    g = cpu.gram([CASES["usual"].rows()])[0]
    ranks = [CASES["usual"].ranks] * 3
    cs, stats = cpu.orthogonalize([g, g * 2.0**-40, g * 2.0**40], ranks, penalty)
    assert torch.equal(cs[0], cs[1])
    assert torch.equal(cs[0], cs[2])
    assert stats[0, 1] * 2.0**40 == stats[2, 1]


def columns_of(case, c: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """C A of every adapter and its B, in float64."""
    a = (c.double() @ torch.cat(exact(case.rows()))).split(list(case.ranks))
    return list(a), case.exact_b()


def somehow(rank: int) -> Tensor:
    return torch.eye(rank) + 0.05 * coefficients(rank, rank)


@functools.cache
def grams_of_b(name: str) -> tuple[Tensor, Tensor]:
    """The adapters' own, packed, and the whole one."""
    b = CASES[name].columns()
    return reference.block_gram([b])[0], reference.gram([b])[0]


@functools.cache
def literal_decouple(name: str, given: bool, scale: float, renormalize: bool) -> tuple[Tensor, ...]:
    """Merged ΔW [m, n] and the adapters' norms, from the dense deltas."""
    case = CASES[name]
    rank = sum(case.ranks)
    c = somehow(rank) if given else torch.eye(rank)
    deltas = [b @ a for a, b in zip(*columns_of(case, c), strict=True)]
    norms = torch.stack([d.norm(dim=0) for d in deltas])
    omega = torch.tensor(case.omegas).double()
    merged = (omega.abs()[:, None] * norms).sum(0)
    unit = [torch.where(n > 0, d / n, 0.0) for d, n in zip(deltas, norms, strict=True)]
    direction = sum(w * u for w, u in zip(omega, unit, strict=True))
    if renormalize:
        length = direction.norm(dim=0)
        direction = torch.where(length > 1e-6, direction / length, 0.0)
    return scale * direction * merged, norms.square().sum(1).sqrt()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_apply_decouple(isa, given, renormalize):
    for name, case in CASES.items():
        b = case.columns()
        packed, full = grams_of_b(name)
        (a,), (norms,) = cpu.apply_decouple(
            [somehow(b.rank) if given else None],
            [case.rows()],
            [packed],
            [case.omegas],
            1.7,
            torch.float32,
            [full] if renormalize else None,
        )
        expected, expected_norms = literal_decouple(name, given, 1.7, renormalize)
        merged = torch.cat(exact(b)).T @ a.double()
        size = expected.norm(dim=0) + 1e-12 * expected.norm()
        # Where B_i has fewer rows than columns, or parts cancel, rounding in a is magnified.
        off = ((merged - expected).norm(dim=0) / size.clamp_min(1e-300)).median()
        assert off <= 1e-5, f"{name}: {off}"
        torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_decouple_dtypes(isa, dtype, out_dtype):
    case = CASES["odd d"]
    c = coefficients(10, 10)
    packed = reference.block_gram([case.columns()])
    arguments = ([c], [case.rows(dtype)], packed, [case.omegas], 1.0)
    (a,), (norms,) = cpu.apply_decouple(*arguments, out_dtype)
    (expected,), (expected_norms,) = reference.apply_decouple(*arguments, torch.float64)
    rounding = HALF_UNIT[out_dtype] * expected.abs() + 1e-5 * expected.norm(dim=0)
    assert_within(a, expected, rounding, f"{dtype} -> {out_dtype}")
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)


def test_a_zero_column_of_one_adapter_has_no_direction(isa):
    case = CASES["zero columns"]
    packed = reference.block_gram([case.columns()])
    (a,), _ = cpu.apply_decouple([None], [case.rows()], packed, [case.omegas], 1.0, torch.float32)
    assert a[:, 0].eq(0).all()
    assert a[3:, 5].eq(0).all()
    assert a[:3, 5].ne(0).all()


def every_result(case, dtype: torch.dtype) -> list[Tensor]:
    """All that the ops say about two copies of a long case and a few short ones."""
    sides = [case.rows(dtype), case.columns(dtype), CASES["odd d"].rows(), CASES["usual"].columns()]
    grams = cpu.gram(sides)
    ranks = [p.ranks for p in sides]
    cs, stats = cpu.orthogonalize(grams, ranks, "frobenius", 1.0, 8, 1e-6)
    packed = cpu.block_gram([case.columns(dtype)])
    full = cpu.gram([case.columns(dtype)], torch.float64)
    a, norms = cpu.apply_decouple(
        cs[:1], sides[:1], packed, [case.omegas], 1.0, torch.bfloat16, full
    )
    return [*grams, *cs, stats, *packed, *full, *cpu.apply(cs, sides, dtype), *a, *norms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeatable_for_any_number_of_threads(isa, dtype, threads):
    case = random_case((9, 1, 16, 4), 9001, 8200)
    threads(1)
    expected = every_result(case, dtype)
    for count in (1, 2, 3, 7):
        threads(count)
        for one, other in zip(every_result(case, dtype), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("side", SIDES)
def test_blocks_of_any_stride(isa, side):
    x = torch.randn(40, 60)
    strange = (x[::2, ::3], x[1:4, 5:25], x[5:25, 1:4].T, x[:1, :20], x[:20, :1].T)
    first = strange[1].contiguous() if side == "rows" else strange[2].T.contiguous().T
    p = Side((first, *strange), (1.0, 0.5, 2.0, -1.0, 3.0, 1.0))
    assert p.in_columns == (side == "columns")
    dense = stacked(p)
    assert_close(cpu.gram([p], torch.float64)[0], dense @ dense.T, 1e-14)
    assert torch.equal(cpu.apply([None], [p], torch.float32)[0], dense.float())


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_results_are_seen_to_be_finite_where_they_are(isa, columns, given, out_dtype):
    """Of a side of two modules, of one whose last number is not finite, and of one whose last is
    beyond the dtype once it is rounded, or beyond float32 once it is scaled."""
    generator = torch.Generator().manual_seed(3)
    top = torch.finfo(out_dtype).max
    beyond = top if out_dtype == torch.float32 else top * (1 + 0.8 * HALF_UNIT[out_dtype])
    scale = 2.0 if out_dtype == torch.float32 else 1.0
    for last in (1.0, float("nan"), float("inf"), -beyond, 0.9 * top / scale):
        blocks = [torch.randn(r, 70, generator=generator) for r in (5, 3)]
        blocks[1][-1, -1] = last
        if columns:
            blocks = [b.T.contiguous().T for b in blocks]
        side = Side(blocks, (1.0, scale))
        finite: list[Tensor] = []
        c = torch.eye(8) if given else None
        calm = Side([torch.ones(2, 20), torch.ones(4, 20)], (1.0, 1.0))
        found = cpu.apply([c, None], [side, calm], out_dtype, finite)
        expected = [x for x in found if bool(x.isfinite().all())]
        assert [*map(id, finite)] == [*map(id, expected)]
        assert (last in (1.0, 0.9 * top / scale)) == (finite[0] is found[0])
        if not columns and last != -beyond:
            k = torch.ones(34, dtype=torch.float64)
            finite = []
            (a,), _ = cpu.apply_decouple(
                [c], [side], [k], [[1.0, 1.0]], 1.0, out_dtype, None, finite
            )
            assert bool(finite) == bool(a.isfinite().all())


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("d", [1, 15, 16, 17, 65, 3073])
def test_without_coefficients_every_number_is_scaled_and_rounded_once(isa, columns, d):
    """Of blocks of one dtype and of several; all but the first are slices of a larger matrix."""
    generator = torch.Generator().manual_seed(d)
    for ranks, kinds in (((4,), DTYPES), ((16, 16), DTYPES), ((1, 8, 3), DTYPES), ((9, 2), [None])):
        for dtype in kinds:
            blocks = []
            for k, r in enumerate(ranks):
                shape = (d, r + k) if columns else (r, d + k)
                whole = torch.randn(shape, generator=generator).to(dtype or DTYPES[k])
                blocks.append(whole[:, :r].T if columns else whole[:, :d])
            scales = tuple(0.75 - k for k in range(len(ranks)))
            for out_dtype in DTYPES:
                (found,) = cpu.apply([None], [Side(blocks, scales)], out_dtype)
                parts = [(b.float() * s).to(out_dtype) for b, s in zip(blocks, scales)]
                assert torch.equal(found, torch.cat(parts))


def test_mixed_dtypes_in_one_problem(isa):
    x = [torch.randn(3, 50), torch.randn(2, 50).bfloat16(), torch.randn(4, 50).half()]
    p = Side((*x, torch.randn(2, 50).double()), (1.0, 2.0, 0.5, 1.0))
    c = coefficients(5, 11)
    expected = c.double() @ stacked(p)
    y = cpu.apply([c], [p], torch.float32)[0]
    assert_within(y, expected, 1e-6 * (c.double().abs() @ stacked(p).abs()), "mixed")


def test_large_ranks_go_to_the_library(monkeypatch):
    monkeypatch.setattr(cpu, "MAX_DESCENT_RANK", 16)
    small, large = CASES["odd d"].rows(), CASES["usual"].rows()
    grams, ranks = cpu.gram([large, small]), [large.ranks, small.ranks]
    cs, stats = cpu.orthogonalize(grams, ranks)
    big, big_stats = library.orthogonalize(grams[:1], ranks[:1])
    own, own_stats = cpu.orthogonalize(grams[1:], ranks[1:])
    assert torch.equal(cs[0], big[0])
    assert torch.equal(cs[1], own[0])
    assert torch.equal(stats, torch.cat([big_stats, own_stats]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("top", [float("nan"), float("inf"), float("-inf"), -2.0])
def test_largest(isa, dtype, top):
    tensors = [torch.full((37,), 0.5, dtype=dtype) for _ in range(38)]
    for i, x in enumerate(tensors[:37]):
        x[i] = top
    expected = torch.tensor([abs(top)] * 37 + [0.5]).double()
    assert torch.equal(cpu.largest(tensors).nan_to_num(-1), expected.nan_to_num(-1))
    long = torch.zeros(3, 1 << 19, dtype=dtype).T
    assert cpu.largest([long, long[::2]]).tolist() == [0.0, 0.0]
    long[-2, 1] = top
    expected = torch.tensor([abs(top), abs(top), 0.0]).double().nan_to_num(-1)
    assert torch.equal(cpu.largest([long, long[::2], long[1::2]]).nan_to_num(-1), expected)


@pytest.mark.parametrize("name", [*(n for n in ISAS if n not in _C.isas()), "avx1024"])
def test_an_instruction_set_that_cannot_run_is_an_error(name, monkeypatch):
    monkeypatch.setenv("DOMERGE_CPU_ISA", name)
    with pytest.raises(RuntimeError, match=rf"^DOMERGE_CPU_ISA={name} cannot run.*baseline") as e:
        cpu.gram([CASES["usual"].rows()])
    assert "\n" not in str(e.value)


def test_no_problems():
    assert cpu.gram([]) == []
    assert cpu.block_gram([]) == []
    assert cpu.apply([], [], torch.float32) == []
    assert cpu.apply_decouple([], [], [], [], 1.0, torch.float32) == ([], [])
    assert cpu.orthogonalize([], [])[0] == []
    assert cpu.largest([]).tolist() == []
