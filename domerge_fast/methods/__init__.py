"""The table of merge methods. A new method is one new file and one line here."""

from __future__ import annotations

from types import MappingProxyType

from . import do, linear, svd
from .base import Method

TABLE: MappingProxyType[str, Method] = MappingProxyType(
    {m.name: m for m in (do.METHOD, linear.METHOD, svd.METHOD)}
)
