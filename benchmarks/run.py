"""Measures whole merges side by side with their rivals, then how the compute grows.

    python benchmarks/run.py --quick           # all of it, small
    python benchmarks/run.py --full --publish  # what README.md shows
    python benchmarks/run.py moe-30b-4         # one workload, or "scaling", or "orthogonalize"

Floor, backends and `svd` take turns in one process; rivals run in memory on one module of each
shape. Nothing is reported of a backend that disagrees with the float64 reference. README.md in
this folder says how each figure is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checks
import descent
import files
import least
import mergekit_cli
import publish
import rivals
import scaling
import suite
import tables
import torch

import domerge_fast as dm
from domerge_fast.adapters.plan import GROUP_BYTES
from domerge_fast.bench import bounds, machine, measure
from domerge_fast.bench.workloads import WORKLOADS, Workload
from domerge_fast.cli.examine import examine

HERE = Path(__file__).parent
ROUNDS = 5
KEPT = ("llama-tiny", "llama3-8b-8")
"""Workloads whose adapters are left in the data folder."""
ALL_RIVALS = tuple(name for name in rivals.RIVALS if name != "literal float64")


@dataclass(frozen=True)
class Setting:
    """How a workload is measured.

    budget: seconds for each rival. modules: how many, the first ones; None: all. others: whether
    other backends and `svd` run too. rivals: those that finish at all. mergekit: whether it is
    run, which takes a Llama with all projections.
    """

    workload: str
    budget: float
    modules: int | None = None
    others: bool = True
    rivals: Sequence[str] = ALL_RIVALS
    mergekit: bool = False

    def take(self) -> Workload:
        """The part of the workload, under a name of its own if it is not the whole."""
        whole = WORKLOADS[self.workload]
        if self.modules is None:
            return whole
        part = whole.only({s.name for s in whole.modules[: self.modules]})
        return dataclasses.replace(part, name=f"{whole.name}-{self.modules}-modules")


QUICK = (
    Setting("llama-tiny", math.inf, mergekit=True),
    Setting("llama3-8b-8", 4.0, modules=14),
)
# A thousand adapters: hours of T^2 products for the literal method, minutes for PEFT to add them.
FEW_RIVALS = tuple(name for name in ALL_RIVALS if name not in (rivals.LITERAL, rivals.PEFT_CAT))
FULL = (
    Setting("llama3-8b-8", 60.0, mergekit=True),
    Setting("llama3-8b-64", 8.0),
    Setting("llama3-70b-8", 8.0),
    Setting("moe-30b-4", 8.0),
    Setting("sdxl-mixed", 8.0),
    Setting("library-1000", 8.0, others=False, rivals=FEW_RIVALS),
)
SETTINGS = {setting.workload: setting for setting in (*QUICK, *FULL)}
GROWTH = {"scaling": scaling.run, "orthogonalize": descent.run, "methods": suite.run}
QUICK_GROWTH = ("scaling", "orthogonalize")


@dataclass(frozen=True)
class Place:
    """Where adapters are made, merges are written and things run."""

    data: Path
    output: Path
    device: torch.device


def compare(setting: Setting, rounds: int, place: Place, mergekit: Path | None) -> dict[str, Any]:
    """Everything of one workload. mergekit: the folder of its commands, None to leave it out."""
    workload = setting.take()
    _check_room(workload, place)
    made = not (place.data / workload.name).exists()
    try:
        paths = workload.write(place.data)
        result = _measure(setting, workload, paths, rounds, place)
        if setting.mergekit and mergekit is not None:
            result["mergekit"] = mergekit_cli.run(workload, mergekit, place.data)
    finally:
        if made and workload.name not in KEPT:
            shutil.rmtree(place.data / workload.name)
    return result


def _measure(
    setting: Setting, workload: Workload, paths: list[Path], rounds: int, place: Place
) -> dict[str, Any]:
    adapters = [dm.load(path) for path in paths]
    device = place.device
    errors = checks.check(adapters, device)
    first = files.Watched(paths, measure.usable(device)[0], device)
    calls = files.calls(paths, first, setting.others)
    result = {
        "workload": setting.workload,
        "modules": len(workload.modules),
        "modules_in_all": len(WORKLOADS[setting.workload].modules),
        "adapters": len(workload.members),
        "rank": workload.rank,
        "factor_bytes": workload.factor_bytes,
        "errors": errors,
        "machine": machine.describe(device) | _instruction_set(),
        "group_bytes": GROUP_BYTES,
        "output": str(place.output),
    }
    with tempfile.TemporaryDirectory(dir=place.output) as folder:
        scratch = Path(folder)
        methods = ("do", files.SVD) if setting.others else ("do",)
        result["seconds"] = files.take_turns(calls, rounds, scratch)
        if max(result["seconds"][first.backend]) > files.PATIENCE:
            result["peak_bytes"] = first.peak_bytes
        else:
            result["peak_bytes"] = files.peak_memory(paths, methods, scratch, device)
    result["stages"] = first.stages
    result["core_seconds"] = first.core_seconds
    assert first.report is not None
    result["least"] = least.least(workload, first.report, bounds.measure(device))
    if setting.rivals:
        found = rivals.run(adapters, workload.rank, device, setting.budget, setting.rivals)
        result["extrapolated"] = {name: asdict(e) for name, e in found.items()}
    return result


def _check_room(workload: Workload, place: Place) -> None:
    """Exit if the adapters, or the merges with the copy floor's tensors, would not fit."""
    place.data.mkdir(parents=True, exist_ok=True)
    needs = 3 * workload.factor_bytes
    for what, free in (
        (f"disk under {place.data}", shutil.disk_usage(place.data).free),
        (f"room under {place.output}", shutil.disk_usage(place.output).free),
        ("memory", machine.free_bytes(torch.device("cpu"))),
    ):
        if free < needs:
            sys.exit(f"{workload.name} needs {needs >> 20} MiB, {what} has {free >> 20} MiB free")


