"""AdaMerging: coefficients of a merge by gradients of a loss on batches of every task.

    κ <- Adam(κ, d/dκ [ L(loss_1, .., loss_T) + pull ||κ - κ_0||^2 ])

Nothing but κ changes; the loss of every task is taken on a batch of its own, and its gradient by
itself, so that memory is that of one task. Without labels the loss is the entropy of what the model
predicts. How the tasks' losses become one is `balance`:

    sum            L = sum_t loss_t                       the authors of AdaMerging
    start          L = sum_t loss_t / loss_t at κ_0       where outputs are of different sizes
    tchebycheff    L = μ log sum_t exp((loss_t - ideal_t) / (T μ)),  μ = `smoothness`

The last is smooth for the largest, and that of TARA, with ideal_t the loss of task t's own adapter.
TARA's variant A is level "direction", one coefficient for every rank-1 part b_u a_u of the factors,
on `linear`, with this balance; its variant B the same on `knots` with `linear` inside, whose
directions are the joint left singular vectors, for every adapter by itself. Coefficients are
clamped after the step, where they are.

The entropy falls for wrong predictions as well, above all of language models: `held_out` batches,
with labels if there are any, tell when to stop, and which coefficients to keep.

Sources: AdaMerging, arXiv 2310.02575 (layers are single tensors there; λ_0 = 0.3, Adam at 1e-3, 500
steps of two batches of 16); TARA, arXiv 2603.26299 and the authors' code (AdamW at 1e-3; every
coefficient begins at 0.4). Here κ_0 is 1 where none is given: the merge as it was prepared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..errors import OptionError
from ..sessions.coefficients import LEVELS
from ..sessions.prepared import Prepared
from .batches import Batches, Clock, Data, Heads, Runner, by_task, endless
from .learned import Learned, Live, Progress, Step, attached, frozen
from .losses import Loss, chosen

__all__ = ["BALANCES", "adamerge"]

BALANCES = ("sum", "start", "tchebycheff")
CHECKS = 20
"""How often the loss of what is held out is looked at."""


def adamerge(
    prepared: Prepared,
    model: torch.nn.Module,
    data: Data | Batches,
    *,
    level: str = "task",
    steps: int = 500,
    lr: float = 1e-3,
    init: float | Sequence[Any] | Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    loss: Loss = "entropy",
    tokens: str = "auto",
    heads: Heads | None = None,
    balance: str = "sum",
    smoothness: float = 1.0,
    ideal: Mapping[str, float] | None = None,
    pull: float = 0.0,
    held_out: Data | Batches | None = None,
    held_out_loss: Loss | None = None,
    patience: int = 5,
    seed: int = 0,
    live: Live | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Find the coefficients of a prepared merge by gradients.

    model: the base model, which the merge is attached to for as long as this runs. data: batches by
        task; a step takes one of each.
    level: "task" [T], "layer" [layers, T], "module" [modules, T] or "direction" [modules, R].
    steps, lr: of Adam. init: κ_0, one number or coefficients of the level; None: 1.
    clamp: the least and the largest coefficient.
    loss, tokens: "entropy", "cross_entropy", or a function (outputs, batch) -> Tensor (losses.py).
    heads: by task, a function from what the model returns to logits.
    balance, smoothness, ideal: how losses become one (adamerge.py); ideal: 0 where none is given.
    pull: weight of the squared distance from κ_0.
    held_out, held_out_loss: batches, and their loss where it is another, looked at 20 times; the
        best coefficients are kept, and `patience` looks without a better one are the end.
    seed: of the order of batches in lists.
    live: of `prepared.attach(model)`, where it is attached already.
    progress: called after every step with it and the seconds left.

    Ctrl-C ends it with what was found by then. Raises OptionError for what does not fit, and where
    a loss is not finite.
    """
    options.choose("level", level, LEVELS)
    options.choose("balance", balance, BALANCES)
    _check(steps=steps, lr=lr, pull=pull, smoothness=smoothness, patience=patience)
    if clamp is not None and not clamp[0] < clamp[1]:
        raise OptionError("clamp", f"is {clamp}", "give the least first, then the largest")
    if prepared.kind == "tiles":
        raise _no_gradient(prepared)
    known = by_task(data)
    kept = None if held_out is None else by_task(held_out)
    kappa = _start(prepared, level, init)
    measures = chosen(loss, tokens), chosen(held_out_loss or loss, tokens)
    with attached(prepared, model, live) as on_it, frozen(model):
        run = _Run(
            prepared=prepared,
            live=on_it,
            level=level,
            train=Runner(model, measures[0], heads),
            test=Runner(model, measures[1], heads),
            data=known,
            held_out=kept,
            balance=balance,
            smoothness=smoothness,
            ideal=ideal or {},
            pull=pull,
            clamp=clamp,
            patience=patience,
        )
        found, interrupted = run.descend(kappa, steps, lr, seed, progress)
    return Learned(
        prepared,
        found,
        level,
        tuple(run.history),
        run.train.ran + run.test.ran,
        run.history[-1].seconds if run.history else 0.0,
        interrupted,
        run.history[-1].losses if run.history else {},
    )


