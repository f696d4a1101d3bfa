"""`do` on adapters read in batches: up to 100,000 small ones from files, with its peak memory, the
same continued with more of them, and what is left to the optimum of 200, over sets: python
benchmarks/streamed.py [--publish].

The optimum is that of the descent on all factors at once, in float64, until it stands still. CPU
seconds are of the process that merges.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import domerge_fast as dm
from domerge_fast.algebra.side import Side
from domerge_fast.backends.factor_descent import in_factor_form
from domerge_fast.methods.streamed.descent import Descent, Rule
from domerge_fast.sessions.streamed import ROOM

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = "<!-- streamed -->", "<!-- end streamed -->"
CONTINUED = "<!-- continued -->", "<!-- end continued -->"
SHAPES = {"layers.0.q_proj": (192, 256)}
RANK = 4
SETS = {
    "at random": (0.0, 1.0),
    "30 % shared": (0.3, 1.0),
    "90 % shared": (0.9, 1.0),
    "norms 36 times apart": (0.0, 36.0),
}
"""The share of the adapters' energy in one space of their rank, and how far norms are apart."""


def side(count: int, rank: int, d: int, shared: float, spread: float) -> Iterator[Tensor]:
    """The X_i [rank, d] of a set."""
    generator = torch.Generator().manual_seed(d)
    common = torch.randn(rank, d, generator=generator)
    for i in range(count):
        own = torch.randn(rank, d, generator=generator)
        mixed = torch.randn(rank, rank, generator=generator) @ common / math.sqrt(rank)
        size = spread ** (i / (count - 1) - 0.5)
        yield size * (math.sqrt(1 - shared) * own + math.sqrt(shared) * mixed)


def gaps(count: int = 200, rank: int = 4, d: int = 96) -> Iterator[list[str]]:
    """A row of every set: passes, f over the optimum's less 1, and what was estimated."""
    for name, (shared, spread) in SETS.items():
        x = list(side(count, rank, d, shared, spread))
        whole = Side(tuple(x), (1.0,) * count)
        _, stats = in_factor_form(torch.cat(x).double(), whole.ranks, 1.0, 300, 1e-10)
        found = Descent(d, Rule(1.0, 50, 1e-3))
        found.measure(whole)
        found.settle()
        while not found.done:
            found.step(whole, range(count))
            found.settle()
        left = found.row[2] / float(stats[2]) - 1
        estimate = found.gap / found.after
        yield [name, str(found.passes), f"{left:.1e}", f"{estimate:.1e}"]


def through(found: Descent, x: list[Tensor], first: int) -> tuple[Descent, int]:
    """The descent, which reads the adapters from `first` on until it is opened; and how often it
    has read the others."""
    parts = [Side(tuple(x[k:]), (1.0,) * (len(x) - k)) for k in (0, first)]
    found.measure(parts[1])
    found.settle()
    read = 0
    while not found.done:
        late = bool(first) and not found.opened
        read += not late
        found.step(parts[late], range(first if late else 0, len(x)))
        found.settle()
        if found.done and late and not found.is_within:
            found.open()
    return found, read


