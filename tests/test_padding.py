"""Rank rows that are zero on both sides change no update, and no merge."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.make import Factors, random_factors, write_adapter
from support.merges import at_one
from support.timing import least
from torch import Tensor

import domerge_fast as dm
from domerge_fast.formats import load
from domerge_fast.methods import TABLE
from domerge_fast.storage import safetensors_file

SHAPES = {"layers.0.q": (24, 20), "layers.1.q": (24, 20), "up": (30, 12)}


def padded(factors: Factors, extra: int) -> Factors:
    """Rows of zeros under every A, and columns of zeros beside every B."""
    return {
        name: (
            torch.cat([a, a.new_zeros(extra, *a.shape[1:])]),
            torch.cat([b, b.new_zeros(len(b), extra, *b.shape[2:])], 1),
        )
        for name, (a, b) in factors.items()
    }


def written(folder: Path, factors: Factors, scaling: float, **config: object) -> dm.Adapter:
    rank = len(next(iter(factors.values()))[0])
    return dm.load(write_adapter(folder, factors, r=rank, lora_alpha=scaling * rank, **config))


def live(folder: Path, factors: Factors, scaling: float) -> dm.Adapter:
    """In the memory of a model: B is a view of larger memory."""
    wide = {name: (a, torch.cat([b, b], 1)[:, : b.shape[1]]) for name, (a, b) in factors.items()}
    return dm.from_tensors(wide, scaling, name=str(folder))


@pytest.mark.parametrize("make", [written, live])
def test_a_padded_adapter_is_read_as_it_was(make, tmp_path):
    given = random_factors(SHAPES, 3)
    plain, wide = make(tmp_path / "a", given, 2.0), make(tmp_path / "b", padded(given, 4), 2.0)
    assert wide.modules == plain.modules
    assert {m.rank for m in wide.modules.values()} == {3}
    assert {m.scaling for m in wide.modules.values()} == {2.0}
    for name in plain.modules:
        for x, y in zip(plain.factors(name), wide.factors(name)):
            assert torch.equal(x, y)
            assert y.is_contiguous()


@pytest.mark.parametrize("method", TABLE)
def test_padding_changes_no_merge(method, tmp_path):
    parts = [random_factors(SHAPES, 3, seed=i) for i in range(2 if method == "slerp" else 3)]
    del parts[1]["up"]
    for make in (written, live):
        at = tmp_path / make.__name__
        plain = [make(at / f"a{i}", part, 1.5) for i, part in enumerate(parts)]
        wide = [make(at / f"b{i}", padded(part, 2 * i), 1.5) for i, part in enumerate(parts)]
        for pre in ([], ["equalize", "canonicalize", "orthogonalize"]):
            expected = at_one(plain, method, pre=pre, dtype="float32")
            found = at_one(wide, method, pre=pre, dtype="float32")
            for name in expected.names:
                assert all(map(torch.equal, found.factors(name), expected.factors(name)))


def zeroed(x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.clone()
    part(x)[...] = 0
    return x


@pytest.mark.parametrize("make", [written, live])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_rows_at_the_end_that_are_zero_on_both_sides_are_left_out(make, dtype, tmp_path):
    a, b = random_factors({"x": (9, 40)}, 6, dtype=dtype)["x"]
    cases = {
        "none": (a, b, 6),
        "only A": (zeroed(a, lambda x: x[4:]), b, 6),
        "only B": (a, zeroed(b, lambda x: x[:, 4:]), 6),
        "both": (zeroed(a, lambda x: x[4:]), zeroed(b, lambda x: x[:, 4:]), 4),
        "A less": (zeroed(a, lambda x: x[5:]), zeroed(b, lambda x: x[:, 3:]), 5),
        "B less": (zeroed(a, lambda x: x[1:]), zeroed(b, lambda x: x[:, 5:]), 5),
        "between": (zeroed(a, lambda x: x[2:4]), zeroed(b, lambda x: x[:, 2:4]), 6),
        "with signs": (-zeroed(a, lambda x: x[3:]), -zeroed(b, lambda x: x[:, 3:]), 3),
        "a row that begins with zeros": (zeroed(a, lambda x: x[5, :39]), b, 6),
        "everything": (torch.zeros_like(a), torch.zeros_like(b), 1),
        "all of A": (torch.zeros_like(a), b, 6),
    }
    for name, (a_case, b_case, rank) in cases.items():
        adapter = make(tmp_path / name, {"x": (a_case, b_case)}, 1.0)
        assert adapter.modules["x"].rank == rank, name
        found = adapter.factors("x")
        assert torch.equal(found[1] @ found[0], b_case @ a_case), name


def test_convolutions_and_embeddings_are_read_without_padding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = {
        "conv": (torch.randn(3, 4, 3, 2), torch.randn(8, 3, 1, 1)),
        "emb": (torch.randn(3, 50, generator=generator), torch.randn(6, 3, generator=generator)),
    }
    plain = written(tmp_path / "a", given, 1.0, embeddings=["emb"])
    wide = written(tmp_path / "b", padded(given, 5), 1.0, embeddings=["emb"])
    assert wide.modules == plain.modules
    assert wide.modules["conv"].a_shape == (3, 4, 3, 2)
    assert wide.modules["conv"].b_shape == (8, 3, 1, 1)
    for name in given:
        assert all(map(torch.equal, wide.factors(name), plain.factors(name)))


def test_the_scaling_goes_by_the_stored_rank(tmp_path):
    factors = padded(random_factors({"q": (8, 8)}, 2), 14)
    folder = write_adapter(tmp_path / "a", factors, r=16, lora_alpha=8, use_rslora=True)
    assert dm.load(folder).modules["q"].scaling == 8 / 4
    assert dm.load(folder).modules["q"].rank == 2


def test_of_an_ordinary_adapter_a_few_bytes_of_every_module_are_read(tmp_path, monkeypatch):
    places, reads = [], []
    peek = safetensors_file.SafetensorsFile.peek
    monkeypatch.setattr(
        safetensors_file.SafetensorsFile,
        "peek",
        lambda self, wanted: (places.append(wanted), peek(self, wanted))[1],
    )
    monkeypatch.setattr(
        safetensors_file.SafetensorsFile, "read", lambda *given: reads.append(given)
    )
    folder = write_adapter(tmp_path / "a", random_factors(SHAPES, 3))
    dm.load(folder)
    assert len(places) == 1
    assert len(places[0]) == len(SHAPES)
    assert all(count <= 64 for _, count in places[0])
    assert not reads


def test_an_adapter_of_zeros_is_read_quickly(tmp_path):
    """Every row of it may be padding."""
    zeros = {f"layers.{k}.q": (torch.zeros(32, 2048), torch.zeros(2048, 32)) for k in range(150)}
    folder = write_adapter(tmp_path / "zeros", zeros)

    def seconds() -> float:
        began = time.process_time()
        found = load(folder)
        assert {module.rank for module in found.modules.values()} == {1}
        return time.process_time() - began

    assert least(seconds, 1) <= 1


def test_negative_zeros_are_padding(tmp_path):
    a, b = torch.ones(4, 8), torch.ones(6, 4)
    a[2:], b[:, 2:] = -0.0, -0.0
    found = load(write_adapter(tmp_path / "a", {"layers.0.q": (a, b)}))
    assert found.modules["layers.0.q"].rank == 2
