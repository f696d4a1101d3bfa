"""The scripts under examples/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

__all__ = ["example_module"]

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def example_module(name: str) -> Iterator[ModuleType]:
    """The script of this name. It finds those beside it; none of them is there any more after."""
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        for script in EXAMPLES.glob("*.py"):
            if script.stem not in before:
                sys.modules.pop(script.stem, None)
