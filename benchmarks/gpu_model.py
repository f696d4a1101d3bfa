"""What the CUDA kernels can reach at best on a GPU that is not here: a prediction, no measurement.

    python benchmarks/gpu_model.py

writes the table in docs/kernels.md: for every op, the least time by its bytes and flops, the least
that its kernel can take, and their ratio. A kernel takes as long as the slowest of three: its
bytes; its products, with what tiles pad and with C in two parts; the instructions of its straight
stretches with products, from tests/data/machine_code.json, of copies to shared memory, of the
splitting of C, and of sums added to others. Left out is what comes before and after a tile, ||a||
and all waiting, so a kernel is slower than that. Bytes are those of memory; what comes from the L2
cache, as the parts of C for every block, is not among them.
Of `orthogonalize` that is all but the products of three steps and, beyond R = 128, their matrices'
way through memory, as if no cache held any. `roots` waits for one number after another, of which
such counts tell nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from least import coefficients, problem
from pages import fill

from domerge_fast.bench import bounds
from domerge_fast.bench.bounds import NOTHING, Rates, Work
from domerge_fast.bench.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
RECORD = ROOT / "tests" / "data" / "machine_code.json"
CHOSEN = ("llama3-8b-8", "llama3-8b-64", "moe-30b-4", "sdxl-mixed")
ARCH = "90"

RATES = Rates(4.8e12, {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12, "float64": 67e12})
"""Bytes and flops a second of an H200, by its maker."""
ISSUED = 132 * 4 * 1.755e9
"""Instructions that the warps of all multiprocessors issue a second."""

FORMATS = {"bfloat16": "BFloat16", "float32": "Float32"}
HMMA_FLOPS = {"bfloat16": 16 * 8 * 16 * 2, "tf32": 16 * 8 * 8 * 2}
DMMA_FLOPS = 16 * 8 * 4 * 2
"""Of an instruction in float64; one of 8 x 8 x 4 takes as long."""
STEPS = 3
"""Of a descent: docs/algorithm.md."""
LARGEST = 256
"""The largest R that a block descends on; beyond, a block has a tile."""
TILE = 128
WARPS = 8
"""Of a block."""
COPY_BYTES, COPY_INSTRUCTIONS = 512, 15
"""What an asynchronous copy of a warp moves, and takes with its addresses: counted in Gram<128>."""
PARTS_INSTRUCTIONS = 10
"""The same of a copy of parts of C: counted in ApplyDecouple<128>."""
SPLIT_NUMBERS, SPLIT_INSTRUCTIONS = 256, 244
"""Numbers of C that a warp splits at once, and its instructions for them: Split<BFloat16>."""
SCRATCH = {192: (31, 5), 256: (43, 0)}
"""Matrices that pass through scratch memory in a step of a descent, and besides, by its size
(DescentState in csrc/cuda/descent_state.h). Those of smaller ones an L2 cache holds."""

Kernels = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cost:
    """Seconds of the units that multiply, instructions of warps, and bytes."""

    units: float
    instructions: float
    bytes: float = 0
    """Of matrices that pass through memory, beside what the op reads and writes at least."""

    def __add__(self, other: Cost) -> Cost:
        both = self.instructions + other.instructions
        return Cost(self.units + other.units, both, self.bytes + other.bytes)

    def __mul__(self, count: float) -> Cost:
        return Cost(self.units * count, self.instructions * count, self.bytes * count)


FREE = Cost(0, 0)


def up(n: int, multiple: int) -> int:
    return -(-n // multiple)


def fitting(n: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if size >= n), sizes[-1])


def stretch(kernel: Mapping[str, Any], dtype: str, place: int = 0) -> Cost:
    """A stretch of a kernel with matrix products, executed once by a warp."""
    row = kernel["matrix"][place]
    return Cost(row["HMMA"] * HMMA_FLOPS[dtype] / RATES.gemm[dtype], row["all"])


def copies(elements: int, size: int = 2, each: int = COPY_INSTRUCTIONS) -> Cost:
    return Cost(0, size * elements / COPY_BYTES * each)


def added(sums: int) -> Cost:
    """What all warps of a block take to add their sums, so many a lane, to others, and to clear
    them two at a time."""
    return Cost(0, WARPS * 1.5 * sums)


def gram(kernels: Kernels, ranks: Sequence[int], d: int, dtype: str = "bfloat16") -> Cost:
    """Tiles at and below the diagonal (TensorGram in csrc/cuda/tensor_gram.h)."""
    rank = sum(ranks)
    size = fitting(rank, (16, 32, 64, 128))
    count = up(rank, size)
    below = count * (count - 1) // 2
    kernel = kernels[f"Gram<{FORMATS[dtype]}, {size}>"]
    bits = 2 if dtype == "bfloat16" else 4
    vector, chain = (8, 128) if bits == 2 else (4, 32)
    columns = {16: 32, 32: 16}.get(size, 8) * vector  # at a time, by all groups of warps
    groups = {64: 2, 128: 1}.get(size, WARPS)
    # A warp has a stretch for X in rows and one for X in columns; in tiles of 128 others for where
    # the first of its two squares is above the diagonal, as for two warps, and two have nothing.
    ways = [
        stretch(kernel, dtype if bits == 2 else "tf32", i) for i in range(4 if size > 64 else 2)
    ]
    whole = (ways[0] + ways[1]) * 0.5
    diagonal = whole * {64: 6, 128: 4}.get(size, WARPS)
    if size == 128:
        diagonal += ways[2] + ways[3]
    sums = {16: 8, 128: 64}.get(size, 32)
    moves = added(sums) * (up(d, groups * chain) * (count + below))
    return (
        (diagonal * count + whole * (WARPS * below)) * up(d, columns)
        + copies(size * d * (count + 2 * below), bits)
        + moves
    )


def product(kernel: Mapping[str, Any], rank: int, rows: int, d: int, span: int = 0) -> Cost:
    """C X in tiles of `rows` (TensorProduct in csrc/cuda/tensor_product.h): every warp has a
    stretch for 32 rows of X, and adds its sums to others after some of them. C comes for every
    tile, or for `span` columns where it is in shared memory as a whole."""
    columns, step = {16: (512, 16), 32: (256, 32)}.get(rows, (16384 // rows, 32))
    tiles = up(rank, rows) * up(d, columns)
    once = stretch(kernel, "bfloat16") * (WARPS * up(rank, step)) + copies(rank * columns)
    depths = up(rank, 128 if rows <= 128 else 64)
    if depths > 1:
        once += added(rows * columns // (WARPS * 32)) * depths
    parts = copies(rows * step * up(rank, step), 4, PARTS_INSTRUCTIONS)
    times = up(d, span) if span and depths == 1 else tiles
    return once * tiles + parts * times + split(rank)


def split(rank: int) -> Cost:
    """C [rank, rank] in two parts (csrc/cuda/split.cu), which are written and read besides."""
    numbers = rank * 16 * up(rank, 16)
    return Cost(0, numbers / SPLIT_NUMBERS * SPLIT_INSTRUCTIONS, 2 * 4 * numbers)


def apply(kernels: Kernels, ranks: Sequence[int], d: int) -> Cost:
    rank = sum(ranks)
    rows = fitting(rank, (16, 32, 64, 128))
    return product(kernels[f"TensorApply<BFloat16, {rows}>"], rank, rows, d, 512)


def apply_decouple(kernels: Kernels, ranks: Sequence[int], d: int) -> Cost:
    """The product, and S a of every adapter for 32 rows of S, in the end also 16, 8 rows of a and
    32 columns at a time; the rows of a before those of S are left out, where S is zero."""
    rank = sum(ranks)
    size = fitting(rank, (16, 32, 64, 128, 256, 512))
    kernel = kernels[f"ApplyDecouple<BFloat16, {size}, true>"]
    of_32, of_16 = (i for i, row in enumerate(kernel["matrix"]) if "LDSM" not in row)
    total = product(kernel, rank, min(size, 256) if size < 512 else 128, d)
    for r in ranks:
        for row in range(0, r, 32):
            place = of_16 if r - row <= 16 else of_32
            total += stretch(kernel, "tf32", place) * (up(r - row, 8) * up(d, 32))
    return total


def block_gram(kernels: Kernels, ranks: Sequence[int], d: int) -> Cost:
    """Tiles at and below the diagonal of 8, 16, 32 or 64 rows, of which four warps share the
    columns; of a tile beside it each has half of the rows (DoubleGram in csrc/cuda/double_gram.h).
    """
    row = kernels["BlockGram<BFloat16>"]["matrix"]
    total = FREE
    for r in ranks:
        size = fitting(r, (8, 16, 32, 64))
        count, rows = up(r, size), max(size, 16)
        columns = 4096 // rows  # at a time
        place = {64: 2, 32: 4, 16: 6}.get(size, 8)
        tiles = ways(row, place) * count + ways(row, 0) * (count * (count - 1) / 2)
        moves = copies(rows * columns) * count**2
        total += (tiles * 4 + moves) * up(d, columns)
    return total


def ways(stretches: Sequence[Mapping[str, int]], place: int) -> Cost:
    """The mean of two stretches in float64, for X in rows and in columns."""
    costs = (
        Cost(x["DMMA"] * DMMA_FLOPS / RATES.gemm["float64"], x["all"])
        for x in stretches[place : place + 2]
    )
    return sum(costs, FREE) * 0.5


def orthogonalize(kernels: Kernels, ranks: Sequence[int], d: int) -> Cost:
    """STEPS steps: three whole products and one up to the diagonal, which issues as many
    instructions; of the first step one of each (SquareProduct in csrc/cuda/square_product.h)."""
    rank = sum(ranks)
    if rank > LARGEST:
        return descent_by_tiles(kernels, rank)
    size = fitting(rank, (16, 32, 64, 96, 128, 192, 256))
    rows, columns = {16: (1, 1), 32: (1, 2)}.get(size, (2, 4))  # the grid of warps
    region = size if size <= 128 else 64
    tiles = [
        columns * n < 2 * rows * (m + 1) + begin // 8
        for begin in range(0, size, region)
        for m in range(region // (16 * rows))
        for n in range(size // (8 * columns))
    ]
    one = stretch(kernels[f"Descent<{size}>"], "tf32") * (
        rows * columns * size // region * up(rank, 8)
    )
    half = Cost(one.units * sum(tiles) / len(tiles), one.instructions)
    a_step, besides = SCRATCH.get(size, (0, 0))
    passing = Cost(0, 0, (a_step * STEPS + besides) * 4 * size**2)
    return one * (3 * STEPS - 2) + half * STEPS + passing


def descent_by_tiles(kernels: Kernels, rank: int) -> Cost:
    """The same products tile by tile (csrc/cuda/tiles_phases.h), of F those at and below the
    diagonal. Of the bytes, matrices that a phase reads or writes, each once: Gradient 3, Metric 6,
    Turn 6, Changes 4.5, Advance 6; in the first step Metric and Turn 2 less and Changes 1; 7.5
    before and after, besides G and C."""
    count = up(rank, TILE)
    below = count * (count - 1) // 2
    one = stretch(kernels["Metric"], "tf32") * (WARPS * 4 * up(rank, 32))
    one += added(64) * up(rank, 64)
    half = one * below + Cost(one.units * 5 / 8, one.instructions) * count
    matrices = 25.5 * STEPS - 5 + 7.5
    passing = Cost(0, 0, matrices * 4 * (TILE * count) ** 2)
    return one * (count**2 * (3 * STEPS - 2)) + half * STEPS + passing


OPS: Sequence[tuple[str, torch.dtype, Callable[[Kernels, Sequence[int], int], Cost]]] = (
    ("gram", torch.bfloat16, gram),
    ("gram", torch.float32, partial(gram, dtype="float32")),
    ("orthogonalize", torch.float32, orthogonalize),
    ("apply", torch.bfloat16, apply),
    ("block_gram", torch.bfloat16, block_gram),
    ("apply_decouple", torch.bfloat16, apply_decouple),
)
"""Op, dtype of the factors, and what its kernel takes."""


def sides(workload: Workload, op: str) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Ranks, d and number of the sides that an op of a `do` merge is for."""
    ranks: dict[str, list[int]] = {}
    for member in workload.members:
        for shape in member.modules:
            ranks.setdefault(shape.name, []).append(member.rank)
    kinds: Counter[tuple[tuple[int, ...], int]] = Counter()
    for shape in workload.modules:
        own = tuple(ranks[shape.name])
        both = (shape.n, shape.m)
        lengths = {"gram": both, "orthogonalize": both, "apply_decouple": (shape.n,)}
        kinds.update((own, d) for d in lengths.get(op, (shape.m,)))
    for (own, d), count in kinds.items():
        if sum(own) <= d or op == "block_gram":
            yield own, d, count


