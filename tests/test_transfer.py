"""What goes to a device and in which groups; the copies themselves need one (test_gpu.py)."""

from __future__ import annotations

import math

import pytest
import torch
from support.make import write_adapter
from support.merges import adapters, at_one
from support.shapes import CASES, random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast import OptionError
from domerge_fast.adapters.plan import Plan
from domerge_fast.algebra.host import gather, norms_apart, over_diagonals, within
from domerge_fast.engine import group, interference, reader, transfer
from domerge_fast.options import size

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


def dense() -> list[torch.Tensor]:
    wide = torch.randn(3, 5, generator=GENERATOR)
    return [wide, wide.half().T, wide[:1].bfloat16(), torch.randn(0, 4), wide[:, 0].contiguous()]


def test_packed_tensors_come_out_as_they_went_in():
    tensors = dense()
    buffer, offsets = transfer.pack(tensors, pin=False)
    assert all(at % transfer.ALIGNMENT == 0 for at in offsets)
    for found, given in zip(transfer.unpack(buffer, offsets, tensors), tensors, strict=True):
        assert torch.equal(found, given)
        assert (found.dtype, found.stride()) == (given.dtype, given.stride())
        if given.numel():
            assert found.untyped_storage().data_ptr() == buffer.data_ptr()


def test_gathered_tensors_are_themselves_on_the_host():
    tensors = [None, torch.ones(2)]
    assert gather(tensors) == tensors