def late(count: int = 200, rank: int = 4, d: int = 96) -> str:
    """A table: f beside the optimum where adapters come to a descent on others."""
    head = [f"{count} adapters of rank {rank}, d = {d}", "more", "passes over those before"]
    rows = [[*head, "from scratch", "over the optimum", "estimated"], ["---"] * 6]
    rule = Rule(1.0, 50, 1e-3, ROOM)
    for name, kind in SETS.items():
        whole = list(side(count + 20, rank, d, *kind))
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
        kept = through(Descent(d, rule), [whole[i] for i in order[:count]], 0)[0].kept
        for more in (1, 4, 20):
            x = [whole[i] for i in order[: count + more]]
            least = through(Descent(d, Rule(1.0, 50, 1e-7)), x, 0)[0].row[2]
            found, read = through(Descent(d, rule, kept), x, count)
            scratch, _ = through(Descent(d, Rule(1.0, 50, 1e-3)), x, 0)
            left = f"{found.row[2] / least - 1:.1e}", f"{found.gap / found.after:.1e}"
            rows.append([name, str(more), str(read), str(scratch.passes), *left])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_library(folder: Path, count: int, mixed: bool = False) -> list[Path]:
    """PEFT folders of small adapters in bfloat16, a third of their energy shared, the larger ones
    last; mixed: in any order."""
    order = torch.arange(count)
    if mixed:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    sides = {
        name: tuple(side(count, RANK, d, 0.3, 4.0) for d in (n, m))
        for name, (m, n) in SHAPES.items()
    }
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "base_model_name_or_path": "base",
        "target_modules": ["q_proj"],
    }
    paths = []
    for i in range(count):
        path = folder / f"{int(order[i]):05}"
        path.mkdir()
        tensors = {}
        for name, (a, b) in sides.items():
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = next(a).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = next(b).bfloat16().T.contiguous()
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def merge(folder: Path) -> None:
    """Merge all in the folder, and print what it took."""
    began = time.process_time()
    merged = dm.merge(
        sorted(folder.iterdir()),
        "do",
        descent="streamed",
        report="none",
        output=folder.with_name("merged"),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    notes = [note for note in merged.report.notes if "batches" in note]
    print(json.dumps([time.process_time() - began, peak * 1024, *notes]))


def library(count: int) -> str:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapters"
        folder.mkdir()
        write_library(folder, count)
        command = [sys.executable, __file__, "--merge", str(folder)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak, note = json.loads(found.stdout.splitlines()[-1])
    (m, n) = SHAPES["layers.0.q_proj"]
    what = f"{count:,} adapters of rank {RANK}, one module of {m} x {n}, from files"
    took = f"{seconds:.0f} CPU seconds, {peak / 2**20:.0f} MiB at the peak of the process"
    return f"{what}: {took}. Its report: {note}."


def continued(folder: Path, first: int, more: int) -> None:
    """Merge the first adapters of the folder, in a session, then some more, then all at once, and
    print what each took; and how far apart both merges are."""
    paths = sorted(folder.iterdir())[: first + more]
    place = folder.with_name("state")
    growing = dm.Streamed.start(place, overwrite=True)
    spent, found = [time.process_time()], []
    for part in (paths[:first], paths[first:]):
        found.append(growing.add_all(part))
        spent.append(time.process_time())
    merged = growing.merged(dtype="float32")
    spent.append(time.process_time())
    whole = dm.merge(paths, "do", descent="streamed", report="norms", dtype="float32")
    spent.append(time.process_time())
    (name,) = merged.names
    deltas = merged.delta(name).double(), whole.delta(name).double()
    apart = float((deltas[0] - deltas[1]).norm() / deltas[1].norm())
    f = [x.report[name] for x in (merged, whole)]
    over = [
        one.objective_after / other.objective_after - 1
        for one, other in ((f[0].a, f[1].a), (f[0].b, f[1].b))
    ]
    seconds = [late - early for early, late in itertools.pairwise(spent)]
    last = found[1]
    size = sum(x.stat().st_size for x in place.iterdir())
    print(
        json.dumps([seconds, last.again, last.passes, last.left, max(over, key=abs), apart, size])
    )


def goes(pairs: list[tuple[int, int]]) -> str:
    """A table: what a continuation takes, beside a merge of all at once."""
    head = ["before", "more", "CPU s at first", "CPU s to add", "CPU s to save", "all at once"]
    head += ["modules read again", "f beside all at once", "estimated", "ΔW apart", "folder"]
    rows = [head, ["---"] * len(head)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapters"
        folder.mkdir()
        write_library(folder, max(map(sum, pairs)), mixed=True)
        for first, more in pairs:
            command = [sys.executable, __file__, "--continue", str(folder), str(first), str(more)]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds, again, _, left, over, apart, size = json.loads(found.stdout.splitlines()[-1])
            row = [f"{first:,}", f"{more:,}", *(f"{x:.1f}" for x in seconds), str(again)]
            row += [f"{over:+.1e}", f"{left:.1e}", f"{apart:.1e}", f"{size / 2**20:.1f} MiB"]
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(counts: list[int]) -> str:
    rows = [["200 adapters of rank 4, d = 96", "passes", "over the optimum", "estimated"]]
    rows += [["---"] * 4, *gaps()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, *map(library, counts)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--goes", type=int, nargs=2, action="append", metavar=("FIRST", "MORE"))
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--continue", nargs=3, dest="going", help=argparse.SUPPRESS)
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.merge:
        merge(given.merge)
        return
    if given.going:
        folder, first, more = given.going
        continued(Path(folder), int(first), int(more))
        return
    pairs = given.goes or [(1000, 10), (1000, 100), (10_000, 50)]
    made = {CONTINUED: f"{late()}\n\n{goes(pairs)}"}
    if given.counts:
        made[MARKS] = page(given.counts)
    for marks, text in made.items():
        print(text)
        if given.publish:
            whole = PAGE.read_text(encoding="utf-8")
            before, rest = whole.split(marks[0])
            after = rest.split(marks[1])[1]
            PAGE.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
