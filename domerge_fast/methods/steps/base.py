"""What a step before or after a merge method is, and how steps put modules into batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from ...adapters.plan import Stack
from ...registry import usable
from ...storage.features_file import FeaturesFile
from ..base import Settings
from ..made import Factors

__all__ = ["Beside", "PostStep", "PreStep", "Run", "alike"]

Run = Callable[[Sequence[Stack], Settings], list[Stack]]


@dataclass(frozen=True)
class Beside:
    """What a merge is given beside factors. names: of its adapters. features: what layers are given
    by task; energy: the share of that which is meant, None for the step's own."""

    names: tuple[str, ...]
    features: FeaturesFile | None = None
    energy: float | None = None


@dataclass(frozen=True)
class PreStep:
    """A row of `PRE`.

    run(stacks, settings) -> stacks of the same modules, adapters, ranks and weights in the same
    order, with other updates. Blocks that it makes are float32. of(beside) -> run, for a step that
    needs what a merge is given besides, in place of it.
    """

    name: str
    summary: str
    run: Run | None = None
    why_not: Callable[[], str | None] = usable
    of: Callable[[Beside], Run] | None = None

    def bound(self, beside: Beside) -> Run:
        """What it does in one merge. OptionError where that lacks what it needs."""
        if self.of:
            return self.of(beside)
        assert self.run
        return self.run


@dataclass(frozen=True)
class PostStep:
    """A row of `POST`.

    run(stacks, merged, settings) -> other factors of every stack with the same reports, in the
    dtype of the settings. stacks: as they were read, before any step. merged: in float32, as the
    rounding noise of smaller types would be taken for directions. settings: the method's; their
    scale is in the merged factors already.
    """

    name: str
    summary: str
    run: Callable[[Sequence[Stack], Sequence[Factors], Settings], list[Factors]]
    why_not: Callable[[], str | None] = usable


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """Positions of the same kind."""
    found: dict[Hashable, list[int]] = {}
    for k, kind in enumerate(kinds):
        found.setdefault(kind, []).append(k)
    return list(found.values())