@pytest.mark.parametrize("report", ["full", "norms", "none"])
@pytest.mark.parametrize("method", ["do", "linear", "tsvm"])
def test_no_gram_is_brought_to_the_host(method, report, monkeypatch):
    """Of usual modules, and of those that are brought near 1, with and without Grams at first."""
    brought: list[tuple[int, ...]] = []

    def gathered(tensors):
        brought.extend(tuple(x.shape) for x in tensors if x is not None)
        return gather(tensors)

    def copied(x):
        brought.append(tuple(x.shape))
        return x.to(CPU)

    for module in (group, interference):
        monkeypatch.setattr(module, "gather", gathered)
    monkeypatch.setattr(Tensor, "cpu", copied)
    shapes = {"one": (61, 33), "alike": (61, 33), "far": (61, 33), "wide": (6, 7), "both": (6, 7)}
    cases = {name: random_case((3, 5, 2), *shape) for name, shape in shapes.items()}
    for x in cases["far"].a + cases["both"].a:
        x *= 1e-12
    at_one(adapters(cases), method, report=report)
    assert any(shape[-1] == 10 for shape in brought)
    assert not [shape for shape in brought if shape[-2:] == (10, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("value", "expected"), [(1.0, True), (4.0, True), (4.5, False), (0.5, False), (math.nan, False)]
)
def test_diagonals_within_bounds(dtype, value, expected):
    grams = torch.zeros(6, 5, 5, dtype=dtype)
    squares = grams.diagonal(dim1=1, dim2=2)
    squares.fill_(2.0)
    grams[4, 3, 3], grams[5] = value, math.inf
    for given in (squares, squares.contiguous(), squares.T.contiguous().T):
        assert within(given[:5, :4], 1.0, 4.0) is expected
        assert within(given[:4], 1.0, 4.0)
        assert not within(given, 1.0, 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_how_far_norms_are_apart(dtype):
    """Of the second module, which has an adapter of zeros, and one that counts as zero."""
    ranks, sizes = (2, 1, 3, 1), torch.tensor([[1.0, 2, 2, 2], [4.0, 0, 12.0, 1e-7]])
    x = torch.nn.functional.normalize(torch.randn(2, 4, 12, dtype=dtype), dim=2) * sizes[..., None]
    blocks = [x[:, i].view(2, r, 12 // r) for i, r in enumerate(ranks)]
    rows = torch.cat([torch.nn.functional.pad(y, (0, 12 - y.shape[2])) for y in blocks], 1)
    squares = (rows @ rows.mT).diagonal(dim1=1, dim2=2)
    for given in (squares, torch.stack([squares, squares], 1)[:, 0], squares.T.contiguous().T):
        assert norms_apart(given, ranks, 1e-6) == pytest.approx(3.0, rel=1e-5)
        assert norms_apart(given[:1], ranks, 1e-6) == pytest.approx(2.0, rel=1e-5)
        assert norms_apart(given[1:], ranks, 1e-9) == pytest.approx(1.2e8, rel=1e-5)
    assert norms_apart(torch.zeros_like(squares), ranks, 1e-6) == 1.0


def test_what_is_over_its_diagonal():
    roots = torch.randn(3, 4, 7, dtype=torch.float64)
    roots[1, 2] = 0.0
    products = roots @ roots.mT
    found, own = products.clone(), roots.norm(dim=2)
    over_diagonals(found)
    expected = products / (own[:, :, None] * own[:, None, :])
    assert torch.allclose(found, expected.nan_to_num(nan=0.0), rtol=1e-14, atol=0)
    assert not found[1, 2].any()
    assert not found[1, :, 2].any()


def test_what_is_on_the_device_stays():
    plan = plan_of(2)
    stacks = [plan.stack(name) for name in plan.names]
    found = transfer.upload(stacks, CPU)
    assert found.ready is None
    assert found.wait() is stacks


def plan_of(modules: int, rank: int = 4, n: int = 64, m: int = 32) -> Plan:
    factors = {f"layer.{i}": (torch.ones(rank, n), torch.ones(m, rank)) for i in range(modules)}
    adapters = [dm.from_tensors(factors, name=name) for name in ("one", "two")]
    return Plan.make(adapters, [1.0, 1.0])


def groups(plan: Plan, most: int | None) -> list[int]:
    (found,) = reader._groups(plan, reader.Budget(CPU, most), None, [plan.names], False)
    return [len(group) for group in found]


def test_groups_fit_the_memory_they_are_given():
    plan = plan_of(7)
    each = plan.device_bytes("layer.0", torch.float32)
    assert plan.factor_bytes("layer.0") == 2 * 4 * (64 + 32) * 4
    assert each == 4 * plan.factor_bytes("layer.0") + 96 * 8 * 8
    assert groups(plan, None) == [7]
    assert groups(plan, 3 * each) == [3, 3, 1]
    assert groups(plan, 2 * each - 1) == [1] * 7


def test_a_module_that_does_not_fit_is_refused(tmp_path):
    plan = plan_of(2)
    with pytest.raises(OptionError, match=r"'layer.0' alone takes .* are allowed; allow more"):
        groups(plan, plan.device_bytes("layer.0", torch.float32) - 1)
    with pytest.raises(OptionError, match="max_device_memory"):
        at_one(plan.adapters, max_device_memory="1KiB", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_size_of_groups_does_not_change_the_result(tmp_path):
    generator = torch.Generator().manual_seed(1)
    paths = []
    for name in ("one", "two"):
        factors = {
            f"layers.{i}.q_proj": (
                torch.randn(4, 24, generator=generator),
                torch.randn(16, 4, generator=generator),
            )
            for i in range(5)
        }
        paths.append(write_adapter(tmp_path / name, factors))
    whole, small = (at_one(paths, max_device_memory=s) for s in (None, "16 KiB"))
    for name in whole.names:
        assert all(map(torch.equal, whole.factors(name), small.factors(name)))


def test_what_stays_on_a_gpu_is_merged_in_larger_groups(monkeypatch):
    given = adapters({f"layers.{i}": CASES["odd d"] for i in range(8)})
    plan = Plan.make(given, [1.0] * len(given))
    size = plan.factor_bytes(plan.names[0])
    monkeypatch.setattr(reader, "GPU_GROUP_BYTES", 2 * size)
    monkeypatch.setattr(reader, "GPU_GROUP_BYTES_IN_PLACE", 4 * size)
    gpu = reader.Budget(torch.device("cuda", 0), most_bytes=1 << 40)

    def groups(to_host: bool) -> list[int]:
        with reader.Reader.opened(plan, gpu, to_host) as opened:
            (found,) = reader._groups(plan, gpu, None, [plan.names], opened.stays)
        return [len(places) for places in found]

    assert plan.is_on(CPU)
    assert not plan.is_on(gpu.device)
    monkeypatch.setattr(reader, "_streams", lambda plan, budget: [])
    assert groups(False) == groups(True) == [2] * 4
    monkeypatch.setattr(Plan, "is_on", lambda self, device: True)
    assert groups(False) == [4] * 2
    assert groups(True) == [2] * 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (4096, 4096), ("4096", 4096), ("4GiB", 4 << 30), ("1.5 GB", 1_500_000_000)],
)
def test_sizes(given, expected):
    assert size("max_device_memory", given) == expected


@pytest.mark.parametrize("given", ["4 gigs", "GiB", -1, "", "1e9"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(OptionError, match=r"is no size; give bytes, or words like '4GiB'"):
        size("max_device_memory", given)
