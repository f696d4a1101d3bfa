"""The CUDA kernels, compiled for the host with sanitizers, against the tests of the ops.

A thread block runs as loops over its threads (csrc/cuda/block.h). What a race would change, the
order of the threads changes too: forwards and backwards must agree bitwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_ops
import torch
from shapes import CASES

from domerge_fast import ops
from domerge_fast.backends import reference

ROOT = Path(__file__).parent.parent
CXX = shutil.which("g++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What AddressSanitizer finds as well, and what doubles the time of compilation.
SANITIZERS += ["-fno-sanitize=null,object-size,pointer-overflow,vptr"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", *SANITIZERS]

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
    run_tests(extension, "tests/test_ops.py", "-k", "cuda")


@pytest.mark.slow
@from_outside
def test_the_kernels_do_not_race(extension):
    run_tests(extension, "tests/test_cuda_on_host.py", "-k", "order")


def run(op: str) -> list[torch.Tensor]:
    """An op on all modules; apply_decouple on those that its kernel takes."""
    if op != "apply_decouple":
        return test_ops.run(op, "cuda")
    cases = [case for case in CASES.values() if sum(case.ranks) <= 256]
    a = [case.rows() for case in cases]
    b = reference.block_gram([case.columns() for case in cases])
    cs = [test_ops.coefficients(p.rank, p.rank) for p in a]
    found = []
    for chosen in (cs, [None] * len(a)):
        found += ops.apply_decouple(
            chosen, a, b, [case.omegas for case in cases], 2.0, torch.float32, backend="cuda"
        )
    return [x for results in found for x in results]


@inside
@pytest.mark.parametrize("op", test_ops.OPS)
def test_the_order_of_threads_has_no_influence(op):
    from domerge_fast import _cuda

    forwards = run(op)
    _cuda.set_backwards(True)
    try:
        backwards = run(op)
    finally:
        _cuda.set_backwards(False)
    assert len(forwards) >= len(CASES) - 1
    assert all(map(torch.equal, forwards, backwards))
