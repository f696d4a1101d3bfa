"""What nvcc makes of the CUDA kernels, read from the machine code: no GPU is needed.

    python tests/machine_code.py [SOURCE …]

compiles csrc/cuda/*.cu (or those named) for every architecture of ARCHS and rewrites their part of
tests/data/machine_code.json; test_machine_code.py holds the code to it. It takes nvcc, c++filt and
the disassembler that the triton package has.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
RECORD = Path(__file__).parent / "data" / "machine_code.json"
ARCHS = (80, 90, 100, 120)
MATRIX = ("HMMA", "DMMA")
MATH = (*MATRIX, "FFMA", "FFMA2", "DFMA")
JUMPS = ("BRA", "BRX", "BSYNC", "CALL", "EXIT", "RET")
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
SECTION = re.compile(r"\.section\s+\.text\.(\w+)")
USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


def sources() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.cu") if path.stem != "device")


def fingerprint(source: str) -> str:
    """A hash of a source and of all that it includes of ours, without comments."""
    seen: set[Path] = set()
    todo = [(SOURCES / f"{source}.cu").resolve()]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        found = re.findall(r'#include "([\w./]+\.h)"', path.read_text())
        todo += [(path.parent / name).resolve() for name in found]
    digest = hashlib.sha256()
    for path in sorted(seen):
        lines = [line.split("//")[0].rstrip() for line in path.read_text().splitlines()]
        digest.update("\n".join([path.name, *filter(None, lines)]).encode())
    return digest.hexdigest()[:16]


def disassembler() -> str | None:
    """nvdisasm on PATH, or the one that triton brings."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    for folder in sys.path:
        path = Path(folder) / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm"
        if path.is_file():
            return str(path)
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _demangled(name: str) -> str:
    """Gram<BFloat16, 128> of domerge::enter<domerge::(anonymous namespace)::Gram<…> >(…)."""
    text = _run("c++filt", name).strip()
    inner = text[text.index("enter<") + len("enter<") : text.rindex(">(")].strip()
    return inner.replace("domerge::", "").replace("(anonymous namespace)::", "")


def _width(opcode: str) -> int:
    """Bytes that a load or store moves for each thread."""
    for part, size in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if part in opcode and (part[0] == "." or re.search(rf"\.[US]{part}\b", opcode)):
            return size
    return 4


def _kind(opcode: str) -> str:
    """The instruction, with the bytes it moves where it is a load or store."""
    base = opcode.split(".")[0]
    if base in ("LDG", "STG", "LDS", "STS", "LD", "ST", "LDGSTS"):
        return f"{base}{8 * _width(opcode)}"
    return base


def functions(listing: str) -> Iterator[tuple[str, list[str | tuple[str, str]]]]:
    """Every function's name, labels (str) and instructions (opcode, operands)."""
    name, body = "", []
    for line in listing.splitlines():
        if found := SECTION.search(line):
            if name:
                yield name, body
            name, body = found[1], []
        elif found := LABEL.match(line):
            body.append(found[1])
        elif found := OPCODE.match(line):
            body.append((found[1], found[2]))
    if name:
        yield name, body


def _math(counts: Counter[str]) -> int:
    return sum(counts[kind] for kind in MATH)


def main_loop(body: Sequence[str | tuple[str, str]]) -> Counter[str]:
    """The instructions of the loop with most arithmetic; of nested ones, of the innermost."""
    places = {item: i for i, item in enumerate(body) if isinstance(item, str)}
    best: Counter[str] = Counter()
    for end, item in enumerate(body):
        if isinstance(item, str) or not item[0].startswith("BRA"):
            continue
        target = TARGET.search(item[1])
        if target is None or not places[target[1]] < end:
            continue
        inside = [x for x in body[places[target[1]] : end + 1] if not isinstance(x, str)]
        counts = Counter(_kind(opcode) for opcode, _ in inside)
        if _math(counts) > _math(best) or (
            _math(counts) == _math(best) > 0 and counts.total() < best.total()
        ):
            best = counts
    return best


def matrix_stretches(body: Sequence[str | tuple[str, str]]) -> list[Counter[str]]:
    """The instructions between two labels or jumps, where matrix products are made; those with
    most of them first. Without what is taken seldom, as all of a loop has it."""
    stretches: list[Counter[str]] = [Counter()]
    for item in body:
        if isinstance(item, str):
            stretches.append(Counter())
            continue
        stretches[-1][_kind(item[0])] += 1
        if item[0].split(".")[0] in JUMPS:
            stretches.append(Counter())
    found = [s for s in stretches if any(s[kind] for kind in MATRIX)]
    return sorted(found, key=lambda s: -sum(s[kind] for kind in MATRIX))


def _summary(counts: Counter[str]) -> dict[str, int]:
    """Instructions in all and those that tell something, the frequent first."""
    telling = ("LDG", "STG", "LDS", "STS", "LD1", "LD3", "LD6", "ST", "BAR", "SHFL", *MATH)
    kept = {k: n for k, n in counts.items() if k.startswith(telling) or k == "LDSM"}
    return {"all": counts.total(), **dict(sorted(kept.items(), key=lambda x: (-x[1], x[0])))}


def read(source: str, arch: int, nvcc: str = "nvcc", flags: Sequence[str] = ()) -> dict[str, dict]:
    """Every kernel of a source: registers, spilled bytes, instructions, those of its main loop and
    of its stretches with matrix instructions."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("nvdisasm is neither on PATH nor in a triton package")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "code.cubin")
        path = str(SOURCES / f"{source}.cu")
        options = ["-O3", "-std=c++17", "-Xptxas", "-v", *flags]
        report = _run(nvcc, *options, f"-arch=sm_{arch}", "-cubin", path, "-o", cubin)
        listing = _run(tool, "-c", cubin)
    usage = {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(report)}
    found = {}
    for name, body in functions(listing):
        if name not in usage:
            continue
        stores, loads, registers = usage[name]
        counts = Counter(_kind(x[0]) for x in body if not isinstance(x, str))
        found[_demangled(name)] = {
            "registers": registers,
            "spilled": stores + loads,
            "code": counts.total(),
            "stores": {k: n for k, n in sorted(counts.items()) if k.startswith("STG")},
            "loop": _summary(main_loop(body)),
            "matrix": [_summary(stretch) for stretch in matrix_stretches(body)],
        }
    return dict(sorted(found.items()))


def record() -> dict[str, dict]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def write(kept: dict[str, dict]) -> None:
    """One line a kernel and architecture."""
    parts = []
    for source in sorted(kept):
        lines = [f'"sources": {json.dumps(kept[source]["sources"])}']
        for arch in sorted((k for k in kept[source] if k != "sources"), key=int):
            rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept[source][arch].items()]
            lines.append(f'"{arch}": {{\n' + ",\n".join(rows) + "\n}")
        parts.append(f'"{source}": {{\n' + ",\n".join(lines) + "\n}")
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(chosen: Sequence[str]) -> None:
    kept = {name: part for name, part in record().items() if name in sources()}
    for source in chosen or sources():
        part: dict = {"sources": fingerprint(source)}
        for arch in ARCHS:
            part[str(arch)] = read(source, arch)
            print(source, arch, len(part[str(arch)]), flush=True)
        kept[source] = part
        write(kept)


if __name__ == "__main__":
    main(sys.argv[1:])
