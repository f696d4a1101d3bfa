"""LM-Cocktail: how well each adapter alone does on some examples says how much of it to take.

    κ_i = total softmax_i(-loss_i / temperature)

loss_i: the mean loss on the examples of the merge of adapter i alone, κ one-hot. T evaluations and
no search; also where a search or `adamerge` may begin. Source: arXiv 2311.13534 and the authors'
code, which runs the models themselves; their default temperature is 5.
"""

from __future__ import annotations

import torch

from .. import options
from ..sessions.prepared import Prepared
from .batches import Batches, Clock, Data, Heads, Runner, by_task
from .learned import Learned, Live, Progress, Step, attached, frozen
from .losses import Loss, chosen

__all__ = ["cocktail"]


def cocktail(
    prepared: Prepared,
    model: torch.nn.Module,
    data: Data | Batches,
    *,
    temperature: float = 1.0,
    total: float | None = None,
    loss: Loss = "cross_entropy",
    tokens: str = "auto",
    heads: Heads | None = None,
    batches: int | None = None,
    live: Live | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Coefficients of level "task" from the losses of single adapters.

    data: a few batches of what the merge is for, by task if there are several. temperature: in
        nats; the lower, the more the best adapter gets. total: what coefficients add up to; None:
        1, a mean, where λ was given, and T, as many as λ was found for, where it was not.
    batches: of each task, at most. model, loss, tokens, heads, live, progress: as of `adamerge`.
    """
    options.check("temperature", temperature, float, low=1e-6)
    known = by_task(data)
    count = len(prepared.adapters)
    clock, history = Clock(count), []
    with attached(prepared, model, live) as on_it, frozen(model):
        run = Runner(model, chosen(loss, tokens), heads)
        for i, own in enumerate(torch.eye(count, dtype=torch.float64)):
            on_it.set(own, "task")
            step = Step(i, run.mean(known, batches), None, clock.passed)
            history.append(step)
            if progress:
                progress(step, clock.left(i + 1))
    losses = torch.tensor([step.mean for step in history], dtype=torch.float64)
    whole = (count if prepared.scales else 1.0) if total is None else total
    return Learned(
        prepared,
        whole * (-losses / temperature).softmax(0),
        "task",
        tuple(history),
        run.ran,
        clock.passed,
        losses=dict(zip(prepared.adapters, losses.tolist())),
    )