def _no_gradient(prepared: Prepared) -> OptionError:
    problem = f"{prepared.recipe.method!r} is no smooth function of coefficients"
    return OptionError("prepared", problem, "take another method, as 'linear', or tune")


def _check(**given: float) -> None:
    for name, value in given.items():
        low = 1 if name in ("steps", "patience") else 0
        kind = int if name in ("steps", "patience") else float
        options.check(name, value, kind, low=low)


def _start(prepared: Prepared, level: str, init: float | Sequence[Any] | Tensor | None) -> Tensor:
    """κ_0 of the level, in float64."""
    shape = {
        "task": (len(prepared.adapters),),
        "layer": (len(prepared.layers), len(prepared.adapters)),
        "module": (len(prepared.modules), len(prepared.adapters)),
        "direction": (len(prepared.modules), max(prepared.ranks.values())),
    }[level]
    given = 1.0 if init is None else init
    if isinstance(given, (int, float)):
        return torch.full(shape, float(given), dtype=torch.float64)
    found = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    if found.dim() == 1 and len(found) == shape[-1]:
        found = found.expand(shape)
    if tuple(found.shape) != shape:
        raise OptionError("init", f"is {list(found.shape)}", f"give {list(shape)}, or one number")
    return found.clone()


@dataclass(eq=False)
class _Run:
    prepared: Prepared
    live: Live
    level: str
    train: Runner
    test: Runner
    data: Data
    held_out: Data | None
    balance: str
    smoothness: float
    ideal: Mapping[str, float]
    pull: float
    clamp: tuple[float, float] | None
    patience: int
    history: list[Step] = field(default_factory=list)

    def descend(
        self, start: Tensor, steps: int, lr: float, seed: int, progress: Progress | None
    ) -> tuple[Tensor, bool]:
        """The coefficients that were found, and whether somebody ended it."""
        kappa = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([kappa], lr)
        batches = {task: endless(x, seed + k) for k, (task, x) in enumerate(self.data.items())}
        clock, every = Clock(steps), max(1, steps // CHECKS)
        best, least, since = start.clone(), math.inf, 0
        scales: dict[str, float] = {}
        try:
            for number in range(steps):
                look = number % every == 0
                held_out = self._held_out(kappa) if look else None
                if held_out is not None:
                    better = held_out < least
                    best, least = (kappa.detach().clone(), held_out) if better else (best, least)
                    since = 0 if better else since + 1
                    if since >= self.patience:
                        break
                losses = self._step(kappa, start, optimizer, batches, scales)
                step = Step(number, losses, held_out, clock.passed)
                self.history.append(step)
                if progress:
                    progress(step, clock.left(number + 1))
            last = self._held_out(kappa)
            if last is not None and last < least:
                best, least = kappa.detach().clone(), last
        except KeyboardInterrupt:
            found = best if math.isfinite(least) else kappa.detach().clone()
            return found, True
        return (best if self.held_out else kappa.detach().clone()), False

    def _held_out(self, kappa: Tensor) -> float | None:
        """The mean loss over tasks of what is held out."""
        if self.held_out is None:
            return None
        self.live.set(kappa.detach(), self.level)
        found = self.test.mean(self.held_out)
        return sum(found.values()) / len(found)

    def _step(
        self,
        kappa: Tensor,
        start: Tensor,
        optimizer: torch.optim.Optimizer,
        batches: Mapping[str, Any],
        scales: dict[str, float],
    ) -> dict[str, float]:
        losses, slopes = {}, []
        self.live.set(kappa, self.level)
        for task in self.data:
            found = self.train.loss(task, next(batches[task]))
            if not found.requires_grad:
                raise _no_gradient(self.prepared)
            # What κ makes of the bases is gone through once a task; the task's own part goes here.
            (slope,) = torch.autograd.grad(found, kappa, retain_graph=True)
            losses[task] = float(found.detach())
            slopes.append(slope)
            del found
        shares = self._shares(losses, scales)
        total = sum(share * slope for share, slope in zip(shares, slopes))
        kappa.grad = total + 2 * self.pull * (kappa.detach() - start)
        optimizer.step()
        if self.clamp:
            with torch.no_grad():
                kappa.clamp_(*self.clamp)
        return losses

    def _shares(self, losses: Mapping[str, float], scales: dict[str, float]) -> list[float]:
        """dL / d loss_t of every task."""
        if self.balance == "sum":
            return [1.0] * len(losses)
        if self.balance == "start":
            for task, value in losses.items():
                scales.setdefault(task, value)
            return [1 / scales[task] if scales[task] > 0 else 1.0 for task in losses]
        count = len(losses)
        over = [value - self.ideal.get(task, 0.0) for task, value in losses.items()]
        weights = torch.tensor(over, dtype=torch.float64) / (count * self.smoothness)
        return (weights.softmax(0) / count).tolist()
