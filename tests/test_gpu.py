"""Merges on a GPU against merges on the CPU; the ops themselves are in test_ops.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.make import random_factors, write_adapter, write_mlx
from support.merges import at_one
from support.on_device import move
from support.shapes import CASES
from test_entries_gpu import DRAW, TRIMS, WEIGHTS, fine, module, run

import domerge_fast as dm
from domerge_fast import ops
from domerge_fast.algebra.entry_rules import Election
from domerge_fast.backends import registry
from domerge_fast.engine import pipeline as engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SHAPES = {f"layers.{i}.{kind}": (96, n) for i in range(4) for kind, n in (("q", 128), ("k", 4200))}
ON_GPU = [n for n, s in registry.backends().items() if s.available and "cuda" in s.devices]
every_backend = pytest.mark.parametrize("backend", [*ON_GPU, "torch"])


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Three adapters of different ranks in bfloat16."""
    return [
        write_adapter(
            tmp_path / str(rank), random_factors(SHAPES, rank, seed=rank, dtype=torch.bfloat16)
        )
        for rank in (4, 16, 7)
    ]


def assert_same_merge(found: dm.Merged, expected: dm.Merged, tolerance: float) -> None:
    assert found.names == expected.names
    for name in expected.names:
        delta = expected.delta(name)
        error = float((found.delta(name).cpu() - delta).norm())
        assert error <= tolerance * float(delta.norm())


@every_backend
@pytest.mark.parametrize("method", ["do", "linear", "ties"])
def test_merges_of_transposed_factors_agree_with_the_cpu(method, backend, tmp_path):
    made = {rank: random_factors(SHAPES, rank, seed=rank) for rank in (4, 16)}
    sources = [write_mlx(tmp_path / str(rank), factors) for rank, factors in made.items()]
    expected = at_one(sources, method, dtype="float32")
    found = at_one(sources, method, dtype="float32", device="cuda", backend=backend)
    assert_same_merge(found, expected, 1e-4)


@every_backend
@pytest.mark.parametrize("options", [{}, {"penalty": "frobenius"}, {"renormalize": True}])
def test_merges_of_files_agree_with_the_cpu(options, backend, adapters, tmp_path):
    expected = at_one(adapters, dtype="float32", **options)
    options = {**options, "dtype": "float32", "device": "cuda", "backend": backend}
    in_memory = at_one(adapters, **options)
    assert in_memory.factors(in_memory.names[0])[0].device.type == "cuda"
    assert_same_merge(in_memory, expected, 1e-4)
    streamed = at_one(adapters, output=tmp_path / "out", **options)
    for name in streamed.names:
        for one, other in zip(streamed.factors(name), in_memory.factors(name), strict=True):
            assert torch.equal(one, other.cpu())


@every_backend
@pytest.mark.parametrize("method", ["do", "linear", "svd"])
def test_every_method_runs(method, backend, adapters):
    expected = at_one(adapters, method, rank=5, dtype="float32")
    found = at_one(adapters, method, rank=5, dtype="float32", device="cuda", backend=backend)
    assert_same_merge(found, expected, 1e-3)


def test_factors_on_the_gpu_stay_there():
    given = [
        dm.from_tensors(
            {k: (a.cuda(), b.cuda()) for k, (a, b) in random_factors(SHAPES, 8, seed=s).items()}
        )
        for s in range(2)
    ]
    merged = at_one(given)
    assert merged.report.recipe.backend == registry.choose("auto", "cuda") != "cpu"
    a, b = merged.factors(merged.names[0])
    assert a.device == b.device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("backend", ON_GPU)
def test_the_size_of_groups_does_not_change_the_result(backend, adapters, tmp_path, monkeypatch):
    whole = at_one(adapters, device="cuda", backend=backend)
    groups = []
    merge = engine.merged
    monkeypatch.setattr(engine, "merged", lambda *args: groups.append(1) or merge(*args))
    small = at_one(
        adapters,
        device="cuda",
        backend=backend,
        max_device_memory="2MiB",
        output=tmp_path / "out",
    )
    assert len(groups) > 2
    for name in whole.names:
        for one, other in zip(whole.factors(name), small.factors(name), strict=True):
            assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_merge_on_a_stream_of_the_caller(backend, adapters):
    """The factors are still being computed when the merge is called."""
    expected = at_one(adapters, device="cuda", backend=backend)
    loaded = [dm.load(path) for path in adapters]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy = torch.randn(8192, 8192, device="cuda")
        for _ in range(10):
            busy = busy @ busy / 8192
        given = []
        for adapter in loaded:
            zero = 0 * busy.nan_to_num()[0, 0].to(torch.bfloat16)
            pairs = {n: [x.cuda() + zero for x in adapter.factors(n)] for n in adapter.modules}
            given.append(
                dm.from_tensors({n: tuple(p) for n, p in pairs.items()}, name=adapter.name)
            )
        merged = at_one(given, backend=backend)
    stream.synchronize()
    for name in merged.names:
        delta = expected.delta(name)
        assert float((merged.delta(name) - delta).norm()) <= 1e-3 * float(delta.norm())


