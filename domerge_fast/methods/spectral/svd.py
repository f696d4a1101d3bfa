"""The best rank-k approximation of λ sum_i w_i τ_i (what PEFT's "svd" does with dense matrices).

`linear` (with its `power`), then truncated exactly in factor space; k defaults to the largest rank
of the adapters.
Cost: O((m + n) R^2 + R^3) a module. Source: Eckart and Young, 1936.
"""

from __future__ import annotations

import dataclasses

from ..weighted import linear

__all__ = ["METHOD"]

METHOD = dataclasses.replace(
    linear.METHOD,
    name="svd",
    summary="exact weighted sum, truncated to rank k by its SVD",
    truncates=True,
    cost="two reads, R x R decompositions",
    source="Eckart and Young",
)