def _instruction_set() -> dict[str, str]:
    found = examine()
    return {k: found[k] for k in ("instruction set",) if k in found}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*SETTINGS, *GROWTH]
    parser.add_argument("what", nargs="*", metavar="what", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="all of it, small")
    parser.add_argument("--full", action="store_true", help="all of it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--budget", type=float, help="seconds for each rival, in place of the usual"
    )
    parser.add_argument("--no-rivals", action="store_true", help="only the floor and the backends")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument(
        "--mergekit",
        type=Path,
        default=Path(sys.executable).parent,
        help="the folder of mergekit's commands",
    )
    parser.add_argument("--publish", action="store_true", help="keep results, rewrite the tables")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where adapters are made")
    shared = Path("/dev/shm")
    home = shared if shared.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--output", type=Path, default=home, help="where the merges are written")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--note", help="a sentence to keep with the figures")
    parser.add_argument("--json", type=Path, help="where to write the figures of one workload")
    args = parser.parse_args(words)
    if args.quick and args.publish:
        parser.error("--publish keeps results of whole workloads: give --full, or their names")
    settings, growth = _chosen(args.what or ["llama3-8b-8"], parser)
    if args.quick or args.full:
        settings, growth = (QUICK, QUICK_GROWTH) if args.quick else (FULL, tuple(GROWTH))
    if args.json and len(settings) + len(growth) != 1:
        parser.error("--json takes the figures of one")
    mergekit = None if args.no_mergekit or args.no_rivals else args.mergekit.absolute()
    if mergekit and any(s.mergekit for s in settings) and mergekit_cli.missing(mergekit):
        sys.exit(mergekit_cli.missing(mergekit))
    place = Place(args.data.absolute(), args.output.absolute(), args.device)

    def keep(name: str, result: dict[str, Any]) -> None:
        result |= {"note": args.note} if args.note else {}
        print(tables.one(name, result), flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        if args.publish:
            publish.keep(name, result)

    for name in growth:
        print(f"\n{name} …", flush=True)
        result = GROWTH[name](args.rounds)
        keep(name, result | {"machine": result["machine"] | _instruction_set()})
    for setting in settings:
        if args.no_rivals:
            setting = dataclasses.replace(setting, rivals=(), mergekit=False)
        if args.budget is not None:
            setting = dataclasses.replace(setting, budget=args.budget)
        print(f"\n{setting.workload} …", flush=True)
        keep(setting.workload, compare(setting, args.rounds, place, mergekit))
    if args.publish:
        publish.main()


def _chosen(
    names: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[tuple[Setting, ...], tuple[str, ...]]:
    for name in names:
        if name not in SETTINGS and name not in GROWTH:
            parser.error(f"{name!r} is none of {', '.join([*SETTINGS, *GROWTH])}")
    settings = tuple(SETTINGS[name] for name in names if name in SETTINGS)
    return settings, tuple(name for name in names if name in GROWTH)


if __name__ == "__main__":
    main()
