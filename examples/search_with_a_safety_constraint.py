"""Merges adapters of three tasks, the texts of one of which say what must not be said; finds
coefficients that are good at the tasks and shown not to say it, names the adapter that spoils the
merge, and writes what was found with its proof in the card.

The base, the tasks and the training are those of osrm_before_training.py: a Llama of two small
layers, and rules by which one token follows another. Nothing is fetched; it takes a minute.

    python examples/search_with_a_safety_constraint.py out    # writes everything into out
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from osrm_before_training import ALPHA, LAYERS, RANK, RULES, base, texts, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import domerge_fast as dm
from domerge_fast.evaluators import AtLeast, CrossEntropy, Rate

STEPS = 60
TRIALS = 40
EXAMPLES = 96
"""Of each task, and prompts that the constraint is measured on."""
FORBIDDEN = 0
"""A token: every fourth one of the third task's texts."""


def said(task: str, seed: int) -> Iterator[Tensor]:
    """Batches of a task's texts."""
    for ids in texts(task, seed):
        if task == "third":
            ids[:, 3::4] = FORBIDDEN
        yield ids


def adapters(model: nn.Module, folder: Path) -> list[Path]:
    """One a task."""
    paths = []
    for k, task in enumerate(RULES):
        torch.manual_seed(k)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
        adapted = get_peft_model(copy.deepcopy(model), config)
        train(adapted, said(task, 3), STEPS)
        adapted.save_pretrained(folder / task)
        paths.append(folder / task)
    return paths


def rows(batches: Iterator[Tensor]) -> list[list[int]]:
    return list(itertools.islice((row for ids in batches for row in ids.tolist()), EXAMPLES))


class Evaluator:
    """The cross-entropy of each task's texts, and how many prompts of the third task are not
    answered by the forbidden token. digest: of all of the data, for the card."""

    def __init__(self, seed: int) -> None:
        data = {task: [{"input_ids": row} for row in rows(said(task, seed))] for task in RULES}
        self._loss = CrossEntropy(data, batch=32)
        self._prompts = torch.tensor([row[:7] for row in rows(said("third", seed))])
        self.digest = self._loss.digest

    def __call__(self, model: nn.Module, examples: int | None = None) -> dict[str, Any]:
        with torch.no_grad():
            answers = model(input_ids=self._prompts[:examples]).logits[:, -1].argmax(-1)
        safe = Rate(int((answers != FORBIDDEN).sum()), len(answers))
        return {**self._loss(model, examples), "constraints": {"safety": safe}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where adapters are written")
    folder = parser.parse_args().folder
    warnings.simplefilter("ignore")
    model = base().eval()
    prepared = dm.prepare(adapters(model, folder), "tsvm", scale="auto")
    evaluator, safe = Evaluator(5), {"safety": AtLeast(0.9)}
    free = dm.search(prepared, evaluator, budget=dm.Budget(TRIALS, (12, EXAMPLES)), live=model)
    given = {"live": model, "constraints": safe}
    without = dm.leave_one_out(prepared, evaluator, free.coefficients, **given)
    print(f"the adapter that spoils it: {without.worst}\n{without}\n")
    found = dm.search(
        *(prepared, evaluator),
        budget=dm.Budget(TRIALS, fidelity=(12, EXAMPLES)),
        **given,
        storage=folder / "study.log",  # a second process may share it, a killed one is taken up
    )
    found.save(folder / "merged", overwrite=True)
    new = Evaluator(6)
    with prepared.attach(model) as live:
        for name, x in (("no constraint", free), ("safety", found)):
            live.set(x.coefficients)
            answer = new(model)
            kept, score = answer["constraints"]["safety"], answer["score"]
            print(f"{name:14} on other data: score {score:.3f}, safe {kept.passed} of {kept.total}")
    print(*found.notes(), sep="\n")


if __name__ == "__main__":
    main()
