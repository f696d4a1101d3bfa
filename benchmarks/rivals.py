"""What domerge_fast replaces, run for real in memory: the literal method, PEFT, and QR in PyTorch.

    python benchmarks/rivals.py --device cuda --json rivals.json

Each runs on one module of every shape, the smallest first, and is multiplied by the number of
modules. A shape that would not finish in the budget, or not fit in memory, is scaled from the one
before it, by the cost of its largest term.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import domerge_fast as dm
from domerge_fast.backends import paper
from domerge_fast.bench import machine, timing
from domerge_fast.bench.workloads import WORKLOADS

TIES_DENSITY = 0.2
REPEATS = 5
QUICK = 1.0
"""Seconds: a call that takes less is repeated, after that one to warm up."""

Modules = Sequence[tuple[Tensor, Tensor]]
"""A_i [r_i, n] and the scaled B_i [m, r_i] of every adapter that has the module, on the device."""


class Size(NamedTuple):
    """A module with an [m, n] update, T adapters and their ranks' sum."""

    m: int
    n: int
    adapters: int
    rank: int


@dataclass(frozen=True)
class Rival:
    """prepare(factors, k) gives a call that merges a module, to rank k where it truncates.

    cost: what the largest term grows with. memory: bytes that the call takes.
    """

    prepare: Callable[[Modules, int], Callable[[], object]]
    cost: Callable[[Size], float]
    memory: Callable[[Size], float]


@dataclass(frozen=True)
class Estimate:
    """Seconds for all modules: how many have a shape that was run, and how many a scaled one.

    needs: where not even the smallest shape fits, the bytes that it would take; there are no
    seconds then.
    """

    seconds: float
    measured: int
    scaled: int
    needs: float = 0.0


def literal(factors: Modules, dtype: torch.dtype) -> Tensor:
    """ΔW [m, n] by the method as the paper states it, dense, with the same descent."""
    return paper.do_merging(
        [a for a, _ in factors],
        [b.to(dtype) for _, b in factors],
        [1 / len(factors)] * len(factors),
        dtype=dtype,
    )


def qr_svd(factors: Modules, rank: int) -> tuple[Tensor, Tensor]:
    """A [k, n] and B [m, k] of the adapters' mean, cut to rank k, by QR and the SVD of the core."""
    a = torch.cat([a.float() for a, _ in factors])
    b = torch.cat([b.float() / len(factors) for _, b in factors], dim=1)
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    half = s[:rank].sqrt()
    return half[:, None] * (vh[:rank] @ q_a.T), q_b @ (u[:, :rank] * half)


def peft(factors: Modules, combination: str, **options: object) -> Callable[[], tuple]:
    """PEFT's add_weighted_adapter on one module, as a linear layer; a call gives its A and B."""
    from peft import LoraConfig, PeftModel, get_peft_model

    device = factors[0][0].device
    (m, n) = len(factors[0][1]), factors[0][0].shape[1]
    base = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    model: PeftModel | None = None
    for i, (a, b) in enumerate(factors):
        config = LoraConfig(r=len(a), lora_alpha=len(a), target_modules=["0"])
        if model is None:
            model = get_peft_model(base, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0]
        layer.lora_A[str(i)].weight.data.copy_(a)
        layer.lora_B[str(i)].weight.data.copy_(b)
    assert model is not None
    model.to(device)
    names = [str(i) for i in range(len(factors))]
    weights = [1 / len(names)] * len(names)

    def call() -> tuple[Tensor, Tensor]:
        # Under the name of an adapter that is there, PEFT would do nothing.
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(
            names, weights, "merged", combination_type=combination, **options
        )
        return layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data

    return call


def _literal(dtype: torch.dtype) -> Rival:
    return Rival(
        lambda factors, rank: lambda: literal(factors, dtype),
        lambda s: s.m * s.n * s.adapters,
        lambda s: s.m * s.n * (s.adapters + 4) * dtype.itemsize,
    )


def _peft_svd(combination: str, copies: int, thin: bool) -> Rival:
    """copies: of all dense updates, in float32, that PEFT makes."""
    options = {"density": TIES_DENSITY} if combination == "ties_svd" else {}
    # LAPACK's SVD with full matrices is thin, and then fills up the longer side's square.
    return Rival(
        lambda factors, rank: peft(
            factors, combination, svd_rank=rank, svd_full_matrices=not thin, **options
        ),
        lambda s: min(s.m, s.n) * max(s.m, s.n) * (min(s.m, s.n) if thin else max(s.m, s.n)),
        lambda s: 4 * (copies * s.adapters * s.m * s.n + (0 if thin else 2 * max(s.m, s.n) ** 2)),
    )


