"""Sets of adapters of pretrained sentence encoders: one adapter a task, four ways of training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import bases
import tasks
import torch
from bench import Adapter, Bench
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertModel

TOKENS = 10
"""Of an input, [CLS] and [SEP] among them; longer ones are cut."""
BATCH, WARM = 16, 10
LARGE = 256
"""Inputs at a time where nothing is trained."""
TEST, VALIDATION = 256, 64
"""Inputs of a task that merges are scored on, and that choose λ; the rest is trained on."""
SHARPNESS = 20.0
"""Times the cosine: the logit of a class."""
ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]

Example = tuple[list[int], int]
"""Token numbers, and the class."""


@dataclass(frozen=True)
class Kind:
    """How the adapters of a set are trained. efforts: steps and learning rates, ranks: r, handed
    out in another order in every training; scaling is 2 but where alpha says otherwise."""

    efforts: Sequence[tuple[int, float]]
    ranks: Sequence[int] = (8,)
    targets: Sequence[str] = tuple(ALL)
    alpha: int | None = None
    one_first_a: bool = False


KINDS = {
    "even": Kind([(130, 5e-4)]),
    "uneven": Kind([(s, r) for s in (40, 80, 160) for r in (2.5e-4, 5e-4, 1e-3)]),
    "shared_a": Kind([(130, 1e-3)], (16,), ("query", "value"), alpha=16, one_first_a=True),
    "ranks": Kind([(130, 5e-4)], (4, 8, 16, 32, 64)),
}
"""`even`: trained alike. `uneven`: steps and rates four times apart. `shared_a`: all start from one
A. `ranks`: sixteen times apart."""


def adapters(
    kind: Kind,
    base: str,
    seed: int,
    data: Path,
    folder: Path,
    names: Sequence[str] = (),
    starts: Path | None = None,
) -> list[Adapter]:
    """One a task, of these or of all, trained where they are not there yet. starts: the folder that
    has an adapter for each to start from; None: PEFT's own initial values."""
    names = names or list(tasks.TASKS)
    for name in names:
        start = starts and starts / name
        _train(kind, base, seed, name, data, folder / name, start)
    return [Adapter(name, name, folder / name) for name in names]


def bench(base: str, seed: int, data: Path, names: Sequence[str] = ()) -> Bench:
    """The base with the texts of the tasks, of these or of all, that the seed holds out."""
    names = names or list(tasks.TASKS)
    model = bases.load(base, data)
    held = {name: _split(name, seed, data)[: TEST + VALIDATION] for name in names}
    heads = {name: _head(model, name, data) for name in names}
    labels = {name: torch.tensor([label for _, label in held[name]]) for name in held}

    def outputs(model: torch.nn.Module, name: str) -> Tensor:
        return _logits(model, heads[name], held[name])

    return Bench(model, outputs, labels, VALIDATION)


def examples(
    base: str, seed: int, data: Path, names: Sequence[str] = ()
) -> tuple[dict[str, list[dict[str, Tensor]]], dict[str, Callable[[Any], Tensor]]]:
    """By task, the examples that choose λ in batches of inputs of one length with "labels", and
    what makes logits of what the model returns."""
    names = names or list(tasks.TASKS)
    model = bases.load(base, data)
    batches, heads = {}, {}
    for name in names:
        chosen = _split(name, seed, data)[:VALIDATION]
        batches[name] = [
            {
                "input_ids": torch.tensor([chosen[k][0] for k in rows]),
                "labels": torch.tensor([chosen[k][1] for k in rows]),
            }
            for rows in _of_one_length(chosen, BATCH)
        ]
        heads[name] = partial(_scores, _head(model, name, data))
    return batches, heads


def _scores(head: Tensor, outputs: Any) -> Tensor:
    """Logits of what the model returns."""
    states = outputs.last_hidden_state
    return SHARPNESS * torch.nn.functional.normalize(states.mean(1), dim=-1) @ head.T


def _logits(model: torch.nn.Module, head: Tensor, examples: list[Example]) -> Tensor:
    found = torch.empty(len(examples), len(head))
    for rows in _of_one_length(examples, LARGE):
        inputs = torch.tensor([examples[k][0] for k in rows])
        found[rows] = SHARPNESS * _embed(model, inputs) @ head.T
    return found


