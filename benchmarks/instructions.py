"""Counts the instructions of the CPU kernels under callgrind, where timing is too noisy to tell.

    python benchmarks/instructions.py                   # the working tree
    python benchmarks/instructions.py --against dd3f2e2 # beside another revision

Needs valgrind and g++. Valgrind knows no AVX-512: the AVX2 kernels are counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRIVER = Path(__file__).parent / "instructions.cpp"
OPS = (
    "gram",
    "orthogonalize, 1 step",
    "orthogonalize, 4 steps",
    "apply",
    "block_gram",
    "apply_decouple",
)
SHAPES = ((8, 16, 2048), (64, 2, 2048))
"""Adapters, their rank, and the width of the module."""
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-DDOMERGE_X86"]
ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}


def run(command: list[str], **given: object) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(command, text=True, capture_output=True, **given)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(tree: Path, folder: Path) -> Path:
    """The driver compiled with a tree's kernels."""
    cpu = tree / "csrc" / "cpu"
    objects = []
    for source in sorted(cpu.glob("*.cpp")):
        isa = source.stem.removeprefix("kernels_")
        if isa == "amx":
            continue
        objects.append(folder / f"{source.stem}.o")
        flags = [*FLAGS, *ISAS.get(isa, []), "-c", str(source), "-o", str(objects[-1])]
        run(["g++", *flags])
    driver = tree / "benchmarks" / DRIVER.name
    driver.write_text(DRIVER.read_text())
    program = folder / "instructions"
    run(["g++", *FLAGS, str(driver), *map(str, objects), "-o", str(program)])
    return program


def count(program: Path, op: str, shape: tuple[int, int, int], folder: Path) -> int:
    """Instructions of one call of an op."""
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=measured"]
    command += [f"--callgrind-out-file={folder / 'callgrind.out'}", str(program), op]
    environment = os.environ | {"DOMERGE_CPU_ISA": "avx2"}
    said = run([*command, *map(str, shape)], env=environment)
    found = re.search(r"Collected : (\d+)", said)
    if not found:
        sys.exit(f"callgrind did not say how many instructions {op} took:\n{said}")
    return int(found[1])


def counts(tree: Path) -> dict[tuple[int, int, int], dict[str, int]]:
    with tempfile.TemporaryDirectory() as name:
        program = build(tree, Path(name))
        return {s: {op: count(program, op, s, Path(name)) for op in OPS} for s in SHAPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REVISION", help="a git revision to compare with")
    args = parser.parse_args()
    now = counts(ROOT)
    before = None
    if args.against:
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name) / "tree"
            run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), args.against])
            try:
                before = counts(tree)
            finally:
                run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)])
    print(
        f"| million instructions (AVX2) | now | {args.against or ''} | ratio |\n|---|---|---|---|"
    )
    for shape, found in now.items():
        for op, value in found.items():
            old = before[shape][op] if before else None
            label = "{} adapters of rank {}, {} columns".format(*shape)
            compared = f"{old / 1e6:.1f} | {value / old:.2f}" if old else " | "
            print(f"| {op}: {label} | {value / 1e6:.1f} | {compared} |")


if __name__ == "__main__":
    main()
