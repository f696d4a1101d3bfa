"""What there is by name: methods, formats, runtimes and backends, those of other packages among
them."""

from __future__ import annotations

from dataclasses import dataclass

from .backends import registry
from .formats import FORMATS
from .methods import TABLE
from .methods.base import Method
from .runtimes import RUNTIMES
from .runtimes.demands import DEMANDS

__all__ = [
    "FormatInfo",
    "MethodInfo",
    "RuntimeInfo",
    "list_backends",
    "list_formats",
    "list_methods",
    "list_runtimes",
]


@dataclass(frozen=True)
class MethodInfo:
    """A merge method in a few words each: what it does, what it returns ("exact" factors of rank
    R, factors cut to a "rank", "dense" ΔW, "inner": what the method inside it returns), what it
    costs a module, what it needs besides adapters, where it is from, and why it cannot be used
    here, if it cannot."""

    summary: str
    returns: str
    cost: str
    needs: str
    source: str
    why_not: str | None


def list_methods() -> dict[str, MethodInfo]:
    """The merge methods by name."""
    return {name: _info(row) for name, row in TABLE.items()}


def _info(row: Method) -> MethodInfo:
    returns = "rank" if row.truncates else "dense" if row.dense else "exact"
    returns = "inner" if row.dense is None else returns
    return MethodInfo(row.summary, returns, row.cost, row.needs, row.source, row.why_not())


@dataclass(frozen=True)
class FormatInfo:
    """A format in a few words: what it is, the form of what is written so, whether adapters are
    read from it, whether merges are written in it, and why it cannot be used here, if it cannot."""

    summary: str
    form: str
    reads: bool
    writes: bool
    why_not: str | None


def list_formats() -> dict[str, FormatInfo]:
    """The formats of files by name."""
    return {
        name: FormatInfo(
            row.summary, row.form, row.read is not None, row.write is not None, row.why_not()
        )
        for name, row in FORMATS.items()
    }


@dataclass(frozen=True)
class RuntimeInfo:
    """A program that loads adapters: its name with the version, where its demands were read, what
    they are, by demand, and why it cannot be asked for here, if it cannot."""

    title: str
    source: str
    demands: dict[str, str]
    why_not: str | None


def list_runtimes() -> dict[str, RuntimeInfo]:
    """The programs that an output can be made for, or checked against, by name."""
    return {
        name: RuntimeInfo(x.title, x.source, {d.name: d.words(x) for d in DEMANDS}, x.why_not())
        for name, x in RUNTIMES.items()
    }


def list_backends() -> dict[str, registry.BackendStatus]:
    """The backends by name: `available`, `devices`, and `why_not` where one cannot run here."""
    return registry.backends()
