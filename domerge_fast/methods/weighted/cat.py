"""`linear` under PEFT's name for it."""

from __future__ import annotations

import dataclasses

from . import linear

__all__ = ["METHOD"]

METHOD = dataclasses.replace(
    linear.METHOD, name="cat", summary="linear, under PEFT's name: factors concatenated"
)
