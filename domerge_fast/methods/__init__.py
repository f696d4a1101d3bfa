"""The table of merge methods. A new method is one new file and one line here."""

from __future__ import annotations

from types import MappingProxyType

from . import cat, do, iso_c, iso_cts, linear, pico, subspace_boost, svd, tsvm, wudi
from .base import Method

TABLE: MappingProxyType[str, Method] = MappingProxyType(
    {
        m.METHOD.name: m.METHOD
        for m in (do, linear, cat, svd, tsvm, iso_c, iso_cts, subspace_boost, wudi, pico)
    }
)
