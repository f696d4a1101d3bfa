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
