"""The ops of one merge with the inputs they get there, so that each can be run on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Plan, Stack
from ..algebra.side import Side
from ..engine.interference import MOST_COMPARED
from ..methods.do import DoOptions, moves_factors
from . import bounds
from .bounds import Work

__all__ = ["BESIDE", "TRUNCATED", "Case", "merge", "record", "runner", "stack"]

Call = Callable[..., Any]
BESIDE = ("block_products", "largest", "block_largest", "truncate")
"""Ops that are recorded and are no part of the compute of a merge."""

TRUNCATED = 4
"""Modules that truncate is run on."""


@dataclass(frozen=True, eq=False)
class Case:
    """A call of an op of the package, by name, and the least work it is."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    work: Work

    def run(self, backend: str) -> Any:
        return getattr(ops, self.op)(*self.arguments, backend=backend, **self.options)

    def to(self, device: torch.device) -> Case:
        return Case(self.op, _moved(self.arguments, device), self.options, self.work)


@dataclass(frozen=True, eq=False)
class Recorder:
    """Runs ops with a backend and keeps every call."""

    backend: str
    cases: list[Case] = field(default_factory=list)

    def __call__(self, op: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(ops, op)(*arguments, backend=self.backend, **options)
        self.cases.append(Case(op, arguments, options, _work(op, arguments, options, result)))
        return result


def runner(backend: str) -> Call:
    """Calls ops by name."""
    return lambda op, *arguments, **options: getattr(ops, op)(
        *arguments, backend=backend, **options
    )


def stack(plan: Plan, name: str, device: torch.device) -> Stack:
    """A module of a plan, with its factors on the device."""
    s = plan.stack(name)
    return Stack((name,), s.adapters, _moved(s.a, device), _moved(s.b, device), s.weights)


def merge(
    stacks: Sequence[Stack], dtype: torch.dtype, call: Call, options: DoOptions, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """(A' [R, n], B̂ᵀ [R, m]) of every stack: the compute of a `do` merge, op by op.

    `call(op, *arguments, **options)` runs an op with the backend. Nothing here waits for the
    device.
    """

    def is_wide(p: Side) -> bool:
        return moves_factors(p.rank, p.d, options, backend)

    every = [*(s.a for s in stacks), *(s.b for s in stacks)]
    narrow = [p for p in every if not is_wide(p)]
    grams = iter(call("gram", narrow) if narrow else ())
    found = [None if is_wide(p) else next(grams) for p in every]
    moved = _orthogonalize(call, every, found, options)
    a, b = moved[: len(stacks)], moved[len(stacks) :]
    b_hat = call("apply", [c for c, _ in b], [p for _, p in b], dtype)
    split = [
        Side(x.split(list(s.b.ranks)), (1.0,) * len(s.adapters)) for s, x in zip(stacks, b_hat)
    ]
    blocks = call("block_gram", split)
    omegas = [s.omegas for s in stacks]
    columns = [p for _, p in a]
    a_new, _ = call("apply_decouple", [c for c, _ in a], columns, blocks, omegas, 1.0, dtype)
    return list(zip(a_new, b_hat))


def record(
    stacks: Sequence[Stack], dtype: torch.dtype, backend: str, options: DoOptions
) -> list[Case]:
    """The calls of a merge, then what is done beside it: the interference of modules of the same
    ranks, the largest of results and of factors, and truncate on some of them."""
    call = Recorder(backend)
    merged = merge(stacks, dtype, call, options, backend)
    ranks = stacks[0].a.ranks
    if len(ranks) <= MOST_COMPARED:
        alike = [s for s in stacks if s.a.ranks == ranks]
        grams = [ops.gram([getattr(s, side) for s in alike], backend=backend) for side in "ab"]
        call("block_products", *grams, ranks)
    call("largest", [x for pair in merged for x in pair])
    call("block_largest", [side for s in stacks for side in (s.a, s.b)])
    pairs = [(a.float(), b.T.float()) for a, b in merged[:TRUNCATED]]
    rank = max(r for s in stacks for r in s.a.ranks)
    call("truncate", pairs, rank=rank, out_dtype=dtype)
    return call.cases


def _orthogonalize(
    call: Call, problems: Sequence[Side], grams: Sequence[Tensor | None], options: DoOptions
) -> list[tuple[Tensor | None, Side]]:
    """C and the problem it is to be applied to."""
    results: list[tuple[Tensor | None, Side]] = [(None, p) for p in problems]
    rule = {"gamma": options.gamma, "steps": options.steps, "tol": options.tol}
    narrow = {i: g for i, g in enumerate(grams) if g is not None}
    wide = [i for i, g in enumerate(grams) if g is None]
    if narrow:
        ranks = [problems[i].ranks for i in narrow]
        found, _ = call(
            "orthogonalize", list(narrow.values()), ranks, penalty=options.penalty, **rule
        )
        for i, c in zip(narrow, found):
            results[i] = c, problems[i]
    if wide:
        found, _ = call("orthogonalize_factors", [problems[i] for i in wide], **rule)
        for i, x in zip(wide, found):
            blocks = x.split(list(problems[i].ranks))
            results[i] = None, Side(blocks, (1.0,) * len(blocks))
    return results


def _work(op: str, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> Work:
    if op == "orthogonalize":
        return bounds.orthogonalize([len(g) for g in arguments[0]], result[1][:, 0].tolist())
    if op == "orthogonalize_factors":
        return bounds.orthogonalize_factors(arguments[0], result[1][:, 0].tolist())
    if op == "apply_decouple":
        return bounds.apply_decouple(arguments[0], arguments[1], arguments[-1])
    if op == "truncate":
        return bounds.truncate(arguments[0], options["rank"], options["out_dtype"])
    return getattr(bounds, op)(*arguments)


def _moved(value: Any, device: torch.device) -> Any:
    """The same nest of lists and tuples with its tensors on the device, strides kept."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Side):
        return Side(_moved(value.blocks, device), value.scales)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(x, device) for x in value)
    return value
