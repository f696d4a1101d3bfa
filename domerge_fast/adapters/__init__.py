"""What an adapter is, which fit together, and what a merge of them consists of; knows no format."""

from __future__ import annotations

from ..storage.lazy import LazyTensor
from .adapter import Adapter, AdapterConfig, Kind, Module
from .bridge import one_spelling
from .compatible import check_compatible
from .style import Style
from .whole import Kept, keep

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Kept",
    "Kind",
    "LazyTensor",
    "Module",
    "Style",
    "check_compatible",
    "keep",
    "one_spelling",
]
