"""domerge-fast: arguments in, the API called, one line out when something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence

from .. import aliases, options
from .._version import __version__
from ..errors import DomergeError, OutputWarning, printable
from ..storage import folder
from . import streams

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
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
    except DomergeError as error:
        _fail(str(error), verbose)
        return USAGE_ERROR
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
        _check_current_folder()  # the parser loads torch
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
    streams.tell(f"domerge-fast: error: {message}")


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
            streams.tell(f"domerge-fast: warning: {message}")
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
    args, unknown = _parser(arguments).parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = re.findall(r"--[a-z][a-z-]*", args.parser.format_help())
        meanings = {w: (name and f"--{name}", text) for w, (name, text) in aliases.OPTIONS.items()}
        hint = options.meant(flag, flags, meanings)
        args.parser.error(f"{flag!r} is not understood{hint and ', ' + hint}")
    return args


def _parser(arguments: Sequence[str]) -> _Parser:
    """The parser; a command's own flags are built only when it is called, for the start-up time."""
    parser = _Parser(
        prog="domerge-fast",
        description="Merge LoRA adapters by DO-Merging and related methods, exactly and fast.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_verbose(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, (help, fill, run) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        _add_verbose(command)
        command.set_defaults(run=run, parser=command)
        if name == called:
            fill(command)
    return parser


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    """Before a command, after it and after its action: `_run` sees it wherever it is."""
    help, nothing = "show tracebacks", argparse.SUPPRESS
    parser.add_argument("-v", "--verbose", action="store_true", default=nothing, help=help)


def _add_sources(parser: argparse.ArgumentParser, quiet: str) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a PEFT adapter folder")
    parser.add_argument("--base-model", help="the base model, where the configs disagree")
    parser.add_argument("--backend", default="auto", help="auto, cpu, torch or reference")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument("-q", "--quiet", action="store_true", help=quiet)


def _add_replacing(parser: argparse.ArgumentParser) -> None:
    help = "replace an existing output of domerge-fast"
    parser.add_argument("--overwrite", action="store_true", help=help)
    help = "replace also what others wrote, if all its files have names of the same form"
    parser.add_argument("--force", action="store_true", help=help)


def _fill_merge(parser: argparse.ArgumentParser) -> None:
    from ..methods import TABLE
    from ..methods.steps import POST, PRE

    _add_sources(parser, "no progress, no summary")
    add = parser.add_argument
    add("-o", "--output", required=True, metavar="OUT", help="folder to write")
    _add_replacing(parser)
    add("--method", default="auto", help=f"{', '.join(TABLE)} (default: auto)")
    add("--weights", nargs="+", type=float, metavar="W", help="one an adapter (default: 1 each)")
    found = "factor on the merged update, or auto: found from the adapters (default: auto, but 1 "
    found += "for methods that are a sum or set their norm themselves)"
    add("--scale", type=_scale, default=None, metavar="FACTOR|auto", help=found)
    add("--rank", type=int, help="truncate every module to this rank (default: the method's own)")
    add("--energy", type=float, help="truncate to the least rank that keeps this share")
    add("--ragged", action="store_true", help="write own ranks, not one (--energy implies it)")
    pre, post = ", ".join(PRE), ", ".join(POST)
    add("--pre", nargs="+", default=(), metavar="STEP", help=f"before the method, of: {pre}")
    add("--post", nargs="+", default=(), metavar="STEP", help=f"after the method, of: {post}")
    add("--form", default="adapter", help="adapter, deltas (ΔW), or model (default: adapter)")
    add("--base", metavar="FOLDER", help="the base model, e.g. for the form model")
    add("--whole", default="auto", help="of tensors saved whole: auto, drop or from:NAME")
    add("--max-device-memory", metavar="SIZE", help="of the device, e.g. 4GiB")
    add("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    fields: dict[str, tuple[dataclasses.Field, type]] = {}
    owners: dict[str, dict[str, typing.Any]] = {}
    for method in TABLE.values():
        kinds = typing.get_type_hints(method.options)
        for field in dataclasses.fields(method.options):
            fields.setdefault(field.name, (field, kinds[field.name]))
            owners.setdefault(field.name, {})[method.name] = field.default
    for methods in dict.fromkeys(tuple(o) for o in owners.values()):
        group = parser.add_argument_group(f"options of {', '.join(methods)}")
        for name, defaults in owners.items():
            if tuple(defaults) == methods:
                _add_option(group, *fields[name], defaults)


def _add_option(
    group: argparse._ArgumentGroup,
    field: dataclasses.Field,
    kind: type,
    defaults: dict[str, typing.Any],
) -> None:
    flag = f"--{field.name.replace('_', '-')}"
    alike = len(set(defaults.values())) == 1
    default = field.default if alike else ", ".join(f"{v} {k}" for k, v in defaults.items())
    help = f"{field.metadata['help']} (default: {default})"
    if kind is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help)
        return
    words = field.metadata["choices"]
    metavar = "|".join(words) if words else kind.__name__.upper()
    group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help)


