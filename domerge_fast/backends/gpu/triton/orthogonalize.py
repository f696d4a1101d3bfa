"""C [R, R] with Xhat = C X: the descent of backends/descent.py, for any R.

With Q = D G and the adapters' curvatures K, which precondition them, a step is
    GRADIENT  P = ((V o H) C + 2 gamma (C - I)) / K
    PRODUCTS  P G, and its products with K P, the last P and D
    TURN      D = -P + beta D, Q = -P G + beta Q      beta by Polak and Ribiere
    CHANGES   E = Q C^T + C Q^T, F = Q D^T            with the quartics ||H_ij(eta)||^2
    SEARCH    eta from the line search
    ADVANCE   C += eta D, H += eta E + eta^2 F
A launch does a phase of all problems, a program a tile; SEARCH one problem. So any R takes the
same few kernels, which hold a tile in registers and nothing else. Matrices lie in scratch memory.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from . import _problem
from . import descent_scalars as scalars
from . import descent_tiles as tiles

__all__ = ["SIZES", "orthogonalize"]

SIZES = (16, 32, 64, *(n << k for k in range(6, 15) for n in (2, 3)))
TILES = {16: 16, 32: 32, 64: 32}
"""By size; 64 beyond."""

WARPS = {16: 1, 32: 4, 64: 8}
"""By tile."""

CHUNK = 16
"""Rows that are multiplied at a time."""

SMALL = 32
"""Rows, at most, of a tile whose pairs of adapters are summed."""

MEMORY = 256 << 20
"""Bytes that the problems of one launch may hold, unless one needs more."""

MAX_PROBLEMS = 1 << 15
"""Of one launch."""


def orthogonalize(
    size: int,
    adapters: int,
    work: Tensor,
    starts: Tensor,
    out: Tensor,
    stats: Tensor,
    frobenius: bool,
    gamma: float,
    steps: int,
    tol: float,
) -> None:
    """See Kernels.orthogonalize.

    Waits after every step for whether another one is needed, except where a CUDA graph is
    captured: that gets all of them, and where none is needed they do nothing.
    """
    tile = TILES.get(size, 64)
    small = min(tile, SMALL)
    each = _problem.numbers(size, adapters, frobenius, tile)
    count = min(len(work), max(1, MEMORY // (8 * each)), MAX_PROBLEMS)
    memory = torch.empty(count, each, dtype=torch.float64, device=out.device)
    captured = _is_captured(out)
    pairs = (tiles.ENERGIES, tiles.QUARTICS)

    for batch in work.split(count):

        def of_tiles(*phases: tl.constexpr, batch: Tensor = batch) -> None:
            for phase in phases:
                side = small if phase in pairs else tile
                tiles.descent_tiles_kernel[((size // side) ** 2, len(batch))](
                    batch, starts, memory, each, size, out, gamma,
                    PHASE=phase.value, FROBENIUS=frobenius, TILE=side, CHUNK=CHUNK,
                    num_warps=WARPS[side], num_stages=2,
                )  # fmt: skip

        def of_scalars(phase: tl.constexpr, batch: Tensor = batch) -> None:
            scalars.descent_scalars_kernel[(len(batch),)](
                batch, starts, memory, each, size, stats, gamma, tol,
                PHASE=phase.value, FROBENIUS=frobenius, TILE=tile, SMALL=small, num_warps=8,
            )  # fmt: skip

        of_scalars(scalars.START)
        of_tiles(tiles.FILL, tiles.ENERGIES)
        of_scalars(scalars.BEGIN)
        for _ in range(steps):
            of_tiles(tiles.GRADIENT, tiles.PRODUCTS, tiles.TURN, tiles.CHANGES)
            if frobenius:
                of_tiles(tiles.QUARTICS)
            of_scalars(scalars.SEARCH)
            of_tiles(tiles.ADVANCE)
            if not captured and not memory[: len(batch), _problem.RUNNING.value].any():
                break
        of_tiles(tiles.LEAVE, tiles.ENERGIES)
        of_scalars(scalars.FINISH)


def _is_captured(out: Tensor) -> bool:
    return out.is_cuda and torch.cuda.is_current_stream_capturing()