def texts(name: str, seed: int, data: Path, most: int) -> list[Tensor]:
    """Batches [any, length] of up to so many of the texts that a task is trained on."""
    examples = _split(name, seed, data)[TEST + VALIDATION :][:most]
    rows = _of_one_length(examples, LARGE)
    return [torch.tensor([examples[k][0] for k in batch]) for batch in rows]


def _train(
    kind: Kind,
    base: str,
    seed: int,
    name: str,
    data: Path,
    path: Path,
    start: Path | None = None,
) -> None:
    """Write the adapter of one task; nothing where it is there."""
    if path.exists():
        return
    k = list(tasks.TASKS).index(name)
    steps, rate = _dealt(kind.efforts, seed)[k]
    rank = _dealt(kind.ranks, seed)[k]
    model = bases.load(base, data)
    head, examples = _head(model, name, data), _split(name, seed, data)[TEST + VALIDATION :]
    torch.manual_seed(1000 * seed + (0 if kind.one_first_a else k))
    alpha = kind.alpha or 2 * rank
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(kind.targets))
    if start:
        adapted = PeftModel.from_pretrained(model, start, is_trainable=True)
    else:
        adapted = get_peft_model(model, config)
    _fit(adapted, head, _endless(examples, random.Random(1000 * seed + k)), steps, rate)
    partial = path.with_suffix(".partial")
    adapted.save_pretrained(partial)
    partial.rename(path)


def _dealt(hand: Sequence, seed: int) -> list:
    """One of the hand for each task, as evenly as goes."""
    repeated = [hand[k % len(hand)] for k in range(len(tasks.TASKS))]
    return random.Random(seed).sample(repeated, len(repeated))


def _fit(model: torch.nn.Module, head: Tensor, batches: Iterator, steps: int, rate: float) -> None:
    """AdamW with a short warm-up and a linear decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / WARM) * (1 - k / steps)
    )
    for _ in range(steps):
        inputs, labels = next(batches)
        optimizer.zero_grad(set_to_none=True)
        logits = SHARPNESS * _embed(model, inputs) @ head.T
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()


def _embed(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """Unit mean of the last layer's states [batch, WIDTH]; all inputs are of one length."""
    states = model(input_ids=inputs).last_hidden_state
    return torch.nn.functional.normalize(states.mean(1), dim=-1)


@torch.no_grad()
def _head(model: BertModel, name: str, data: Path) -> Tensor:
    """The base's embeddings of the task's phrases [classes, WIDTH]."""
    tokenizer = bases.tokenizer(data)
    phrases = tasks.task(name, data).phrases
    inputs = [torch.tensor([tokenizer(phrase)["input_ids"]]) for phrase in phrases]
    return torch.cat([_embed(model, x) for x in inputs])


@cache
def _tokens(name: str, data: Path) -> list[Example]:
    texts, labels = zip(*tasks.task(name, data).examples)
    found = bases.tokenizer(data)(list(texts), truncation=True, max_length=TOKENS)
    return list(zip(found["input_ids"], labels))


def _split(name: str, seed: int, data: Path) -> list[Example]:
    """The task's examples in the seed's order: what is held out, then what is trained on."""
    examples = _tokens(name, data)
    return random.Random(seed).sample(examples, len(examples))


def _of_one_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Numbers of examples, up to size of them with equally many tokens."""
    by_length: dict[int, list[int]] = {}
    for k, (tokens, _) in enumerate(examples):
        by_length.setdefault(len(tokens), []).append(k)
    for same in by_length.values():
        yield from (same[k : k + size] for k in range(0, len(same), size))


def _endless(examples: list[Example], order: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches [BATCH, length] with labels, in rounds over the examples; ends of rounds are left
    out."""
    while True:
        examples = order.sample(examples, len(examples))
        batches = [b for b in _of_one_length(examples, BATCH) if len(b) == BATCH]
        for batch in order.sample(batches, len(batches)):
            tokens, labels = zip(*(examples[k] for k in batch))
            yield torch.tensor(tokens), torch.tensor(labels)
