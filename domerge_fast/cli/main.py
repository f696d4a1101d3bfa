"""domerge-fast: arguments in, the API called, one line out when something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import traceback
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

from .. import aliases, options
from .._version import __version__
from ..errors import DomergeError, Elsewhere, OutputWarning
from ..storage import folder
from . import shared, streams
from .commands import COMMANDS

__all__ = ["main"]

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
RED, YELLOW = "31", "33"
NEGATIVE = r"-(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?$|-(inf|infinity|nan)$"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or another after one line on stderr.

    2: refused, and nothing was written. 1: it failed otherwise. 130: interrupted. An output that is
    in its place is 0, with a line on stderr where something beside it is wrong.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    folder.last_written = None
    try:
        with streams.usable(), _polite_signals(), warnings.catch_warnings():
            # Torch says so where numpy is not installed; nothing here needs it.
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")
            warnings.simplefilter("always", OutputWarning)
            warnings.showwarning = _in_one_line(warnings.showwarning)
            return _run(arguments)
    except KeyboardInterrupt:  # just before the command, or just after it
        with streams.usable():
            return _interrupted()


def _run(arguments: list[str]) -> int:
    verbose = bool({"-v", "--verbose"} & set(arguments))
    try:
        return _ran(arguments)
    except streams.Unprintable as error:
        reason = error.__cause__
        if not isinstance(reason, BrokenPipeError):  # whoever reads has not merely seen enough
            what = getattr(reason, "strerror", None) or reason
            _fail(f"{_but()}standard output cannot be written ({what})", verbose)
        return FAILED
    except Elsewhere:
        return USAGE_ERROR
    except DomergeError as error:
        _fail(f"{_but()}{error}", verbose)
        return FAILED if folder.last_written else USAGE_ERROR
    except KeyboardInterrupt:
        return _interrupted()
    except MemoryError:
        _fail(
            f"{_but()}out of memory; merge fewer adapters at once, or where there is more", verbose
        )
        return FAILED
    except Exception as error:  # the outermost net: a fault of ours or of the machine's
        what = f"{type(error).__name__}: {error}"
        _fail(f"{_but()}unexpected {' '.join(what.split())[:200]}; -v shows the traceback", verbose)
        return FAILED


def _ran(arguments: list[str]) -> int:
    try:
        _check_current_folder()  # torch may be loaded
        args = _parse(arguments)
        return args.run(args)
    except SystemExit as leaving:  # argparse has shown what it was asked for
        return int(leaving.code or 0)


def _check_current_folder() -> None:
    """Intel's MKL ends the process in one that is gone."""
    try:
        os.getcwd()
    except OSError as error:
        problem = f"the current folder cannot be used ({error.strerror})"
        raise DomergeError(f"{problem}; change to another (cd)") from error


def _interrupted() -> int:
    streams.tell(f"domerge-fast: interrupted; {_written()}")
    return INTERRUPTED


def _written() -> str:
    path = folder.last_written
    return f"{str(path)!r} was written" if path else "nothing was written"


def _but() -> str:
    """What an error that comes after the output has to begin with."""
    return f"{_written()}, but " if folder.last_written else ""


def _fail(message: str, verbose: bool) -> None:
    if verbose:
        streams.tell(traceback.format_exc().rstrip())
    streams.tell(f"domerge-fast: {streams.coloured('error:', RED, sys.stderr)} {message}")


@contextlib.contextmanager
def _polite_signals() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does, where nobody has asked for anything else."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [n for n in numbers if signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _in_one_line(usual: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: ours as errors are, others as usual."""

    def show(message: Warning | str, category: type[Warning], *where: typing.Any) -> None:
        if issubclass(category, OutputWarning):
            said = streams.coloured("warning:", YELLOW, sys.stderr)
            streams.tell(f"domerge-fast: {said} {message}")
        else:
            usual(message, category, *where)

    return show


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are told in one line, as every other error is."""

    def __init__(self, *args: typing.Any, **options: typing.Any) -> None:
        super().__init__(*args, **options)
        # Those of Python are in decimals only, and what is none of them is taken for a flag.
        self._negative_number_matcher = re.compile(NEGATIVE, re.IGNORECASE)

    def _print_message(self, message: str, file: object = None) -> None:
        """Help and the version; Python's own does not tell that they could not be printed."""
        streams.show([message.rstrip()])

    def error(self, message: str) -> typing.NoReturn:
        raise DomergeError(f"{message}; see '{self.prog} --help'")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    called = [word for word in arguments if not word.startswith("-")][:1]
    for name in called:
        COMMANDS.choose("command", name)
    args, unknown = _parser(called).parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = re.findall(r"--[a-z][a-z-]*", args.parser.format_help())
        meanings = {w: (name and f"--{name}", text) for w, (name, text) in aliases.OPTIONS.items()}
        hint = options.meant(flag, flags, meanings)
        args.parser.error(f"{flag!r} is not understood{hint and ', ' + hint}")
    return args


def _full_parser() -> argparse.ArgumentParser:
    """The parser with all options of all commands."""
    return _parser(COMMANDS)


def _parser(filled: Collection[str]) -> _Parser:
    """The parser, with the options of these commands: building all would take its time."""
    parser = _Parser(
        prog="domerge-fast",
        description="Merge LoRA adapters by DO-Merging and related methods, exactly and fast.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    shared.add_verbose(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ours = filled and COMMANDS.own.keys() >= set(filled)
    for name, row in (COMMANDS.own if ours else COMMANDS).items():
        command = commands.add_parser(name, help=row.summary, description=row.summary)
        shared.add_verbose(command)
        command.set_defaults(run=row.run, parser=command, full_parser=_full_parser)
        if name in filled:
            row.fill(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
