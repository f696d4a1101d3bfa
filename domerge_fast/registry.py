"""What can be chosen by name, ours and what other installed packages add: one class for methods,
formats, runtimes, backends, steps and commands.

A package adds a row by an entry point of the group `domerge_fast`, called by kind and name:

    [project.entry-points.domerge_fast]
    "method.strong" = "their_package.strong:METHOD"

It is looked for only where a name is none of ours, where all are listed, or where a file may be of
its format, and what is wrong with it never stands in the way of a merge that does without it. Such
a row is left out, and `why_not` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from . import options
from .errors import OptionError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Registry", "Row", "are_added", "refused", "usable"]

GROUP = "domerge_fast"
KINDS = ("method", "format", "runtime", "backend", "pre", "post", "command")


class Row(Protocol):
    """What every row has: its name, a line on what it is, and whether it can be used here."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def why_not(self) -> Callable[[], str | None]:
        """None, or why it cannot be used here and what to do about it: "problem; remedy"."""


R = TypeVar("R", bound=Row)
_TABLES: dict[str, Registry] = {}


def usable() -> None:
    """The `why_not` of what can be used everywhere."""


class Registry(Mapping[str, R], Generic[R]):
    """Rows of one kind by name: ours in their order, then those of other packages by theirs. own:
    ours alone."""

    def __init__(self, kind: str, row: type[R], own: Iterable[R]) -> None:
        self.kind, self._row = kind, row
        self.own = {r.name: r for r in own}
        _TABLES.setdefault(kind, self)

    def __getitem__(self, name: str) -> R:
        return self.own[name] if name in self.own else self._added[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self._added

    def __len__(self) -> int:
        return len(self.own) + len(self._added)

    def choose(
        self,
        option: str,
        name: Any,
        fits: Callable[[R], bool] = lambda row: True,
        besides: Iterable[str] = (),
    ) -> R:
        """The row called `name`, of those that fit. besides: other words that the option takes.

        OptionError for a name that is not known, with what was meant, or that cannot be used here.
        """
        known = isinstance(name, str)
        if known and name in self and fits(self[name]):
            reason = self[name].why_not()
        elif known and name not in self and name in self.refused:
            reason = self.refused[name]
        else:
            options.choose(option, name, [*besides, *(n for n, row in self.items() if fits(row))])
            raise AssertionError(f"{name!r} is no row")
        if reason:
            raise OptionError(option, f"{name!r} cannot be used here", reason)
        return self[name]

    def why_not(self, name: str) -> str | None:
        """Why a row cannot be used here, or None; KeyError where there is none of this name."""
        return self[name].why_not() if name in self else self.refused[name]

    @property
    def refused(self) -> Mapping[str, str]:
        """What other packages add that is no row here, by name, with the reason."""
        return self._outside[1]

    @property
    def _added(self) -> Mapping[str, R]:
        return self._outside[0]

    @functools.cached_property
    def _outside(self) -> tuple[dict[str, R], dict[str, str]]:
        added, refused = {}, {}
        for name, points in sorted(_entry_points().get(self.kind, {}).items()):
            row = self._load(name, points)
            if isinstance(row, str):
                refused[name] = row
            else:
                added[name] = row
        return added, refused

    def _load(self, name: str, points: list[EntryPoint]) -> R | str:
        """The row that an entry point leads to, or why there is none."""
        owners = " and ".join(sorted(_owner(point) for point in points))
        where = f"the {self.kind} {name!r} of package {owners}"
        if name in self.own:
            return f"{where} has the name of one of ours; it has to take another"
        if len(points) > 1:
            return f"{where}: two have one name; uninstall one of them"
        try:
            row = points[0].load()
        except Exception as error:  # whatever the import of another package's module raises
            what = f"{type(error).__name__}: {error}"
            return f"{where} does not import ({what}); mend or uninstall it"
        if not isinstance(row, self._row):
            kind = f"a {type(row).__name__}, no {self._row.__name__}"
            return f"{where} is {kind}; mend or uninstall it"
        if row.name != name:
            return f"{where} is called {row.name!r} in its row; one name for both is needed"
        return row


def refused() -> dict[str, str]:
    """What other packages add that cannot be used, by kind and name, with the reason: of all tables
    that are loaded, and of kinds that there are not."""
    tables = (table.refused.items() for table in _TABLES.values())
    return {f"{kind}.{name}": why for kind, t in zip(_TABLES, tables) for name, why in t} | {
        point.name: f"package {_owner(point)} adds it; kinds are: {', '.join(KINDS)}"
        for kind, names in _entry_points().items()
        for points in names.values()
        for point in points
        if kind not in KINDS
    }


def are_added(*kinds: str) -> bool:
    """Whether other packages add rows of these kinds; nothing of theirs is imported."""
    return any(kind in _entry_points() for kind in kinds)


def _owner(point: EntryPoint) -> str:
    return repr(point.dist.name if point.dist else "?")


@functools.cache
def _entry_points() -> dict[str, dict[str, list[EntryPoint]]]:
    """Those of installed packages, by kind and by name."""
    from importlib.metadata import entry_points  # takes longer to import than this package

    found: dict[str, dict[str, list[EntryPoint]]] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        found.setdefault(kind, {}).setdefault(name, []).append(point)
    return found
