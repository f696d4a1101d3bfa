"""project_out: an adapter without what it has along another one's update."""

from __future__ import annotations

import glob
import os
from typing import Any

from .api import merge
from .direction import shares
from .errors import OptionError
from .merged import Merged
from .reading import Source, read

__all__ = ["project_out"]


def project_out(
    adapter: Source,
    direction: Source,
    *,
    output: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    **options: Any,
) -> Merged:
    """τ - c τ_d in every module, with c = <τ, τ_d> / ||τ_d||^2: what is left is orthogonal to the
    direction. It is the merge of the two by `linear` with the weights 1 and -c.

    adapter, direction: as the adapters of `merge`. output and options: as of `merge`.

    A direction is one number a module: this takes what the adapter has of the *whole* of the
    other update, and nothing of what that does in part. No data is used, and nothing is promised
    of what the model says then: measure it. Raises as `merge` does.
    """
    for name in ("method", "weights", "weights_for", "rules", "scale"):
        if name in options:
            raise OptionError(name, "follows from the direction", "leave it out")
    loaded, _ = read([adapter, direction], base_model)
    rows = {glob.escape(name): [1.0, -c] for name, c in shares(*loaded).items()}
    return merge(
        [adapter, direction],
        "linear",
        weights=[1.0, 0.0],
        weights_for=rows,
        scale=1.0,
        output=output,
        base_model=base_model,
        **options,
    )
