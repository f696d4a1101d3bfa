"""The CUDA extension: one launch an op. backends/gpu/kernels.py (`Kernels`) and gpu/entries.py
(`EntryKernels`) say what each does.

Addresses are `tensor.data_ptr()`, dtypes the codes of algebra/side.py, a stream is its
`cuda_stream`. A table is the addresses of its blocks, owner and problems, and its dtype; a list of
rows is its address and its length. Nothing is checked here: callers keep the memory alive and make
the device current. The GIL is released; RuntimeError where CUDA refuses a launch, ValueError for
more thread blocks than one can have.
"""

_Table = tuple[int, int, int, int]

ON_HOST: bool
"""Whether a C++ compiler compiled the kernels, to run on the CPU (tests)."""

def info() -> dict[str, int | str]:
    """devices, driver, runtime, archs and error.

    Versions are 1000 * major + 10 * minor, 0 when unknown; error is "" when a device is there on
    which the kernels run.
    """

def serves(archs: str, capability: int, /) -> bool:
    """Whether kernels built for `archs` ("80;90") run on a compute capability, 10 * major + minor.

    ValueError if `archs` is no such list.
    """

def set_backwards(value: bool, /) -> None:
    """The order in which threads and blocks run on the host; RuntimeError on a device."""

def set_extra_bits(value: int, /) -> None:
    """How tensor cores add on the host: -1, exactly; else they cut so many bits after float32's
    last, as those of GPUs do. RuntimeError on a device."""

def set_shared_bytes(value: int, /) -> None:
    """The shared memory that a block may have on the host; RuntimeError on a device."""

def gram_sizes() -> list[int]: ...
def orthogonalize_sizes() -> list[int]: ...
def apply_sizes() -> list[int]: ...
def apply_decouple_sizes() -> list[int]: ...
def apply_columns(size: int, /) -> int: ...
def apply_decouple_columns(size: int, /) -> int: ...
def orthogonalize_scratch(size: int, problems: int, frobenius: bool, /) -> int:
    """Bytes of scratch memory for a launch on the current device."""

def apply_decouple_scratch(size: int, tiles: int, rank: int, /) -> int:
    """The same of apply_decouple; rank: the largest R."""

def takes_parts(dtype: int, out_dtype: int, /) -> bool:
    """Whether apply and apply_decouple read the parts that split makes in place of C."""

def split_rows() -> int:
    """Of C, that a tile of split has."""

def split_numbers(rows: int, columns: int, /) -> int:
    """How many numbers of 32 bits the parts of C [rows, columns] take the place of."""

def split(table: _Table, tiles: int, tile_count: int, work: int, stream: int, /) -> None: ...

class Decoupling:
    """Addresses of what apply_decouple reads besides tables, and of the energies [N, slots]."""

    def __init__(
        self,
        work: int,
        offsets: int,
        roots: int,
        norms: int,
        omegas: int,
        scale: float,
        energies: int,
        slots: int,
        scratch: int,
    ) -> None: ...

def gram(
    table: _Table,
    size: int,
    tiles: int,
    tile_count: int,
    sums: int,
    sum_count: int,
    parts: int,
    out: int,
    stream: int,
    /,
) -> None: ...
def block_gram(table: _Table, work: int, count: int, out: int, stream: int, /) -> None: ...
def orthogonalize(
    size: int,
    work: int,
    problems: int,
    starts: int,
    out: int,
    stats: int,
    scratch: int,
    frobenius: bool,
    gamma: float,
    steps: int,
    tol: float,
    stream: int,
    /,
) -> None: ...
def tiled_descent_bytes(size: int, adapters: int, frobenius: bool, /) -> int:
    """Bytes of a problem's memory; adapters: the largest T."""

class TiledDescent:
    """A descent for R above orthogonalize's sizes, step by step, of problems of R <= size.

    memory [problems, each] bytes, aligned to 16: of each problem it begins with a float64 that is
    not 0 while another step is to follow.
    """

    def __init__(
        self,
        size: int,
        work: int,
        problems: int,
        starts: int,
        memory: int,
        each: int,
        out: int,
        stats: int,
        frobenius: bool,
        gamma: float,
        tol: float,
    ) -> None: ...
    def begin(self, stream: int, /) -> None: ...
    def step(self, first: bool, stream: int, /) -> None: ...
    def finish(self, stream: int, /) -> None: ...

def apply(
    table: _Table,
    size: int,
    tiles: int,
    tile_count: int,
    work: int,
    out: int,
    out_dtype: int,
    stream: int,
    /,
) -> None: ...
def roots(work: int, count: int, out: int, norms: int, scratch: int, stream: int, /) -> None:
    """scratch: float64, as many as there are numbers in out."""

def apply_decouple(
    table: _Table,
    size: int,
    rank: int,
    tiles: int,
    tile_count: int,
    numbers: Decoupling,
    out: int,
    out_dtype: int,
    stream: int,
    /,
) -> None: ...
def largest(dtype: int, tiles: int, count: int, tops: int, stream: int, /) -> None: ...

class Updates:
    """The updates of one module: the address and number of their rows, and their shape."""

    def __init__(self, rows: int, adapters: int, m: int, n: int) -> None: ...

def entry_counts(
    table: _Table, updates: Updates, prefixes: int, counts: int, stream: int, /
) -> None:
    """prefixes: 0 for none."""

def entry_sums(
    table: _Table,
    updates: Updates,
    trims: int,
    draw: int,
    rows: int,
    totals: int,
    stream: int,
    /,
) -> None: ...
def entry_merge(
    table: _Table,
    updates: Updates,
    trims: int,
    draw: int,
    weights: int,
    sign: int,
    weighted: bool,
    mean: int,
    scale: float,
    out: int,
    stream: int,
    /,
) -> None: ...
