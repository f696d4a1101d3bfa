"""The CUDA kernels, compiled for the host with sanitizers, against the tests of the ops.

A thread block runs as loops over its threads (csrc/cuda/block.h). What a race would change, the
order of the threads changes too: forwards and backwards must agree bitwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_entries_gpu
import test_ops
import torch
from support.shapes import CASES, random_case

from domerge_fast import ops
from domerge_fast.backends import reference
from domerge_fast.backends.gpu import phases
from domerge_fast.ops.orthogonalize import PENALTIES

ROOT = Path(__file__).parent.parent
CXX = shutil.which("g++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What AddressSanitizer finds as well, and what doubles the time of compilation.
SANITIZERS += ["-fno-sanitize=null,object-size,pointer-overflow,vptr"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", *SANITIZERS]

SHARED_KIB = (99, 163, 227)  # a block's, by compute capability: 8.6, 8.0 and 9.0, in that order
DEFAULT_SHARED_BYTES = 163 << 10

from_outside = pytest.mark.skipif(
    "DOMERGE_TEST_CUDA" in os.environ or CXX is None or not sys.platform.startswith("linux"),
    reason="no g++ on Linux, or already inside",
)
inside = pytest.mark.skipif(
    "DOMERGE_TEST_CUDA" not in os.environ, reason="run in a process with the sanitizers"
)


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """domerge_fast._cuda of the same sources, compiled by g++ for the host."""
    import pybind11

    folder = tmp_path_factory.mktemp("cuda_on_host")
    includes = [f"-I{pybind11.get_include()}", f"-I{python_headers()}"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        call(CXX, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", target)
        return target

    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/cuda/bindings.cpp"]
    sources.sort(key=lambda source: source.stat().st_size, reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "_cuda.so"
    call(CXX, "-shared", *SANITIZERS, *objects, "-o", str(library))
    return library


def python_headers() -> str:
    import sysconfig

    return sysconfig.get_paths()["include"]


def call(*command: str, **env: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_tests(extension: Path, *selection: str) -> None:
    """Tests in a process that has the sanitizers, with the extension in place."""
    runtimes = [
        subprocess.check_output([CXX, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    call(
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection),
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",
        DOMERGE_TEST_CUDA=str(extension),
    )


@pytest.mark.slow
@from_outside
def test_the_kernels_pass_the_tests_of_the_ops(extension):
    files = [f"tests/test_{name}.py" for name in ("ops", "entries", "entries_exact", "entries_gpu")]
    run_tests(extension, *files, "-k", "cuda")


@pytest.mark.slow
@from_outside
def test_the_kernels_on_tensor_cores(extension):
    run_tests(extension, "tests/test_tensor_cores.py")


@pytest.mark.slow
@from_outside
def test_descents_by_tiles(extension):
    run_tests(extension, "tests/test_cuda_on_host.py", "-k", "tiles and not order")


@pytest.mark.slow
@from_outside
def test_the_kernels_do_not_race(extension):
    run_tests(extension, "tests/test_cuda_on_host.py", "-k", "order")


@pytest.mark.slow
@from_outside
def test_the_kernels_on_other_devices(extension):
    run_tests(extension, "tests/test_cuda_on_host.py", "-k", "shared_memory or capability or grid")


def run(op: str) -> list[torch.Tensor]:
    """An op on all modules; apply_decouple as its kernel does it."""
    if op != "apply_decouple":
        return test_ops.run(op, "cuda")
    cases = list(CASES.values())
    a = [case.rows() for case in cases]
    b = reference.block_gram([case.columns() for case in cases])
    cs = [test_ops.coefficients(p.rank, p.rank) for p in a]
    found = []
    for chosen in (cs, [None] * len(a)):
        found += ops.apply_decouple(
            chosen, a, b, [case.omegas for case in cases], 2.0, torch.float32, backend="cuda"
        )
    return [x for results in found for x in results]


def run_both_ways(make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The results, which must be the same with the threads forwards and backwards."""
    from domerge_fast import _cuda

    forwards = make()
    _cuda.set_backwards(True)
    try:
        backwards = make()
    finally:
        _cuda.set_backwards(False)
    assert all(map(torch.equal, forwards, backwards))
    return forwards


@inside
@pytest.mark.parametrize("op", test_ops.OPS)
def test_the_order_of_threads_has_no_influence(op):
    assert len(run_both_ways(lambda: run(op))) >= len(CASES) - 1


@inside
def test_the_order_of_threads_has_no_influence_on_entries():
    run_both_ways(lambda: test_entries_gpu.run("cuda"))


TILED = {
    "a row beyond two tiles": ([8] * 32 + [1], 2),
    "ragged": ([3, 250, 1, 40, 90], 3),
    "a row beyond four": ([200, 200, 113], 2),
    "one step at 1024": ([512, 512], 1),
}
"""Ranks of the adapters, for R above what a block descends on, and steps."""


