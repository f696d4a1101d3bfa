"""Evaluators that need nothing but a causal language model and texts, and what others return."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import options
from .errors import OptionError
from .sessions.search.limits import AtLeast, AtMost, Mean, Rate

__all__ = ["AtLeast", "AtMost", "CrossEntropy", "Mean", "Rate"]

CHAT = "chat"
MASKED = -100
"""The label of a token that does not count, as transformers has it."""

Example = str | Mapping[str, Any]


@dataclass(frozen=True)
class _Tokens:
    """ids: of the whole text. labels: the same, MASKED where a token does not count."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


class CrossEntropy:
    """The mean cross-entropy of answers, given their prompts: of every example the mean over its
    answer's tokens, of a task the mean over examples.

    data: {task: examples}, or the examples of one. An example is a text, of which all tokens but
        the first count; {"prompt", "answer"}, of which those of the answer do; or {"input_ids",
        "labels"} as transformers has them, with labels of -100 where nothing counts.
    tokenizer: of transformers; only for texts.
    template: what a prompt is put into: a text with {prompt} in it, or "chat" for the tokenizer's
        own chat template. The answer comes after, and the end of text where the tokenizer has one.
    weights: of tasks; the score is - Σ weight · cross-entropy. 1 where nothing is said, but 0 for
        tasks that are constraints.
    constraints: tasks whose cross-entropy is a constraint (`search`: {name: AtMost(0.8)}).
    batch: examples in one forward pass, of each candidate. length: tokens at most of an example,
        which is cut at its end; one whose answer is cut off whole is refused.
    shuffle: the seed by which examples are ordered, so that the first few are a sample of all;
        None: as they are.

    The model is in `eval` mode for the time of a call. `digest` is a sum of all of the data.
    """

    def __init__(
        self,
        data: Mapping[str, Sequence[Example]] | Sequence[Example],
        tokenizer: Any = None,
        *,
        template: str | None = None,
        weights: Mapping[str, float] | None = None,
        constraints: Sequence[str] = (),
        batch: int = 8,
        length: int = 2048,
        shuffle: int | None = 0,
    ) -> None:
        named = data if isinstance(data, Mapping) else {"task": data}
        self._batch = options.check("batch", batch, int, low=1)
        self._length = options.check("length", length, int, low=2)
        self._tokenizer, self._template = tokenizer, template
        if template not in (None, CHAT) and "{prompt}" not in str(template):
            problem = f"{template!r} has no place for the prompt"
            raise OptionError("template", problem, "write {prompt} there, or 'chat'")
        for option, names in (("weights", weights or {}), ("constraints", constraints)):
            for name in names:
                options.choose(option, name, named)
        self._constraints = tuple(constraints)
        usual = {name: 0.0 if name in self._constraints else 1.0 for name in named}
        self._weights = usual | dict(weights or {})
        self._examples = {name: self._tokens(name, given) for name, given in named.items()}
        if shuffle is not None:
            for examples in self._examples.values():
                random.Random(shuffle).shuffle(examples)
        self.digest = _digest(self._examples, self._weights)

    def __call__(
        self, model: Any, budget: int | range | None = None, candidates: int | None = None
    ) -> Any:
        """What `search` asks: of the first `budget` examples of each task, or of a range of them.
        With candidates, a batch holds each example once for every one of these, in their order."""
        count = candidates or 1
        found: list[dict[str, list[float]]] = [{} for _ in range(count)]
        with _evaluating(model):
            for name, examples in self._examples.items():
                chosen = _chosen(name, examples, budget)
                rows = [self._losses(model, x, count) for x in _batches(chosen, self._batch)]
                for k, losses in enumerate(torch.cat(rows, 1).tolist()):
                    found[k][name] = losses
        answers = [self._answer(losses) for losses in found]
        return answers if candidates else answers[0]

    def _answer(self, losses: Mapping[str, list[float]]) -> dict[str, Any]:
        means = {name: math.fsum(x) / len(x) for name, x in losses.items()}
        return {
            "score": -math.fsum(self._weights[name] * x for name, x in means.items()),
            "tasks": {n: -x for n, x in means.items() if n not in self._constraints},
            "constraints": {n: Mean.of(losses[n]) for n in self._constraints},
        }

    def _losses(self, model: Any, examples: Sequence[_Tokens], candidates: int) -> Tensor:
        """Of each candidate and example, [N, P], in float64 on the CPU."""
        width = max(len(x.ids) for x in examples)
        device = next(model.parameters()).device
        ids = torch.tensor([_padded(x.ids, 0, width) for x in examples], device=device)
        labels = torch.tensor([_padded(x.labels, MASKED, width) for x in examples], device=device)
        there = torch.tensor([_padded([1] * len(x.ids), 0, width) for x in examples], device=device)
        ids, labels, there = (x.repeat(candidates, 1) for x in (ids, labels, there))
        logits = model(input_ids=ids, attention_mask=there).logits[:, :-1].float()
        wanted = labels[:, 1:]
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=MASKED, reduction="none"
        ).view_as(wanted)
        mean = each.double().sum(1) / (wanted != MASKED).sum(1)
        return mean.view(candidates, len(examples)).cpu()

    def _tokens(self, task: str, given: Sequence[Example]) -> list[_Tokens]:
        if isinstance(given, str) or not given:
            raise OptionError("data", f"task {task!r} has no examples", "give a list of some")
        found = []
        for k, example in enumerate(given):
            tokens = self._one(example)
            tokens = _Tokens(tokens.ids[: self._length], tokens.labels[: self._length])
            if not any(x != MASKED for x in tokens.labels[1:]):
                problem = f"example {k} of task {task!r} has no token that counts"
                raise OptionError("data", problem, "leave it out, or raise length")
            found.append(tokens)
        return found

    def _one(self, example: Example) -> _Tokens:
        if isinstance(example, str):
            ids = self._ids(example, True)
            return _Tokens(ids, ids)
        if "input_ids" in example:
            ids = tuple(int(x) for x in example["input_ids"])
            labels = tuple(int(x) for x in example.get("labels", ids))
            if len(labels) != len(ids):
                problem = f"has {len(ids)} input_ids and {len(labels)} labels"
                raise OptionError("data", problem, "give one label a token")
            return _Tokens(ids, labels)
        for key in ("prompt", "answer"):
            if not isinstance(example.get(key), str):
                problem = f"an example has {sorted(map(str, example))}, and no text {key!r}"
                raise OptionError("data", problem, "give prompt and answer")
        prompt = self._prompt(example["prompt"])
        answer = self._ids(example["answer"], False)
        end = getattr(self._tokenizer, "eos_token_id", None)
        answer += () if end is None else (end,)
        return _Tokens(prompt + answer, (MASKED,) * len(prompt) + answer)

    def _prompt(self, prompt: str) -> tuple[int, ...]:
        if self._template == CHAT:
            said = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True
            )
            return self._ids(text, False)
        text = prompt if self._template is None else self._template.replace("{prompt}", prompt)
        return self._ids(text, True)

    def _ids(self, text: str, special: bool) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise OptionError("tokenizer", "is missing, and there are texts", "give the model's")
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _chosen(
    task: str, examples: Sequence[_Tokens], budget: int | range | None
) -> Sequence[_Tokens]:
    if budget is None:
        return examples
    places = budget if isinstance(budget, range) else range(budget)
    if not places or places[-1] >= len(examples):
        problem = f"asks for example {places[-1] if places else 0}"
        remedy = f"task {task!r} has {len(examples)}; give no more as fidelity"
        raise OptionError("budget", problem, remedy)
    return [examples[k] for k in places]


def _batches(examples: Sequence[_Tokens], size: int) -> Iterator[Sequence[_Tokens]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _padded(row: Sequence[int], filler: int, width: int) -> list[int]:
    return [*row, *[filler] * (width - len(row))]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients, and no dropout, for the time of the block."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _digest(examples: Mapping[str, Sequence[_Tokens]], weights: Mapping[str, float]) -> str:
    plain = {n: [[x.ids, x.labels] for x in rows] for n, rows in examples.items()}
    text = json.dumps([plain, dict(weights)], separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
