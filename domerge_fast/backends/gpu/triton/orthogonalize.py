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

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from ..phases import descend
from . import _problem
from . import descent_scalars as scalars
from . import descent_tiles as tiles

__all__ = ["SIZES", "orthogonalize"]

SIZES = (16, 32, 64, *(n << k for k in range(6, 20) for n in (2, 3)))
TILES = {16: 16, 32: 32, 64: 32}
"""By size; 64 beyond."""

WARPS = {16: 1, 32: 4, 64: 8}
"""By tile."""

CHUNK = 16
"""Rows that are multiplied at a time."""

SMALL = 32
"""Rows, at most, of a tile whose pairs of adapters are summed."""


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
    """See Kernels.orthogonalize."""
    tile = TILES.get(size, 64)
    each = _problem.numbers(size, adapters, frobenius, tile)
    rule = (size, tile, frobenius, gamma, tol)

    def start(batch: Tensor, memory: Tensor) -> _Descent:
        return _Descent(batch, starts, memory, out, stats, *rule)

    descend(work, each, _problem.RUNNING.value, steps, start)


@dataclass(frozen=True, eq=False)
class _Descent:
    batch: Tensor
    starts: Tensor
    memory: Tensor
    out: Tensor
    stats: Tensor
    size: int
    tile: int
    frobenius: bool
    gamma: float
    tol: float

    def _of_tiles(self, *phases: tl.constexpr) -> None:
        for phase in phases:
            side = self._small if phase in (tiles.ENERGIES, tiles.QUARTICS) else self.tile
            tiles.descent_tiles_kernel[((self.size // side) ** 2, len(self.batch))](
                self.batch, self.starts, self.memory, self.memory.shape[1], self.size, self.out,
                self.gamma,
                PHASE=phase.value, FROBENIUS=self.frobenius, TILE=side, CHUNK=CHUNK,
                num_warps=WARPS[side], num_stages=2,
            )  # fmt: skip

    def _of_scalars(self, phase: tl.constexpr) -> None:
        scalars.descent_scalars_kernel[(len(self.batch),)](
            self.batch, self.starts, self.memory, self.memory.shape[1], self.size, self.stats,
            self.gamma, self.tol,
            PHASE=phase.value, FROBENIUS=self.frobenius, TILE=self.tile, SMALL=self._small,
            num_warps=8,
        )  # fmt: skip

    @property
    def _small(self) -> int:
        return min(self.tile, SMALL)

    def begin(self) -> None:
        self._of_scalars(scalars.START)
        self._of_tiles(tiles.FILL, tiles.ENERGIES)
        self._of_scalars(scalars.BEGIN)

    def step(self, first: bool) -> None:
        self._of_tiles(tiles.GRADIENT, tiles.PRODUCTS, tiles.TURN, tiles.CHANGES)
        if self.frobenius:
            self._of_tiles(tiles.QUARTICS)
        self._of_scalars(scalars.SEARCH)
        self._of_tiles(tiles.ADVANCE)

    def finish(self) -> None:
        self._of_tiles(tiles.LEAVE, tiles.ENERGIES)
        self._of_scalars(scalars.FINISH)
