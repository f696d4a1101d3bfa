"""What domerge_fast replaces, run for real: the literal method, and PEFT's add_weighted_adapter.

    python benchmarks/rivals.py --device cuda --json rivals.json

Each runs in memory on one module of every shape, the smallest first, and is multiplied by the
number of modules. A shape that would not finish in the budget is scaled from the one before it,
by the cost of its largest term.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import domerge_fast as dm
from domerge_fast.backends import reference
from domerge_fast.bench import machine, timing
from domerge_fast.bench.workloads import WORKLOADS


@dataclass(frozen=True)
class Estimate:
    """Seconds for all modules: how many have a shape that was run, and how many a scaled one."""

    seconds: float
    measured: int
    scaled: int


def one_of_each_shape(adapters: Sequence[dm.Adapter]) -> list[tuple[str, int]]:
    """A module of every shape and set of ranks, and how many share them; the smallest first."""
    keys: dict[str, tuple] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            keys[name] = (*keys.get(name, (module.m, module.n)), module.rank)
    counts = Counter(keys.values())
    first = {key: name for name, key in reversed(keys.items())}
    return [(first[k], counts[k]) for k in sorted(counts, key=lambda k: k[0] + k[1])]


def owners(adapters: Sequence[dm.Adapter], module: str) -> list[dm.Adapter]:
    return [adapter for adapter in adapters if module in adapter.modules]


def literal(
    adapters: Sequence[dm.Adapter],
    module: str,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """ΔW [m, n] by the method as the paper states it, dense, with the same descent."""
    having = owners(adapters, module)
    pairs = [[x.to(device) for x in adapter.factors(module)] for adapter in having]
    scaling = [adapter.modules[module].scaling for adapter in having]
    omega = [1 / len(having)] * len(having)
    return reference.do_merging(
        [a for a, _ in pairs],
        [s * b.to(dtype) for s, (_, b) in zip(scaling, pairs)],
        omega,
        dtype=dtype,
    )


def peft(
    adapters: Sequence[dm.Adapter],
    module: str,
    combination: str,
    rank: int | None,
    device: torch.device,
) -> float:
    """Seconds of PEFT's add_weighted_adapter on one module, as a linear layer."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model: PeftModel | None = None
    having = owners(adapters, module)
    for i, adapter in enumerate(having):
        spec = adapter.modules[module]
        config = LoraConfig(
            r=spec.rank, lora_alpha=int(spec.scaling * spec.rank), target_modules=["0"]
        )
        if model is None:
            base = torch.nn.Sequential(torch.nn.Linear(spec.n, spec.m, bias=False))
            model = get_peft_model(base, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0]
        a, b = adapter.factors(module)
        layer.lora_A[str(i)].weight.data.copy_(a)
        layer.lora_B[str(i)].weight.data.copy_(b)
    model.to(device)
    names = [str(i) for i in range(len(having))]
    weights = [1 / len(names)] * len(names)
    return timing.seconds(
        lambda: model.add_weighted_adapter(
            names, weights, "merged", combination_type=combination, svd_rank=rank
        ),
        device,
    )


def estimate(
    adapters: Sequence[dm.Adapter],
    seconds: Callable[[str], float],
    cost: Callable[[int, int], float],
    budget: float,
) -> Estimate:
    """Seconds for all modules, from `seconds` of one of each shape.

    cost: what the largest term grows with, of m and n. budget: seconds to spend on all shapes;
    the first is always run.
    """
    total, measured, scaled, spent = 0.0, 0, 0, 0.0
    rate: float | None = None
    for name, count in one_of_each_shape(adapters):
        spec = owners(adapters, name)[0].modules[name]
        size = cost(spec.m, spec.n)
        if rate is None or spent + rate * size <= budget:
            elapsed = seconds(name)
            rate = elapsed / size
            spent += elapsed
            measured += count
        else:
            elapsed = rate * size
            scaled += count
        total += count * elapsed
    return Estimate(total, measured, scaled)


def run(
    adapters: Sequence[dm.Adapter],
    rank: int,
    device: torch.device,
    budget: float,
    wanted: Sequence[str] = ("literal float32", "literal float64", "PEFT svd", "PEFT cat"),
) -> dict[str, Estimate]:
    """The wanted rivals by name, each within its budget of seconds."""

    def literally(dtype: torch.dtype) -> Callable[[str], float]:
        return lambda name: timing.seconds(lambda: literal(adapters, name, dtype, device), device)

    table: dict[str, tuple[Callable[[str], float], Callable[[int, int], float]]] = {
        "literal float32": (literally(torch.float32), lambda m, n: m * n),
        "literal float64": (literally(torch.float64), lambda m, n: m * n),
        "PEFT svd": (
            lambda name: peft(adapters, name, "svd", rank, device),
            lambda m, n: m * n * min(m, n),
        ),
        "PEFT cat": (
            lambda name: peft(adapters, name, "cat", None, device),
            lambda m, n: m + n,
        ),
    }
    results = {}
    for name in wanted:
        seconds, cost = table[name]
        if device.type == "cuda":  # libraries start up in their first call
            seconds(one_of_each_shape(adapters)[0][0])
        results[name] = estimate(adapters, seconds, cost, budget)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="llama3-8b-8", choices=WORKLOADS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each rival")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    found = run(workload.adapters(args.device), workload.rank, args.device, args.budget)
    for name, e in found.items():
        print(f"{name}: {e.seconds:.3g} s, from {e.measured} modules' shapes, {e.scaled} scaled")
    if args.json:
        result = {
            "workload": workload.name,
            "machine": machine.describe(args.device),
            "extrapolated": {name: asdict(e) for name, e in found.items()},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
