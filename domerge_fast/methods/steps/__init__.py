"""Steps that compose with every merge method: before it on the stacks, after it on its results."""

from __future__ import annotations

from ...registry import Registry
from . import (
    canonicalize,
    equalize,
    norm_match,
    orthogonalize,
    osrm_project,
    pico,
    smooth,
    subspace_boost,
)
from .base import PostStep, PreStep

__all__ = ["POST", "PRE"]

PRE = Registry(
    "pre",
    PreStep,
    (m.STEP for m in (orthogonalize, pico, canonicalize, equalize, smooth, osrm_project)),
)
POST = Registry("post", PostStep, (m.STEP for m in (subspace_boost, norm_match)))
