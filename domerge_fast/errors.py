"""What a user can get wrong, told in one line: where, what is wrong, and what to do about it.

The CLI prints ``str(error)`` and exits with 2; the API raises it.
"""

from __future__ import annotations


def _one_line(where: str, problem: str, remedy: str) -> str:
    return " ".join(f"{where}: {problem}; {remedy}".split())


class DomergeError(ValueError):
    """Bad input: ``str(error)`` is one clear line."""


class AdapterError(DomergeError):
    """An adapter, or one of its modules, cannot be merged exactly."""

    def __init__(self, adapter: str, module: str | None, problem: str, remedy: str):
        super().__init__(adapter, module, problem, remedy)

    def __str__(self) -> str:
        adapter, module, problem, remedy = self.args
        where = f"adapter {adapter!r}" + (f", module {module!r}" if module else "")
        return _one_line(where, problem, remedy)


class OptionError(DomergeError):
    """An option has a name or a value that is not understood."""

    def __init__(self, option: str, problem: str, remedy: str):
        super().__init__(option, problem, remedy)

    def __str__(self) -> str:
        option, problem, remedy = self.args
        return _one_line(f"option {option!r}", problem, remedy)


class OutputError(DomergeError):
    """The output cannot be written; nothing was."""

    def __init__(self, path: str, problem: str, remedy: str):
        super().__init__(path, problem, remedy)

    def __str__(self) -> str:
        path, problem, remedy = self.args
        return _one_line(f"output {path!r}", problem, remedy)
