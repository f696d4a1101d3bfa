"""The C++ extension. Addresses are `tensor.data_ptr()`; dtypes are the codes of algebra/side.py.

Nothing is checked here: callers pass contiguous CPU memory of the sizes that the names imply and
keep it alive. `DOMERGE_CPU_ISA` chooses the instruction set, by default the best one; RuntimeError
where this machine cannot run it. The GIL is released while the kernels run. In Python's main thread
they answer signals: what a handler raises is raised once no thread works any more.
"""

from collections.abc import Callable, Sequence
from typing import Any

Numbers = Sequence[int] | Sequence[float] | bytes | memoryview
"""One by one, or a buffer of all in 8 bytes each."""

class Problems:
    """As algebra/side.py packs them: addresses of all blocks, heads of all problems, rows of all
    blocks. ValueError where their numbers do not agree."""

    def __init__(self, addresses: bytes, heads: bytes, rows: bytes) -> None: ...

class LaunchTables:
    """Tables of int64 numbers that launches on a GPU read (backends/gpu/kernels.py), one after the
    other in one buffer, which this is. What makes tables returns their numbers. Of every side there
    is one entry in what is said of sides, and in `counts` how many modules it has. sizes: those
    that kernels are padded to, rising: there is a list of tiles for each that serves some. out:
    addresses of results. The GIL is held. ValueError where numbers do not agree; RuntimeError for a
    table that is made after the buffer was read."""

    places: list[tuple[int, int, int]]
    """Of every table: where it begins, its rows, and the numbers of a row; 0 for a vector."""
    blocks: int
    largest_rank: int

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def add(self, values: Numbers, width: int, /) -> int: ...
    def describe(self, addresses: bytes, heads: bytes, rows: bytes, count: int, /) -> int:
        """The first three: blocks, owner and problems (gpu.tables.Table). Returns how many
        neighbours one read can take of every block: count, or 1."""

    def gram(
        self, sizes: Sequence[int], out: Numbers, chunk: int, /
    ) -> list[tuple[int, int, int, int]]:
        """(size, tiles, sums, number of parts)."""

    def block_gram(self, out: Numbers, /) -> int: ...
    def orthogonalize(
        self,
        sizes: Sequence[int],
        grams: Numbers,
        out: Numbers,
        ranks: Sequence[Sequence[int]],
        counts: Sequence[int],
        /,
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """starts, (size, work, largest T)."""

    def coefficients(self, cs: Numbers, rows: Sequence[int], counts: Sequence[int], /) -> None:
        """What apply and apply_decouple read: C [rows, R] of every problem, 0 for none."""

    def part_numbers(self, numbers: Callable[[int, int], int], /) -> int:
        """How many float32 the parts of all C take; numbers(rows, R): those of one."""

    def split(self, memory: int, height: int, /) -> tuple[int, int]:
        """tiles, work; the parts in this memory are read in place of C then."""

    def apply(
        self, sizes: Sequence[int], columns: Sequence[int], out: Numbers, itemsize: int, /
    ) -> tuple[int, list[tuple[int, int]]]:
        """work, (size, tiles)."""

    def roots(
        self, packed: Numbers, numbers: Callable[[int], int], most: int, /
    ) -> tuple[int, int, int]:
        """work, offsets, how many numbers all roots take; r above `most` are 0 in work."""

    def apply_decouple(
        self,
        sizes: Sequence[int],
        columns: Sequence[int],
        out: Numbers,
        itemsize: int,
        omegas: Sequence[Sequence[float]],
        counts: Sequence[int],
        /,
    ) -> tuple[int, int, int, list[tuple[int, int, int]]]:
        """work, omegas, slots, (size, tiles, largest R)."""

    def largest(
        self,
        tensors: Numbers,
        sizes: Numbers,
        codes: Numbers,
        itemsizes: Sequence[int],
        chunk: int,
        /,
    ) -> list[tuple[int, int]]:
        """(code, tiles)."""

    def block_largest(
        self,
        addresses: bytes,
        heads: bytes,
        rows: bytes,
        itemsizes: Sequence[int],
        chunk: int,
        /,
    ) -> list[tuple[int, int]]:
        """`largest` of all blocks of problems, which are without gaps."""

def places(api: object, types: tuple[type, ...], tensors: list[Any], width: int, /) -> bytes | None:
    """Where row-major matrices without gaps begin, as int64, asked through DLPack's exchange API.
    None unless all are of one of these types of tensors and such matrices, and, but for width 0, on
    one device, each with the dtype and shape of the one `width` before it."""

def places_in_turn(
    api: object, types: tuple[type, ...], columns: Sequence[list[Any]], at: Numbers, /
) -> bytes | None:
    """`places`, with a width of all columns, of what these have at the positions: one position
    after the other. IndexError for a position that a column lacks."""

def cut(shares: Numbers, least: int, /) -> list[int]:
    """Where pieces end whose shares, float64, add up to 1: before the share that would exceed it,
    one at least in a piece; or, where `least` is not 0, behind the one that reaches it, `least` at
    least in a piece."""

def by_number(
    which: Numbers, names: tuple[str, ...], begin: int, end: int, /
) -> list[tuple[int, tuple[str, ...], bytes]]:
    """The positions from begin to end by their number in `which`, in the order that the first of
    each has: the number, their names, and they as int64."""

def within(
    first: int,
    count: int,
    size: int,
    step: int,
    distance: int,
    wide: bool,
    low: float,
    high: float,
    /,
) -> bool:
    """Whether no number of so many rows of `size`, float32 or, when wide, float64, is outside of
    low and high; NaN is. step: from one row to the next, distance: from one number of it to the
    next, in elements."""

def norms_apart(
    first: int,
    count: int,
    step: int,
    distance: int,
    ranks: Numbers,
    wide: bool,
    least: float,
    /,
) -> float:
    """How many times the norms of two adapters' factors are apart, at most, but for those of
    `least` of the largest one or less. The squared norms are sums of ranks[i] numbers that follow
    each other in each of so many rows, float32 or, when wide, float64; step: from one row to the
    next, distance: from one number of it to the next, in elements."""

def over_products(x: int, y: int, count: int, size: int, out: int, /) -> None:
    """out: x_ij / (y_i y_j) of so many matrices [size, size] and vectors [size], float64, 0 where
    the divisor is not above 0."""

def spread(runs: Sequence[tuple[int, int, int]], inner: Sequence[int], /) -> bytes:
    """The numbers of runs (first, step, how many), one run after the other, each with all of
    `inner` added to it, as int64."""

def isa() -> str:
    """The instruction set in use: amx, avx512_bf16, avx512, avx2 or baseline."""

def isas() -> list[str]:
    """Those that this machine can run, best first."""

def gram(problems: Problems, out: Numbers, wide: bool, threads: int, /) -> None:
    """out: float32 [R, R] a problem, or float64 when wide."""

def block_gram(problems: Problems, out: Numbers, threads: int, /) -> None:
    """out: float64 [sum r_i^2] a problem."""

def orthogonalize(
    grams: Numbers,
    ranks: Numbers,
    counts: Numbers,
    out: Numbers,
    stats: int,
    frobenius: bool,
    gamma: float,
    steps: int,
    tol: float,
    threads: int,
    /,
) -> None:
    """grams, out: float32 [R, R] a problem; stats: float64 [P, 5]."""

def orthogonalize_factors(
    problems: Problems,
    out: Numbers,
    stats: int,
    half: bool,
    gamma: float,
    steps: int,
    tol: float,
    threads: int,
    /,
) -> None:
    """Blocks in rows. out: float32 [R, d] a problem; stats: float64 [P, 7], those of
    factor_descent.FACTOR_STATS and the least share of the sum over all pairs that was of two
    adapters. half: products of bfloat16, where `half_products`.
    """

def long_product(
    left: int,
    right: int,
    depth: int,
    rows: int,
    columns: int,
    out: int,
    half: bool,
    threads: int,
    /,
) -> None:
    """out: float32 [rows, columns] = left^T right of float32 [depth, rows] and [depth, columns].
    half: of bfloat16 products, in which a number has 16 bits, where `half_long_products`."""

def half_long_products() -> bool:
    """Whether the instruction set in use multiplies numbers in two bfloat16 parts faster."""

def half_products() -> bool:
    """Whether the instruction set in use multiplies bfloat16 numbers faster."""

def apply(
    problems: Problems,
    coefficients: Numbers,
    rows: Numbers,
    out: Numbers,
    out_dtype: int,
    finite: int,
    threads: int,
    /,
) -> None:
    """coefficients: float32 [K, R] a problem, or 0 for the identity; rows: the K's. finite: takes a
    bool a problem, whether all of its result is."""

def apply_decouple(
    problems: Problems,
    coefficients: Numbers,
    blocks: Numbers,
    omegas: Numbers,
    scale: float,
    full: Numbers,
    out: Numbers,
    out_dtype: int,
    norms: Numbers,
    finite: int,
    threads: int,
    /,
) -> None:
    """blocks: float64 [sum r_i^2] a problem; full: float64 [R, R] a problem, or none at all.
    finite: as in `apply`."""

def block_products(x: Numbers, y: Numbers, ranks: Numbers, out: int, threads: int, /) -> None:
    """x, y: float32 [R, R] a problem, all of the same ranks; out: float64 [P, T, T]."""

def largest(
    data: Numbers,
    counts: Numbers,
    dtypes: Numbers,
    out: int,
    threads: int,
    /,
) -> None:
    """out [N] = the largest magnitude of each array of `counts` numbers, in float64: of dtypes by
    CODES, and 3 for float64."""

def block_largest(problems: Problems, out: int, threads: int, /) -> None:
    """The same of every block of the problems, whose scale is left out."""

def entry_counts(a: Problems, b: Problems, prefixes: Numbers, out: int, threads: int, /) -> None:
    """a, b: one problem each, a in rows. out: int64 [T, 2^16], or [T, 2^15] with prefixes; zeros,
    which the counts are added to.
    """

def entry_sums(
    a: Problems,
    b: Problems,
    trims: Numbers,
    rescales: Sequence[bool],
    seed: int,
    module: int,
    adapters: Numbers,
    out: int,
    threads: int,
    /,
) -> None:
    """trims: low, high, keep, spread and gain of every adapter. out: float64 [T, 2] of zeros."""

def entry_merge(
    a: Problems,
    b: Problems,
    trims: Numbers,
    rescales: Sequence[bool],
    seed: int,
    module: int,
    adapters: Numbers,
    weights: Numbers,
    sign: int,
    weighted: bool,
    mean: int,
    scale: float,
    out: int,
    threads: int,
    /,
) -> None:
    """sign and mean: codes of csrc/cpu/kernels.h. out: float32 [m, n]."""