LITERAL, PEFT_CAT, PEFT_SVD = "literal float32", "PEFT cat", "PEFT svd"
THIN = ", thin"
QR_SVD = "PyTorch QR + SVD of the core"
RIVALS = {
    LITERAL: _literal(torch.float32),
    "literal float64": _literal(torch.float64),
    PEFT_CAT: Rival(
        lambda factors, rank: peft(factors, "cat"),
        lambda s: (s.m + s.n) * s.rank,
        lambda s: 16 * (s.m + s.n) * s.rank,
    ),
    PEFT_SVD: _peft_svd("svd", 3, thin=False),
    PEFT_SVD + THIN: _peft_svd("svd", 3, thin=True),
    "PEFT ties_svd": _peft_svd("ties_svd", 5, thin=False),
    "PEFT ties_svd" + THIN: _peft_svd("ties_svd", 5, thin=True),
    QR_SVD: Rival(
        lambda factors, rank: lambda: qr_svd(factors, rank),
        lambda s: (s.m + s.n + s.rank) * s.rank**2,
        lambda s: 16 * ((s.m + s.n) * s.rank + s.rank**2),
    ),
}
FOR_A_GPU = (LITERAL, "literal float64", PEFT_SVD, PEFT_CAT)


def one_of_each_shape(adapters: Sequence[dm.Adapter]) -> list[tuple[str, int]]:
    """A module of every shape and set of ranks, and how many share them; the smallest first."""
    keys: dict[str, tuple] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            keys[name] = (*keys.get(name, (module.m, module.n)), module.rank)
    counts = Counter(keys.values())
    first = {key: name for name, key in reversed(keys.items())}
    return [(first[k], counts[k]) for k in sorted(counts, key=lambda k: k[0] + k[1])]


def size(adapters: Sequence[dm.Adapter], name: str) -> Size:
    modules = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
    return Size(modules[0].m, modules[0].n, len(modules), sum(x.rank for x in modules))


def factors(
    adapters: Sequence[dm.Adapter], name: str, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    found = []
    for adapter in adapters:
        if name in adapter.modules:
            a, b = (x.to(device) for x in adapter.factors(name))
            found.append((a, adapter.modules[name].scaling * b.float()))
    return found


def estimate(
    adapters: Sequence[dm.Adapter],
    seconds: Callable[[str], float],
    cost: Callable[[Size], float],
    memory: Callable[[Size], float],
    budget: float,
    room: float,
) -> Estimate:
    """Seconds for all modules, from `seconds` of one of each shape.

    budget: seconds to spend on all shapes; the first is always run. room: bytes of memory.
    """
    total, measured, scaled, spent = 0.0, 0, 0, 0.0
    rate: float | None = None
    for name, count in one_of_each_shape(adapters):
        shape = size(adapters, name)
        if rate is None and memory(shape) > room:
            return Estimate(0.0, 0, 0, memory(shape))
        work = cost(shape)
        if rate is None or (memory(shape) <= room and spent + rate * work <= budget):
            elapsed = seconds(name)
            rate = elapsed / work
            spent += elapsed
            measured += count
        else:
            elapsed = rate * work
            scaled += count
        total += count * elapsed
    return Estimate(total, measured, scaled)


def run(
    adapters: Sequence[dm.Adapter],
    rank: int,
    device: torch.device,
    budget: float,
    wanted: Sequence[str],
) -> dict[str, Estimate]:
    """The wanted rivals by name, each within its budget of seconds."""
    room = 0.9 * machine.free_bytes(device)
    results = {}
    for name in wanted:
        rival = RIVALS[name]

        def seconds(module: str, rival: Rival = rival) -> float:
            return median(rival.prepare(factors(adapters, module, device), rank), device)

        if device.type == "cuda":  # libraries start up in their first call
            seconds(one_of_each_shape(adapters)[0][0])
        with torch.no_grad():
            results[name] = estimate(adapters, seconds, rival.cost, rival.memory, budget, room)
    return results


def median(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: once, or the median of REPEATS where it is quick."""
    first = timing.seconds(call, device)
    if first >= QUICK:
        return first
    return statistics.median(timing.seconds(call, device) for _ in range(REPEATS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="llama3-8b-8", choices=WORKLOADS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each rival")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--all", action="store_true", help=f"all, not just {', '.join(FOR_A_GPU)}")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    wanted = tuple(RIVALS) if args.all else FOR_A_GPU
    found = run(workload.adapters(args.device), workload.rank, args.device, args.budget, wanted)
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
