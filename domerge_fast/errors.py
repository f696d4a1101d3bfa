"""What a user can get wrong, told in one line: where, what is wrong, and what to do about it.

The CLI prints ``str(error)`` and exits with 2; the API raises it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "DomergeError",
    "Elsewhere",
    "FlatCut",
    "Infeasible",
    "OptionError",
    "OutputError",
    "OutputWarning",
    "Unmet",
    "is_text",
    "printable",
    "some",
]

MOST = 340
"""Characters of a message."""


def printable(text: str) -> str:
    """The text with what cannot be printed or written escaped: control characters, halves of
    surrogate pairs (bytes of a path that are no UTF-8)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_text(text: object) -> bool:
    """Whether it is a text that a file in UTF-8 can hold."""
    if not isinstance(text, str):
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _one_line(where: str, problem: str, remedy: str) -> str:
    """The three parts, shortened in the middle of what is long: names first, then themselves."""
    parts = [printable(" ".join(part.split())) for part in (where, problem, remedy)]
    for longest in (80, 40, 24):
        if len(_joined(parts)) > MOST:
            parts = [_shortened(part, longest) for part in parts]
    if len(_joined(parts)) > MOST:
        parts = [_cut(part, most) for part, most in zip(parts, (80, 130, 86))]
    return _joined(parts)


def _joined(parts: list[str]) -> str:
    where, problem, remedy = parts
    return f"{where}: {problem}; {remedy}"


def _shortened(text: str, longest: int) -> str:
    """The text with its long words cut."""
    return re.sub(r"\S+", lambda word: _cut(word[0], longest), text)


def _cut(text: str, most: int) -> str:
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


class DomergeError(ValueError):
    """Bad input: ``str(error)`` is one clear line, of MOST characters at most."""

    def __str__(self) -> str:
        text = printable(" ".join(super().__str__().split()))
        for longest in (80, 40, 24):
            if len(text) > MOST:
                text = _shortened(text, longest)
        return _cut(text, MOST)


class AdapterError(DomergeError):
    """An adapter, or one of its modules, cannot be merged exactly."""

    def __init__(self, adapter: str, module: str | None, problem: str, remedy: str):
        super().__init__(adapter, module, problem, remedy)

    @property
    def module(self) -> str | None:
        return self.args[1]

    def __str__(self) -> str:
        adapter, module, problem, remedy = self.args
        where = f"adapter {adapter!r}" + (f", module {module!r}" if module else "")
        return _one_line(where, problem, remedy)


class _Named(Exception):
    """One line that begins with what was named: its kind and its name."""

    kind: str

    def __init__(self, name: str, problem: str, remedy: str):
        super().__init__(name, problem, remedy)

    def __str__(self) -> str:
        name, problem, remedy = self.args
        return _one_line(f"{self.kind} {name!r}", problem, remedy)


class OptionError(_Named, DomergeError):
    """An option has a name or a value that is not understood."""

    kind = "option"


class Unmet(DomergeError):
    """What is to be written is not what a runtime takes. ``str(error)`` is a line for each of the
    misses, which are (problem, remedy)."""

    def __init__(self, runtime: str, misses: Sequence[tuple[str, str]]):
        super().__init__(runtime, misses)

    @property
    def misses(self) -> Sequence[tuple[str, str]]:
        return self.args[1]

    def __str__(self) -> str:
        runtime, misses = self.args
        return "\n".join(_one_line(f"runtime {runtime!r}", *miss) for miss in misses)


class Infeasible(DomergeError):
    """A search has no candidate that was shown to be within its constraints. trials: all of it."""

    def __init__(self, problem: str, remedy: str, trials: Sequence[object]):
        super().__init__(problem, remedy, trials)

    @property
    def trials(self) -> Sequence[object]:
        return self.args[2]

    def __str__(self) -> str:
        problem, remedy, _ = self.args
        return _one_line("search", problem, remedy)


class OutputError(_Named, DomergeError):
    """The output cannot be written, and what was there is as it was."""

    kind = "output"


class Elsewhere(DomergeError):
    """Another process of the same job was refused something, and has said so: its line."""


class OutputWarning(_Named, UserWarning):
    """The output is as it should be, but something beside it is not."""

    kind = "output"


DEFINED = ("svd", "tsvm", "linear", "cat", "ctm")
"""Methods whose cut is defined unless the adapters' own singular values are equal."""


class FlatCut(DomergeError):
    """A cut keeps some of several equal singular values: the result would be one of many.

    at: which of the matrices given. rank: how many are kept. value: of the last one.
    """

    def __init__(self, at: int, rank: int, value: float, module: str = "", method: str = ""):
        super().__init__(at, rank, value, module, method)

    def of(self, module: str = "", method: str = "") -> FlatCut:
        """The same of a module that is merged by this method, where that was not said before."""
        at, rank, value, of_module, by_method = self.args
        return FlatCut(at, rank, value, of_module or module, by_method or method)

    @property
    def at(self) -> int:
        return self.args[0]

    def __str__(self) -> str:
        at, rank, value, module, method = self.args
        where = f"module {module!r}" if module else f"matrix {at}"
        problem = (
            f"a cut to rank {rank} falls between equal singular values ({value:.4g}), so that the "
            "order of the adapters would decide"
        )
        remedy = "say another rank, or take 'linear' without rank and energy"
        if method not in DEFINED:
            remedy = "leave rank and energy out, or use a method whose cut is defined (svd, tsvm)"
        return _one_line(where, problem, remedy)
