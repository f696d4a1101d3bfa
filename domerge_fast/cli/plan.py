"""domerge-fast plan: what a merge by `do` would take on some workers, from headers alone."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator

from ..errors import OptionError
from . import shared, streams

if typing.TYPE_CHECKING:
    from ..costs import Costs

__all__ = ["COMMAND"]

RATES = ("flops", "read", "write")


def fill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder or file")
    parser.add_argument("--base-model", help="the base model, where the configs disagree")
    parser.add_argument("--workers", type=int, default=1, help="how many share the modules")
    parser.add_argument("--flops", type=float, help="flops a second of one worker")
    parser.add_argument("--read", type=float, help="bytes a second that all workers together read")
    parser.add_argument("--write", type=float, help="bytes a second that they together write")
    parser.add_argument("--steps", type=int, default=3, help="of a descent; default: 3")
    help = "the updates are added to the weights, which are read and written"
    parser.add_argument("--into-base", action="store_true", help=help)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import costs
    from ..adapters.plan import Plan
    from ..reading import read

    workers = _workers(args)
    adapters, _ = read(args.adapters, args.base_model)
    modules = costs.shapes(Plan.make(adapters, [1.0] * len(adapters)))
    if not modules:
        raise OptionError("adapters", "share nothing to merge", "give adapters with modules")
    found = costs.costs(
        modules, costs.Workers(*workers) if workers else None, args.steps, args.into_base
    )
    plain = {"adapters": len(adapters), "workers": args.workers, **dataclasses.asdict(found)}
    shared.show(args, plain, lambda: _lines(len(adapters), args.workers, found))
    return 0


def _workers(args: argparse.Namespace) -> tuple[int, float, float, float] | None:
    """Their number and rates, if all are given."""
    for name in ("workers", "steps"):
        if getattr(args, name) < 1:
            raise OptionError(name, f"{getattr(args, name)} is below 1", "give 1 or more")
    rates = [getattr(args, name) for name in RATES]
    for name, rate in zip(RATES, rates):
        if rate is not None and not 0 < rate < float("inf"):
            raise OptionError(name, f"{rate:g} is no rate", "give a number above 0, as 4e10")
    missing = [name for name, rate in zip(RATES, rates) if rate is None]
    if missing and len(missing) < len(RATES):
        flags = ", ".join(f"--{name}" for name in missing)
        raise OptionError(missing[0], "is missing beside the other rates", f"give {flags} too")
    return None if missing else (args.workers, *rates)


def _lines(adapters: int, workers: int, found: Costs) -> Iterator[str]:
    rows = [
        ("adapters", str(adapters)),
        ("modules", f"{found.modules}, in {found.units} units of at most {_size(found.largest)}"),
        ("to read", f"{_size(found.read)}{', in batches by one worker' if found.streamed else ''}"),
        ("to write", _size(found.written)),
        ("to compute", f"{found.flops / 1e12:.3g} TFLOP"),
        ("memory", f"{_size(found.memory)} a worker, beside Python and torch"),
    ]
    if found.seconds is None:
        rows.append(("seconds", "need --flops, --read and --write"))
    else:
        rows += [
            ("computing", f"{found.compute:.3g} s on {1 if found.streamed else workers} workers"),
            ("reading and writing", f"{found.transfer:.3g} s"),
            ("in all", f"about {found.seconds:.3g} s, the most costly units first"),
        ]
    yield from streams.table(rows)


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


COMMAND = shared.Command("plan", "tell what a merge takes on many workers", fill, run)
