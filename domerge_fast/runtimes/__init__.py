"""Programs that load adapters, and what each demands of their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from ..adapters import Adapter
from ..errors import OptionError, Unmet
from ..formats.choose import of_adapters
from ..formats.format import Format
from ..formats.peft.write import PEFT
from ..formats.target import Target
from ..recipe import Recipe
from ..registry import Registry
from .demands import DEMANDS, misses
from .facts import Facts, of_target
from .fit import fitted
from .rows import ROWS
from .runtime import Runtime

__all__ = ["RUNTIMES", "format_of", "notes", "settled", "told", "written_for"]

RUNTIMES = Registry("runtime", Runtime, ROWS)


def settled(asked: Recipe) -> tuple[Recipe, Runtime | None]:
    """The recipe with what the runtime that it names takes, and that runtime. OptionError for one
    that is unknown, and for a form that is no adapter."""
    if asked.runtime is None:
        return asked, None
    runtime = RUNTIMES.choose("runtime", asked.runtime)
    if asked.form != PEFT.form:
        problem = f"{runtime.name!r} loads adapters, {asked.form!r} is none"
        raise OptionError("runtime", problem, "leave form or runtime out")
    if asked.energy is not None and not runtime.ragged:
        asked = dataclasses.replace(asked, ragged=False)  # energy had implied it
    return asked, runtime


def format_of(
    asked: Recipe, adapters: Sequence[Adapter], runtime: Runtime | None
) -> tuple[Format, tuple[str, ...]]:
    """`of_adapters`; where a runtime does not take what is nobody's wish, the first that it
    takes."""
    written = of_adapters(asked, adapters)
    if runtime and asked.format is None and written[0].name not in runtime.formats:
        return of_adapters(dataclasses.replace(asked, format=runtime.formats[0]), adapters)
    return written


def written_for(
    runtime: Runtime | None, row: Format, target: Target
) -> tuple[Target, tuple[str, ...]]:
    """What is written where a runtime is asked for, and what is to be said of it. Unmet, with all
    that it demands and the target does not have."""
    if runtime is None:
        return target, ()
    target, said = fitted(runtime, row, target)
    if found := misses(runtime, of_target(row.name, target)):
        raise Unmet(runtime.name, [(f"{x.what}: {x.why}", x.remedy) for x in found])
    return target, said


def told(runtime: Runtime, facts: Facts) -> tuple[str, ...]:
    """What whoever starts a runtime has to know of files that it takes."""
    found = []
    if allowed := [rank for rank in runtime.ranks if rank >= facts.ranks[1]]:
        flag = f"{runtime.title.split()[0]}'s {runtime.flag} {allowed[0]}"
        found.append(f"written with rank {facts.ranks[1]}: serve it with {flag}")
    return tuple(found)


def notes(
    runtime: str | None, row: Format, target: Target, ranks: Collection[int]
) -> tuple[str, ...]:
    """What is to be said of a merge in a format, of modules of these ranks: of the runtime that it
    is made for; where there is none, of all that take the format, what they do not take."""
    if row.form != PEFT.form:
        return ()
    facts = of_target(row.name, target, ranks)
    if runtime:
        return told(RUNTIMES[runtime], facts)
    rows = [x for x in RUNTIMES.values() if x.told and row.name in x.formats]
    return (*(note for x in rows for note in told(x, facts)), *_of_all(rows, facts))


def _of_all(rows: Collection[Runtime], facts: Facts) -> list[str]:
    """What several do not take, a sentence each."""
    found: dict[tuple[str, str], list[str]] = {}
    for demand in DEMANDS:
        for runtime in rows if demand.told else ():
            for miss in demand.misses(runtime, facts):
                found.setdefault((miss.what, miss.remedy), []).append(miss.why)
    return [f"{what}: {', '.join(why)}; {remedy}" for (what, remedy), why in found.items()]
