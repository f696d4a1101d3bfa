"""The launches of a GPU backend: what each reads, and where it writes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .splitting import Splitting
from .tables import Table

__all__ = ["Kernels"]


class Kernels(Protocol):
    """The launches that a backend supplies.

    All tensors are on the device, all tables int64. `out` is the first problem's result; offsets of
    the others are distances from its first element, in elements, positive or negative. What
    results hold before is arbitrary.
    """

    def sizes(self, op: str) -> tuple[int, ...]:
        """The padded sizes, rising, that an op has kernels for. The tiles of "gram" and "apply"
        have these many rows and any R; "orthogonalize" pads R to them, and takes none above the
        last; so does "apply_decouple", of which the last takes all larger ones."""

    def columns(self, op: str, size: int) -> int:
        """Columns of X in a tile of "apply" or "apply_decouple" of this size."""

    def gram(
        self, table: Table, size: int, tiles: Tensor, sums: Tensor, parts: Tensor, out: Tensor
    ) -> None:
        """G = X X^T in float32, scaled, both triangles.

        tiles [N, 7]: problem, row tile i, column tile j <= i, begin, end (columns of X), part,
        offset of G. Tile (i, j) is rows i size to (i + 1) size times rows j size to (j + 1) size.
        Part -1: the tile spans d and goes to out; else it goes, unscaled, to parts[part]
        [size, size]. sums [M, 6]: problem, i, j, first part, number of parts, offset of G: the
        parts are then added in order, scaled, and written to out.
        """

    def block_gram(self, table: Table, work: Tensor, out: Tensor) -> None:
        """K_i = X_i X_i^T in float64, scaled. work [N, 4]: problem, block, its rank, offset."""

    def orthogonalize(
        self,
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
        """C of every problem, by the rule of descent.py. adapters: the largest T.

        work [P, 6]: address of G (float32 [R, R]), R, T, position in starts of its T + 1 entries
        (the first row of each adapter, then R), offset of C, row of stats [., 5] in float64.
        """

    def splitting(self, dtype: torch.dtype, out_dtype: torch.dtype) -> Splitting | None:
        """What makes the parts that "apply" and "apply_decouple" read in place of C, with X of
        `dtype` and results of `out_dtype`; None where they read C."""

    def apply(self, table: Table, size: int, tiles: Tensor, work: Tensor, out: Tensor) -> None:
        """C X, or X where there is no C, scaled and cast to out's dtype.

        work [P, 3]: address of C (float32 [K, R]), or of its parts, or 0; K, offset. tiles [N, 3]:
        problem, first row, first column of a tile of `size` rows. Results are [K, d]; [d, K] in
        columns.
        """

    def root_numbers(self, rank: int) -> int:
        """How many numbers a root of [rank, rank] takes."""

    def roots(self, work: Tensor, out: Tensor, norms: Tensor) -> None:
        """S [r, r] with norm^2 S^T S = K, norm^2 = trace K, of every block, in float32 and in the
        form that apply_decouple reads.

        work [N, 3]: address of K (float64 [r, r]), r, offset. norms [N] in float32. By Cholesky
        with diagonal pivoting in float64, stopped where what is left is below 1e-16 r trace K;
        the rows from there on are zero. K = 0 gives S = 0 and norm 0.
        """

    def as_roots(self, roots: Tensor) -> Tensor:
        """Roots [P, r, r] that were found elsewhere in that form, [P, numbers] in float32."""

    def apply_decouple(
        self,
        table: Table,
        size: int,
        rank: int,
        tiles: Tensor,
        work: Tensor,
        offsets: Tensor,
        roots: Tensor,
        norms: Tensor,
        omegas: Tensor,
        scale: float,
        out: Tensor,
        energies: Tensor,
    ) -> None:
        """A' [R, d] of ops.apply_decouple without `full`, for problems in rows, R <= rank.

        work [P, 2]: as in apply, without K. tiles [N, 3]: problem, first column, slot. offsets [N]:
        of every block's S in roots; norms and omegas (float64) [N]: one a block. energies
        [N, slots] in float64, zero before: the sum of mag_i^2 over a slot's columns. Where
        ||S_i a_i|| <= ZERO_COLUMN ||a_i||, mag_i is zero.
        """

    def largest(self, dtype: torch.dtype, tiles: Tensor, tops: Tensor) -> None:
        """Raises tops[i] (int32, 0 before) to the bits of the largest magnitude of tensor i as
        float32, where Inf is above all numbers and NaN above Inf.

        tiles [N, 3]: tensor, address of a stretch of it, elements.
        """
