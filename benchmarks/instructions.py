"""Counts the instructions of the CPU kernels under callgrind, where timing is too noisy to tell.

    python benchmarks/instructions.py                   # the working tree
    python benchmarks/instructions.py --against dd3f2e2 # beside another revision
    python benchmarks/instructions.py --descent         # the parts of orthogonalize

Needs valgrind and g++. Valgrind knows no AVX-512: the AVX2 kernels are counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
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
DESCENT_RANKS = (64, 128, 256, 512)
PARTS = {
    "add_product": "products",
    "find_quartics": "line search",
    "make_line": "line search",
    "best_step": "line search",
    "find_gradient": "sums and stores of a product's tiles",
    "find_gradient_products": "sums and stores of a product's tiles",
    "find_change": "sums and stores of a product's tiles",
    "find_second_change": "sums and stores of a product's tiles",
    "weigh": "passes over matrices",
    "turn": "passes over matrices",
    "find_first_change": "passes over matrices",
    "move_c": "passes over matrices",
    "move_h": "passes over matrices",
    "set_diagonal": "passes over matrices",
    "transpose": "passes over matrices",
    "make_matrices": "beginning and end",
    "begin_descent": "beginning and end",
    "orthogonalize_item": "beginning and end",
}
"""A function of orthogonalize.h or a header that it includes -> what its instructions are
counted as."""
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g",
    "-no-pie",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-pthread",
    "-DDOMERGE_X86",
]
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
        if source.stem != isa and isa not in ISAS:
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


def count_parts(program: Path, rank: int, folder: Path) -> tuple[str, Counter[str]]:
    """The steps of one call of orthogonalize on 8 adapters, and its instructions by part."""
    out = folder / "callgrind.out"
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=measured", "--dump-instr=yes"]
    command += ["--compress-pos=no", "--compress-strings=no", f"--callgrind-out-file={out}"]
    environment = os.environ | {"DOMERGE_CPU_ISA": "avx2"}
    shape = map(str, (8, rank // 8, 4 * rank))
    said = run([*command, str(program), "orthogonalize", *shape], env=environment)
    costs = costs_of_addresses(out.read_text(), program)
    parts = parts_of_addresses(program, list(costs))
    found: Counter[str] = Counter()
    for address, cost in costs.items():
        found[parts.get(address, "other")] += cost
    return said.split("steps ")[1].split()[0], found


def costs_of_addresses(profile: str, program: Path) -> Counter[str]:
    """Instructions by address in the program; those of libraries at address 0."""
    costs: Counter[str] = Counter()
    inside = called = False
    for line in profile.splitlines():
        if line.startswith("ob="):
            inside = line == f"ob={program}"
        elif line.startswith("calls="):
            called = True
        elif line.startswith("0x"):
            address, _, cost = line.split()
            if not called:  # else it is what the callee took, which is listed there
                costs[address if inside else "0x0"] += int(cost)
            called = False
    return costs


def parts_of_addresses(program: Path, addresses: list[str]) -> dict[str, str]:
    """The part of the innermost function, inlined or not, that is of one."""
    names = re.compile(rf"\b({'|'.join(PARTS)})\b")
    parts: dict[str, str] = {}
    address = ""
    for line in run(["addr2line", "-aifCe", str(program), *addresses]).splitlines():
        if line.startswith("0x"):
            address = hex(int(line, 16))
        elif found := names.search(line):
            parts.setdefault(address, PARTS[found[1]])
    return parts


def print_parts() -> None:
    parts = [*dict.fromkeys(PARTS.values()), "other"]
    print("| R | steps | million instructions (AVX2) | " + " | ".join(parts) + " |")
    print("|---" * (len(parts) + 3) + "|")
    with tempfile.TemporaryDirectory() as name:
        program = build(ROOT, Path(name))
        for rank in DESCENT_RANKS:
            steps, found = count_parts(program, rank, Path(name))
            total = found.total()
            shares = " | ".join(f"{100 * found[part] / total:.1f} %" for part in parts)
            print(f"| {rank} | {steps} | {total / 1e6:.1f} | {shares} |")


def counts(tree: Path) -> dict[tuple[int, int, int], dict[str, int]]:
    with tempfile.TemporaryDirectory() as name:
        program = build(tree, Path(name))
        return {s: {op: count(program, op, s, Path(name)) for op in OPS} for s in SHAPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REVISION", help="a git revision to compare with")
    parser.add_argument("--descent", action="store_true", help="the parts of orthogonalize")
    args = parser.parse_args()
    if args.descent:
        print_parts()
        return
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
