"""Losses of what a model puts out: entropy without labels, cross-entropy with them.

    entropy        mean of -sum_c p_c log p_c,  p = softmax(logits)
    cross_entropy  mean of -log p_label

over the examples of a classifier (logits [batch, classes]), or over the predictions of a language
model (logits [batch, length, vocabulary], of which those at t predict token t + 1) that `tokens`
names: "all", but for padding; "answer", of tokens whose label is not -100; "last", what comes after
the last token. Source of entropy as a loss of merges: AdaMerging, arXiv 2310.02575.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from .. import options
from ..errors import OptionError

__all__ = ["LOSSES", "TOKENS", "Loss", "Measure", "chosen"]

TOKENS = ("auto", "all", "answer", "last")
IGNORED = -100
"""The label of a token that is no answer."""

Loss = str | Callable[[Any, Any], Tensor]
"""The name of a loss, or a function (outputs, batch) -> a mean over the batch, in one number.

outputs: what the model returns of the batch, after the task's head where it has one.
"""

Measure = Callable[[Any, Any], Tensor]
"""(outputs, batch) -> one number."""


def chosen(loss: Loss, tokens: str = "auto") -> Measure:
    """The function of a loss. OptionError for a name that is not known."""
    if callable(loss):
        return loss
    options.choose("loss", loss, LOSSES)
    options.choose("tokens", tokens, TOKENS)
    return lambda outputs, batch: LOSSES[loss](_logits(outputs), batch, tokens)


def _logits(outputs: Any) -> Tensor:
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        problem = "the model returns no logits [batch, classes] or [batch, length, vocabulary]"
        raise OptionError("heads", problem, "give each task a function from outputs to logits")
    return found


def _entropy(logits: Tensor, batch: Any, tokens: str) -> Tensor:
    """In nats. What follows is of the logits themselves: no label is looked at."""
    if logits.dim() == 3:
        logits, _ = _predictions(logits, batch, tokens)
    logs = log_softmax(logits.float(), dim=-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _cross_entropy(logits: Tensor, batch: Any, tokens: str) -> Tensor:
    """In nats."""
    if logits.dim() == 2:
        return cross_entropy(logits.float(), _labels(batch).to(logits.device))
    if tokens == "last":
        problem = "'last' is what comes after all tokens, which has no label"
        raise OptionError("tokens", problem, "use 'all' or 'answer'")
    chosen_logits, following = _predictions(logits, batch, tokens)
    return cross_entropy(chosen_logits.float(), following)


LOSSES: Mapping[str, Callable[[Tensor, Any, str], Tensor]] = {
    "entropy": _entropy,
    "cross_entropy": _cross_entropy,
}


def _labels(batch: Any) -> Tensor:
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    if found is None and isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = batch[1]
    if not isinstance(found, Tensor):
        problem = "cross-entropy needs labels"
        raise OptionError("data", problem, "put 'labels' into the batches, or use 'entropy'")
    return found


def _predictions(logits: Tensor, batch: Any, tokens: str) -> tuple[Tensor, Tensor]:
    """The chosen predictions [N, vocabulary], and the tokens [N] that did follow; without any,
    where these are not known: "last"."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        problem = "a language model's batches have 'input_ids'"
        raise OptionError("data", problem, "give them, with 'attention_mask' for padding")
    ids = batch["input_ids"].to(logits.device)
    mask = batch.get("attention_mask", torch.ones_like(ids)).to(logits.device).bool()
    labels = batch.get("labels")
    word = tokens if tokens != "auto" else "all" if labels is None else "answer"
    if word == "last":
        last = ids.shape[1] - 1 - mask.flip(1).int().argmax(1)
        return logits[torch.arange(len(ids), device=ids.device), last], ids.new_empty(0)
    wanted = mask[:, 1:] & mask[:, :-1]
    if word == "answer":
        wanted = wanted & (_labels(batch).to(logits.device)[:, 1:] != IGNORED)
    if not wanted.any():
        problem = "a batch has no token that is to be predicted"
        raise OptionError("tokens", problem, "leave such batches out, or use 'all'")
    return logits[:, :-1][wanted], ids[:, 1:][wanted]