def least_work(op: str, dtype: torch.dtype, ranks: tuple[int, ...], d: int) -> Work:
    if op == "orthogonalize":
        return bounds.orthogonalize([sum(ranks)], [STEPS])
    x = problem(ranks, d, dtype)
    if op in ("gram", "block_gram"):
        return getattr(bounds, op)([x])
    return getattr(bounds, op)([coefficients(x, x.rank > x.d)], [x], dtype)


def row(
    workload: Workload,
    op: str,
    dtype: torch.dtype,
    model: Callable[[Kernels, Sequence[int], int], Cost],
    kernels: Kernels,
) -> str:
    work, cost = NOTHING, FREE
    for ranks, d, count in sides(workload, op):
        one = least_work(op, dtype, ranks, d)
        work += Work(one.bytes * count, {k: n * count for k, n in one.flops_in.items()})
        cost += model(kernels, ranks, d) * count
    bound, limit = RATES.seconds(work)
    takes = {
        "bytes": (work.bytes + cost.bytes) / RATES.copy,
        "products": cost.units,
        "instructions": cost.instructions / ISSUED,
    }
    slowest = max(takes, key=lambda name: takes[name])
    numbers = " | ".join(f"{1e3 * seconds:.3f}" for seconds in takes.values())
    share = f"{min(1.0, bound / takes[slowest]):.0%}"
    name = f"`{op}`" + (", float32" if op == "gram" and dtype == torch.float32 else "")
    return f"| {workload.name} | {name} | {1e3 * bound:.3f} ({limit}) | {numbers} | {share} |"


def table() -> str:
    record = json.loads(RECORD.read_text())
    kernels = {name: row for source in record.values() for name, row in source[ARCH].items()}
    head = [
        "| workload | op | least, ms | bytes | products | instructions | share at best |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [
        row(WORKLOADS[name], *op, kernels)
        for name in CHOSEN
        for op in OPS
        if next(sides(WORKLOADS[name], op[0]), None)
    ]
    return "\n".join([*head, *rows])


def main() -> None:
    PAGE.write_text(fill(PAGE.read_text(), {"gpu model": table()}))


if __name__ == "__main__":
    main()
