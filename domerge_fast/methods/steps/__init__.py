"""Steps that compose with every merge method: before it on the stacks, after it on its results."""

from __future__ import annotations

from types import MappingProxyType

from . import (
    canonicalize,
    equalize,
    norm_match,
    orthogonalize,
    pico,
    smooth,
    subspace_boost,
)
from .base import PostStep, PreStep

PRE: MappingProxyType[str, PreStep] = MappingProxyType(
    {m.STEP.name: m.STEP for m in (orthogonalize, pico, canonicalize, equalize, smooth)}
)
POST: MappingProxyType[str, PostStep] = MappingProxyType(
    {m.STEP.name: m.STEP for m in (subspace_boost, norm_match)}
)