def overlapping(ranks: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.rand(sum(ranks) + 40, generator=generator, dtype=torch.float64)
    blocks = torch.randn(sum(ranks), len(shared), generator=generator, dtype=torch.float64)
    return [(1 + i % 3) * (x + 0.3 * shared) for i, x in enumerate(blocks.split(ranks))]


@inside
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", TILED)
def test_tiles_descend_as_the_oracle_does(name, penalty):
    ranks, steps = TILED[name]
    x = overlapping(ranks, 3)
    expected, stats = reference.descend(x, penalty, 1.0, steps, 0.0)
    found, own_stats, _ = test_ops.descend(x, "cuda", penalty, steps=steps, tol=0.0)
    assert own_stats == pytest.approx(stats, rel=1e-5)
    test_ops.assert_blocks_within(found, expected, x, 2e-6 if penalty == "squared" else 1e-4)


@inside
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_order_of_threads_has_no_influence_on_tiles(penalty):
    """Problems of several sizes in one launch, of which one has stopped while the others go on."""
    problems = [overlapping(ranks, 5) for ranks in ([150, 130], [100, 90, 70, 60])]
    problems.append([*torch.eye(280, dtype=torch.float64).split([140, 140])])
    grams = [(torch.cat(x) @ torch.cat(x).T).float() for x in problems]
    ranks = [[len(block) for block in x] for x in problems]

    def descend() -> list[torch.Tensor]:
        found, stats = ops.orthogonalize(grams, ranks, penalty=penalty, steps=2, backend="cuda")
        return [*found, *stats]

    found = run_both_ways(descend)
    assert torch.equal(found[2], torch.eye(280))
    assert [int(row[0]) for row in found[3:]] == [2, 2, 0]


@inside
@pytest.mark.parametrize("penalty", PENALTIES)
def test_tiles_take_turns_in_memory_and_stop(penalty, monkeypatch):
    """Two problems one after the other; and with all steps in a CUDA graph, of which those after
    the last one do nothing."""
    grams = [(x @ x.T).float() for x in (torch.cat(overlapping([150, 130], k)) for k in (1, 2))]

    def descend() -> list[torch.Tensor]:
        rule = {"penalty": penalty, "steps": 3, "tol": 0.5}
        found, stats = ops.orthogonalize(grams, [(150, 130)] * 2, backend="cuda", **rule)
        assert float(stats[:, 0].max()) < 3
        return [*found, stats]

    expected = descend()
    for name, value in (("MEMORY", 0), ("_is_captured", lambda work: True)):
        with monkeypatch.context() as patch:
            patch.setattr(phases, name, value)
            assert all(map(torch.equal, expected, descend()))


@pytest.fixture
def set_shared_bytes():
    from domerge_fast import _cuda

    yield _cuda.set_shared_bytes
    _cuda.set_shared_bytes(DEFAULT_SHARED_BYTES)


@inside
@pytest.mark.parametrize("penalty", PENALTIES)
def test_what_fits_in_shared_memory_has_no_influence(penalty, set_shared_bytes):
    cases = [*CASES.values(), random_case((70, 50), 131, 5), random_case((120, 90), 211, 5)]
    problems = [case.rows() for case in cases]
    grams = [g.float() for g in reference.gram(problems)]
    ranks = [p.ranks for p in problems]

    def descend() -> list[torch.Tensor]:
        found, stats = ops.orthogonalize(grams, ranks, penalty=penalty, steps=2, backend="cuda")
        return [*found, *stats]

    expected = descend()
    for kib in SHARED_KIB:
        set_shared_bytes(kib << 10)
        assert all(map(torch.equal, expected, descend()))


@inside
@pytest.mark.parametrize("op", test_ops.OPS)
def test_every_op_runs_with_the_least_shared_memory(op, set_shared_bytes):
    expected = run(op)
    set_shared_bytes(min(SHARED_KIB) << 10)
    assert all(map(torch.equal, expected, run(op)))


@inside
def test_a_grid_larger_than_cuda_can_launch_is_refused():
    from domerge_fast import _cuda

    with pytest.raises(ValueError, match=r"more than 2\^31 - 1 thread blocks"):
        _cuda.largest(0, 0, 2**31, 0, 0)


@inside
@pytest.mark.parametrize(
    ("archs", "served", "others"),
    [
        ("80;90;100", [80, 86, 89, 90, 100, 103, 110, 120, 121], [70, 75]),
        ("86", [86, 89, 90, 120], [75, 80]),
        ("80;100", [80, 89, 100, 120], [90]),
        ("80;90a", [80, 89, 90], [100, 120]),
        ("90;100f", [90, 100, 103], [80, 110, 120]),
    ],
)
def test_the_compute_capability_of_a_device_is_served(archs, served, others):
    from domerge_fast import _cuda

    assert [c for c in [*served, *others] if _cuda.serves(archs, c)] == served


@inside
@pytest.mark.parametrize("archs", ["80,90", "sm_80", "80;90b", ";80"])
def test_a_list_for_no_compute_capability_is_refused(archs):
    from domerge_fast import _cuda

    with pytest.raises(ValueError, match="no list of architectures"):
        _cuda.serves(archs, 100)