@pytest.mark.parametrize("backend", ON_GPU)
def test_ops_in_a_cuda_graph(backend):
    """Captured once, replayed on other numbers in the same memory."""
    cases = [CASES["usual"], CASES["odd d"], CASES["R above 128"]]
    a = [move(c.rows(), "cuda") for c in cases]
    b = [move(c.columns(), "cuda") for c in cases]

    def merge() -> list[torch.Tensor]:
        grams = ops.gram([*a, *b], backend=backend)
        ranks = [p.ranks for p in (*a, *b)]
        c, _ = ops.orthogonalize(grams, ranks, backend=backend)
        b_hat = ops.apply(c[len(a) :], b, torch.float32, backend=backend)
        merged_b = [
            type(p)(x.split(list(p.ranks)), (1.0,) * len(p.ranks)) for p, x in zip(b, b_hat)
        ]
        packed = ops.block_gram(merged_b, backend=backend)
        omegas = [case.omegas for case in cases]
        a_new, _ = ops.apply_decouple(
            c[: len(a)], a, packed, omegas, 1.0, torch.float32, backend=backend
        )
        return [*a_new, *b_hat]

    merge()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        captured = merge()
    for p in a:
        for block in p.blocks:
            block.mul_(2)
    expected = [x.clone() for x in merge()]
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("backend", ON_GPU)
def test_entries_have_the_bits_of_the_cpu(backend):
    for found, expected in zip(run(f"{backend}:cuda"), run("cpu"), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ON_GPU)
def test_entries_in_a_cuda_graph(backend):
    """Captured once, replayed on other numbers in the same memory."""
    a, b = (move(x, "cuda") for x in module(70, 300, fine))

    def merge() -> list[torch.Tensor]:
        rule = (WEIGHTS, Election("total"), DRAW, 1.0)
        return [
            ops.entry_counts(a, b, backend=backend),
            ops.entry_sums(a, b, TRIMS, DRAW, backend=backend),
            ops.entry_merge(a, b, TRIMS, *rule, backend=backend),
        ]

    before = merge()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        captured = merge()
    for block in a.blocks:
        block.mul_(2)
    expected = merge()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
    assert not any(map(torch.equal, captured, before))


@pytest.mark.parametrize("method", ["do", "linear", "tsvm", "iso_c", "lego"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merges_by_a_graph_have_the_bits_of_plain_ones(method, dtype, adapters):
    p = dm.prepare(adapters, method, device="cuda")
    kappas = [1.0, 0.5, -0.25], [0.3, 0.7, 1.1]
    held = [p.merge(kappa, dtype=dtype) for kappa in kappas]
    assert len(p._replays.graphs) == 1
    for kappa, found in zip(kappas, held):
        plain = p._merge(p.expand(kappa), getattr(torch, dtype))
        for name in p.modules:
            assert all(map(torch.equal, found[name], plain[name]))
    before = torch.cuda.memory_allocated()
    del held, found, plain, p
    assert torch.cuda.memory_allocated() < before


@pytest.mark.parametrize("backend", ON_GPU)
def test_bad_factors_are_refused(backend, adapters, tmp_path):
    factors = random_factors(SHAPES, 4, dtype=torch.bfloat16)
    factors["layers.2.q"][1][3, 1] = torch.nan
    bad = write_adapter(tmp_path / "bad", factors)
    with pytest.raises(dm.AdapterError, match=r"'bad', module 'layers.2.q': NaN in lora_B"):
        at_one([*adapters, bad], device="cuda", backend=backend, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interference_agrees_with_the_cpu(adapters):
    expected, found = dm.inspect(adapters), dm.inspect(adapters, device="cuda")
    for one, other in zip(found.cosine, expected.cosine, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
