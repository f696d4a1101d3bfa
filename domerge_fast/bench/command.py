"""`domerge-fast bench`: checks what was asked for, before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .. import options
from ..adapters.plan import Plan
from ..backends import registry
from ..errors import OptionError
from ..planning import choose_device
from ..reading import read
from ..storage import side_file
from . import measure, plot
from .measure import Result, Say
from .workloads import WORKLOADS

__all__ = ["bench"]

USUAL = "llama3-8b-8"


def bench(
    adapters: Sequence[str] = (),
    *,
    workload: str | None = None,
    modules: int | None = None,
    backends: Sequence[str] = (),
    device: str = "auto",
    repeat: int = 5,
    to_json: str | None = None,
    to_plot: str | None = None,
    profile: str | None = None,
    say: Say = lambda what: None,
) -> Result:
    """Measure on PEFT folders, or on a workload made in memory (default: USUAL).

    modules: how many at most, the first ones; in any case no more than fit in memory. backends:
    those to run; empty: all that can, but for the reference. repeat: samples of every figure.
    Raises DomergeError for what is not understood or cannot be written.
    """
    if adapters and workload:
        raise OptionError("workload", "adapters are given too", "give one or the other")
    if modules is not None:
        modules = options.check("modules", modules, int, low=1)
    repeat = options.check("repeat", repeat, int, low=5)
    for path in (to_json, to_plot, profile):
        if path is not None:
            side_file.check(path)
    if to_plot is not None:
        plot.figure()
    loaded = read(adapters, None)[0] if adapters else []
    where = choose_device(device, loaded)
    chosen = [registry.choose(name, where.type) for name in backends] or measure.usable(where)
    if loaded:
        source = "adapters"
        plan = Plan.make(loaded, [1.0] * len(loaded))
        sizes = {name: plan.factor_bytes(name) for name in plan.names}
        names = measure.modules_that_fit(sizes, modules, where)
        in_all = len(sizes)
    else:
        source = options.choose("workload", workload or USUAL, WORKLOADS)
        made = WORKLOADS[source]
        names = measure.modules_that_fit(made.bytes_of(), modules, where)
        in_all = len(made.modules)
        say(f"making {source}")
        loaded = made.only(set(names)).adapters(where)
    result = measure.run(
        source,
        loaded,
        names,
        in_all,
        list(dict.fromkeys(chosen)),
        where,
        repeat,
        Path(profile) if profile is not None else None,
        say,
    )
    if to_json is not None:
        with side_file.told(to_json):
            Path(to_json).write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    if to_plot is not None:
        with side_file.told(to_plot):
            plot.draw(result, Path(to_plot))
    return result
