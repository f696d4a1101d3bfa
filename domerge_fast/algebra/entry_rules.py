"""What an elementwise method does to every entry of the updates τ_i = s_i B_i A_i of a module.

    1. trim:  v_i = gain_i τ_i where τ_i is kept, 0 elsewhere  (Trim, drawn by Draw)
    2. elect: a sign for every entry, by the v_i of all adapters  (Election)
    3. merge: sum, or mean, of w_i v_i over the adapters that agree with it

All arithmetic is float32 and fixed to the bit, so that two passes over the same entry, whatever
the tiles and threads, see the same numbers:

    τ_i[r, c] = s_i x  with  x = fma(B_i[r, k], A_i[k, c], x), k ascending from x = 0

and sums over adapters are fma(w_i, v_i, sum), i ascending from 0. (Plain PyTorch has no fma: the
backend "torch" is fixed only for one shape of tiles, which it always uses.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["HIGH_BITS", "LOW_BITS", "Draw", "Election", "Trim"]

HIGH_BITS, LOW_BITS = 16, 15
"""|τ| in float32 has 31 bits; they order as |τ| does. Selection reads them in two passes."""


@dataclass(frozen=True)
class Trim:
    """Which entries of one adapter's τ [m, n] are kept, and what they are multiplied by.

    low, high: kept if low <= |τ| <= high. keep: of these, kept with this probability. spread: the
    probability depends on where |τ| stands in its row of n entries, p = keep + spread (2 q - 1)
    with q = rank / (n - 1), rank = 0 for the smallest |τ| (equal ones by column; q = 0.5 for
    n = 1). rescale: divide what is kept by its probability. gain: multiplied in first.
    """

    low: float = 0.0
    high: float = math.inf
    keep: float = 1.0
    spread: float = 0.0
    gain: float = 1.0
    rescale: bool = False


@dataclass(frozen=True)
class Election:
    """Whose values of an entry are merged, and how.

    sign: "none" (all), "total" (those with the sign of sum_i u_i) or "frequency" (of the sum of
    the signs of u_i); a sum of 0 elects +. weighted: u_i = w_i v_i instead of v_i; an adapter
    agrees if u_i has the elected sign, which 0 never has. mean: divide sum_i w_i v_i by 1 ("sum"),
    by how many agree ("count", at least 1) or by the sum of their w_i ("weight", 1 where it is 0).
    """

    sign: str = "none"
    weighted: bool = False
    mean: str = "sum"


@dataclass(frozen=True)
class Draw:
    """Random numbers that depend on nothing but what they are drawn for: Philox4x32-10.

    key: the low and the high half of seed. counter: (column // 4, row, adapter, module); word
    column % 4 of the four belongs to the entry, which is kept if (word >> 8) 2^-24 < p in float32.
    adapters: one number a block. Source: Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011.
    """

    seed: int
    module: int
    adapters: tuple[int, ...]
