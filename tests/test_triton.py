"""The Triton kernels without a GPU: compiled for every architecture, and run by the interpreter.

Run as a script, it compiles what the launches of some ops ask for, and prints a line of JSON for
each: python tests/test_triton.py ARCHITECTURE
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from machine_code import disassembler, functions
from support.shapes import random_case

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that one block may use, by architecture."""

KERNELS = {
    "apply_decouple_kernel",
    "apply_kernel",
    "block_gram_kernel",
    "descent_scalars_kernel",
    "descent_tiles_kernel",
    "entry_counts_kernel",
    "entry_merge_kernel",
    "gram_kernel",
    "largest_kernel",
    "roots_kernel",
    "row_sums_kernel",
    "sum_kernel",
    "total_kernel",
}
DESCENT = {"descent_scalars_kernel": 2, "descent_tiles_kernel": 0}
"""How often each may spill: routines of float64 division and roots save a register or two."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = {"gram": 128, "apply": 128, "apply_decouple": 256}
EVERYWHERE = [
    *((op, rank, dtype) for op, rank in LARGEST.items() for dtype in ("float32", "bfloat16")),
    ("block_gram", 16, "float32"),
    ("largest", 16, "float32"),
    ("entries", 16, "bfloat16"),
    ("squared", 128, "float32"),
    ("frobenius", 128, "float32"),
]
MORE = [
    *((op, rank, "float32") for op in LARGEST for rank in (16, 64)),
    *((op, 64, dtype) for op in LARGEST for dtype in ("bfloat16", "float16")),
    *((op, 16, dtype) for op in ("block_gram", "largest") for dtype in ("bfloat16", "float16")),
    *(("entries", 16, dtype) for dtype in ("float32", "float16")),
    ("squared", 16, "float32"),
    ("squared", 64, "float32"),
    ("frobenius", 256, "float32"),
]
DESCENTS = [(p, rank, "float32") for p in ("squared", "frobenius") for rank in (16, 64, 128)]
LAUNCHES = {80: EVERYWHERE, 90: [*EVERYWHERE, *MORE], 100: EVERYWHERE, 120: DESCENTS}
"""What is compiled for an architecture: (op or penalty, R, dtype)."""


class Target:
    """Stands in for Triton's driver: an architecture that is not there."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_launches(architecture: int) -> None:
    """Calls the ops on CPU tensors with every launch replaced by a compilation."""
    from triton.runtime import JITFunction, driver

    driver.set_active(Target(architecture))
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        line = {"kernel": self.fn.__name__, "shared": compiled.metadata.shared}
        if line["kernel"] in DESCENT:
            line |= machine_code(compiled.asm["cubin"])
        print(json.dumps(line), flush=True)

    JITFunction.run = compile_only
    for op, rank, dtype in LAUNCHES[architecture]:
        launch(op, rank, TYPES[dtype])


def machine_code(cubin: bytes) -> dict[str, int]:
    """How often code spills a register, and stores two bytes."""
    tool = disassembler()
    assert tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    opcodes = [x[0] for _, body in functions(done.stdout) for x in body if not isinstance(x, str)]
    assert opcodes
    return {
        "spills": sum(x.startswith("STL") for x in opcodes),
        "narrow": sum(re.match(r"STG.*\.[US](8|16)\b", x) is not None for x in opcodes),
    }


def launch(op: str, rank: int, dtype: torch.dtype) -> None:
    from domerge_fast.algebra.entry_rules import Draw, Election, Trim
    from domerge_fast.backends.gpu import triton as backend

    half = rank // 2
    case = random_case((half, half), 4104, 8)
    rows = case.rows(dtype)
    if op == "gram":
        backend.gram([rows])
    elif op == "apply":
        backend.apply([None], [rows], dtype)
    elif op == "block_gram":
        backend.block_gram([rows])
    elif op == "largest":
        backend.largest(rows.blocks)
    elif op == "entries":
        factors, draw = (rows, case.columns(dtype)), Draw(1, 2, (0, 1))
        for prefixes in (None, [1, 2]):
            backend.entry_counts(*factors, prefixes)
        backend.entry_sums(*factors, [Trim()] * 2, draw)
        for sign in ("none", "total", "frequency"):
            election = Election(sign, weighted=True, mean="weight")
            backend.entry_merge(*factors, [Trim()] * 2, [1.0, 0.5], election, draw, 1.0)
    elif op == "apply_decouple":
        blocks = torch.zeros(2 * half * half, dtype=torch.float64)
        backend.apply_decouple([None], [rows], [blocks], [[0.5, 0.5]], 1.0, dtype)
    else:
        backend.orthogonalize([torch.eye(rank)], [(half, half)], penalty=op, steps=1)


@pytest.fixture(scope="module")
def compilers():
    """One process an architecture, side by side."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {
        architecture: subprocess.Popen(
            [sys.executable, __file__, str(architecture)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for architecture in LAUNCHES
    }
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LAUNCHES)
def test_every_kernel_compiles_within_the_shared_memory(architecture, compilers):
    output, errors = compilers[architecture].communicate()
    assert compilers[architecture].returncode == 0, errors
    kernels = [json.loads(line) for line in output.splitlines()]
    assert {k["kernel"] for k in kernels} == (KERNELS if architecture != 120 else DESCENT.keys())
    descents = [k for k in kernels if k["kernel"] in DESCENT]
    assert all(k["spills"] <= DESCENT[k["kernel"]] and k["narrow"] == 0 for k in descents)
    assert max(k["shared"] for k in kernels) <= SHARED_MEMORY[architecture]


@pytest.mark.slow
def test_every_op_in_the_interpreter():
    """The tests of the ops on the Triton backend: the variable must be set before Triton starts.

    Without what is a library's work there, float16, which takes the way of bfloat16, and what
    takes the interpreter longest.
    """
    long = "twice or it_stops or (frobenius and (arrives or never_rises)) or (256 and dtype1)"
    long += " or 1100-2 or counts_are_of_the_update"
    selected = f"triton and not (truncate or on_the_factors or dtype2 or {long})"
    files = [
        f"tests/test_{name}.py"
        for name in ("ops", "library", "entries", "entries_gpu", "triton_descent")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", selected],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]))