def _scale(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not auto") from None


_SOURCES = ("adapters", "base_model", "backend", "device")
_OWN = ("run", "parser", "verbose", "quiet", "output", "json")


def _merge(args: argparse.Namespace) -> int:
    from .. import api

    given = {k: v for k, v in vars(args).items() if k not in _OWN}
    merged = api.merge(given.pop("adapters"), output=args.output, progress=_bar(args), **given)
    if not args.quiet:
        streams.show(
            [*streams.table(merged.report.summary()), f"written to {printable(args.output)}"]
        )
    return 0


def _bar(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def _fill_inspect(parser: argparse.ArgumentParser) -> None:
    _add_sources(parser, "no progress")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _inspect(args: argparse.Namespace) -> int:
    from .. import api

    given = {name: getattr(args, name) for name in _SOURCES}
    found = api.inspect(given.pop("adapters"), progress=_bar(args), **given)
    if args.json:
        streams.show([json.dumps(found.to_dict(), indent=2)])
        return 0
    numbers = [str(i) for i in range(1, len(found.adapters) + 1)]
    head = ("", "adapter", "norm of ΔW", "least of a module", "median", "largest")
    rows = [
        (k, name, *(f"{v:.4g}" for v in (norm, *spread)))
        for k, name, norm, spread in zip(
            numbers, map(printable, found.adapters), found.norms, found.spread
        )
    ]
    lines = streams.table([head, *rows], names=1)
    for title, table in (
        ("overlap of row spaces (A): 0 orthogonal, 1 the same", found.rows),
        ("overlap of column spaces (B): 0 orthogonal, 1 the same", found.columns),
        ("cosine between the updates", found.cosine),
    ):
        cells = [(k, *(f"{v:.3f}" for v in row)) for k, row in zip(numbers, table)]
        lines += ["", title, *streams.matrix([("", *numbers), *cells])]
    if found.notes:
        lines += ["", *_notes(found.notes)]
    streams.show(lines)
    return 0


def _notes(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in streams.wrap(f"note: {note}")]


def _fill_sequential(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    start = actions.add_parser("start", help="start a merge of no adapters yet")
    start.add_argument("folder", metavar="STATE", help="folder to write")
    start.add_argument("--alpha", type=float, default=0.5, help="as for the method opcm")
    start.add_argument("--rank", type=int, help="truncate the sum in every add (default: exact)")
    start.add_argument("--base-model", help="the base model, where the configs disagree")
    start.add_argument("--whole", default="auto", help="tensors saved whole: auto, drop, from:NAME")
    _add_replacing(start)
    start.set_defaults(run=_start, parser=start)
    add = actions.add_parser("add", help="add adapters in this order, all or none")
    add.add_argument("folder", metavar="STATE", help="folder of the merge")
    add.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a PEFT adapter folder")
    add.add_argument("--weight", type=float, default=1.0, help="of each (default: 1)")
    add.set_defaults(run=_add_to, parser=add)
    save = actions.add_parser("save", help="write the merged adapter")
    save.add_argument("folder", metavar="STATE", help="folder of the merge")
    save.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write")
    _add_replacing(save)
    save.add_argument("--scale", type=float, default=1.0, help="factor on the merged update")
    save.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    save.set_defaults(run=_save, parser=save)
    for action in (start, add, save):
        _add_verbose(action)


def _start(args: argparse.Namespace) -> int:
    from ..sessions.sequential import Sequential

    given = {k: v for k, v in vars(args).items() if k not in _OWN}
    Sequential.start(given.pop("folder"), **given)
    return 0


def _add_to(args: argparse.Namespace) -> int:
    from ..sessions.sequential import Sequential

    weights = [args.weight] * len(args.adapters)
    steps = Sequential.open(args.folder).add_all(args.adapters, weights)
    streams.show(
        line
        for step in steps
        for line in (
            f"{step.adapter}: norm {step.norm:.4g}, energy kept {100 * step.energy_kept:.2f} %",
            *_notes(step.notes),
        )
    )
    return 0


def _save(args: argparse.Namespace) -> int:
    from ..sessions.sequential import Sequential

    given = {name: getattr(args, name) for name in ("scale", "dtype", "overwrite", "force")}
    merged = Sequential.open(args.folder).save(args.output, **given)
    streams.show([*streams.table(merged.report.summary()), f"written to {printable(args.output)}"])
    return 0


def _fill_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _methods(args: argparse.Namespace) -> int:
    from .. import api

    found = {name: dataclasses.asdict(row) for name, row in api.list_methods().items()}
    if args.json:
        streams.show([json.dumps(found, indent=2, ensure_ascii=False)])
        return 0
    rows = [("method", "returns", "what it does")]
    for name, row in found.items():
        needs = f"; needs {row['needs']}" if row["needs"] else ""
        rows.append(
            (name, row["returns"], f"{row['summary']} ({row['source']}); {row['cost']}{needs}")
        )
    streams.show(streams.table(rows))
    return 0


def _fill_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    found = examine()
    if args.json:
        streams.show([json.dumps(found, indent=2)])
    else:
        streams.show(streams.table(list(found.items())))
    return 0


def _fill_bench(parser: argparse.ArgumentParser) -> None:
    from ..bench.command import USUAL
    from ..bench.workloads import WORKLOADS

    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER", help="a PEFT adapter folder to measure with")
    names = ", ".join(WORKLOADS)
    add("--workload", metavar="NAME", help=f"adapters made in memory: {names} (default: {USUAL})")
    add("--modules", type=int, metavar="N", help="only the first N (default: all that fit)")
    again = "a backend to measure, may be given again (default: all but reference)"
    add("--backend", action="append", default=[], metavar="NAME", dest="backends", help=again)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--repeat", type=int, default=5, metavar="N", help="samples of a figure (default: 5)")
    add("--json", metavar="FILE", dest="to_json", help="write every figure")
    add("--plot", metavar="FILE", dest="to_plot", help="write a roofline and bars as PNG")
    add("--profile", metavar="FILE", help="write a Chrome trace of one merge")


def _bench(args: argparse.Namespace) -> int:
    from ..bench.command import bench

    tell = sys.stderr.isatty()
    given = {k: v for k, v in vars(args).items() if k not in _OWN}
    result = bench(**given, say=_say if tell else lambda what: None)
    if tell:
        _say("")
    lines = [line for text in result.summary() for line in streams.wrap(text)]
    if result.rows:
        lines += ["", *streams.table(result.table())]
    streams.show(lines)
    for backend, reason in result.refused.items():
        message = f"backend {backend!r} disagrees with the reference ({reason}): no figures for it"
        streams.tell(f"domerge-fast: error: {message}")
    return FAILED if result.refused else 0


def _say(what: str) -> None:
    """What is being done, in place of what was said before."""
    print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, Command] = {
    "merge": ("merge adapters into one", _fill_merge, _merge),
    "inspect": ("show how much adapters interfere", _fill_inspect, _inspect),
    "sequential": ("merge adapters one at a time, by opcm", _fill_sequential, _start),
    "methods": ("list the merge methods", _fill_methods, _methods),
    "bench": ("measure the ops beside what this machine could reach", _fill_bench, _bench),
    "doctor": ("show versions and backends, and why one is off", _fill_doctor, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
