"""The base model of a merge, where one was given: opened once, for adapters that depend on its
weights and for what is written."""

from __future__ import annotations

from collections.abc import Mapping

from .adapters import Adapter, Module
from .adapters.dora import Origin, taken_whole
from .adapters.style import MODEL
from .errors import AdapterError, OptionError
from .formats.choose import of_adapters
from .formats.format import Format
from .formats.model.checkpoint import Checkpoint
from .formats.model.fit import originals
from .formats.model.pipeline import open_base
from .formats.names.originals import by_tables
from .recipe import Recipe

__all__ = ["Base"]


class Base:
    """asked: a recipe, which may name a base."""

    def __init__(self, asked: Recipe) -> None:
        self._asked = asked
        self._opened: Checkpoint | None = None

    def whole(self, adapter: Adapter) -> Adapter:
        """What is no low rank as it is stored, taken whole, where there is a base; else as it is.
        AdapterError where the base does not have its weights, and nothing asked for holds it."""
        if not adapter.magnitudes or self._asked.base is None:
            return adapter
        row, _ = of_adapters(self._asked, [adapter])
        holds = row.dense or row.holds.differences
        if not holds and self._asked.rank is None and self._asked.energy is None:
            problem = "is a DoRA, whose updates have full rank"
            remedy = "give a rank or an energy, or write form deltas or model"
            raise AdapterError(adapter.name, None, problem, remedy)
        base = self._open()
        if base.is_pipeline:
            return taken_whole(adapter, by_tables(adapter, base))
        if adapter.style and adapter.style.names != MODEL:
            problem = "is a DoRA of an image or video model"
            remedy = "give its base as one safetensors file, or a folder of diffusers"
            raise AdapterError(adapter.name, None, problem, remedy)
        return taken_whole(adapter, originals(adapter.modules, base))

    def of(self, row: Format) -> Checkpoint | None:
        """As a format needs it: of some, the config is enough. OptionError for a base that the
        format does not write."""
        if self._asked.base is None:
            return None
        if self._opened is None and row.config_only:
            return open_base(self._asked.base.name, row.config_only)
        base = self._open()
        if base.is_pipeline and row.needs_base:
            problem = f"{str(base.folder)!r} is the base of an image or video model"
            raise OptionError("base", problem, "write an adapter, and merge that with its tool")
        return base

    def origin(self, modules: Mapping[str, Module]) -> Origin | None:
        """The weights of modules, where the base that was opened has any of a language model."""
        base = self._opened
        if base is None or base.is_pipeline or not base.files:
            return None
        return originals(modules, base)

    def _open(self) -> Checkpoint:
        if self._opened is None:
            assert self._asked.base
            self._opened = open_base(self._asked.base.name)
        return self._opened
