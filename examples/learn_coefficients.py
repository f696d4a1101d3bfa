"""Merges adapters of three tasks, and finds with a few texts how much to take of each: by a line
search, by the losses of single adapters, and by gradients; shows what every way keeps.

The base, the tasks and the training are those of osrm_before_training.py: a Llama of two small
layers, and rules by which one token follows another. Nothing is fetched; it takes seconds.

    python examples/learn_coefficients.py out    # writes everything into the folder out
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from osrm_before_training import ALPHA, LAYERS, RANK, RULES, base, loss, texts, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import domerge_fast as dm
from domerge_fast.learning.learned import Step

STEPS = 60
FEW = 4
"""Batches of each task that coefficients are found with."""


def adapters(model: nn.Module, folder: Path) -> list[Path]:
    """One a task; the second is trained four times as long as the others."""
    paths = []
    for k, task in enumerate(RULES):
        torch.manual_seed(k)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
        adapted = get_peft_model(copy.deepcopy(model), config)
        steps = STEPS * (4 if task == "second" else 1)
        train(adapted, texts(task, 3), steps)
        adapted.save_pretrained(folder / task)
        paths.append(folder / task)
    return paths


def data() -> dict[str, list[dict[str, Tensor]]]:
    """Batches by task. Without "labels" all tokens count."""
    return {
        task: [{"input_ids": ids} for ids in itertools.islice(texts(task, 5), FEW)]
        for task in RULES
    }


def found(prepared: dm.Prepared, model: nn.Module) -> Mapping[str, dm.Learned]:
    """By what it is called, what each way finds."""
    few = data()
    by_gradient = {"steps": 40, "lr": 0.02, "progress": told}
    return {
        "tune": dm.tune(prepared, model, few),
        "tune by adapter": dm.tune(prepared, model, few, groups="adapters"),
        "cocktail": dm.cocktail(prepared, model, few),
        "adamerge": dm.adamerge(prepared, model, few, clamp=(0.0, 2.0), **by_gradient),
        "gradients of the loss": dm.adamerge(
            prepared, model, few, level="module", loss="cross_entropy", **by_gradient
        ),
    }


def told(step: Step, left: float) -> None:
    if step.number % 20 == 0:
        print(f"   step {step.number}, loss {step.mean:.3f}, {left:.0f} s left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where adapters are written")
    folder = parser.parse_args().folder
    warnings.simplefilter("ignore")
    model = base().eval()
    prepared = dm.prepare(adapters(model, folder), "tsvm", scale="auto")
    ways = {"as it is prepared": ([1.0] * len(RULES), "task")}
    made = found(prepared, model)
    ways |= {name: (x.coefficients, x.level) for name, x in made.items()}
    print(f"{'loss of new texts':24}" + "".join(f"{task:>9}" for task in RULES) + "     mean")
    losses = {"base": [loss(model, task) for task in RULES]}
    with prepared.attach(model) as live:
        for name, (kappa, level) in ways.items():
            live.set(kappa, level)
            losses[name] = [loss(model, task) for task in RULES]
    for name, row in losses.items():
        print(f"{name:24}" + "".join(f"{x:9.3f}" for x in [*row, sum(row) / len(row)]))
    best = min(made, key=lambda name: sum(losses[name]))
    made[best].save(folder / "merged", overwrite=True)
    print(f"that of {best} is written to {folder / 'merged'}")


if __name__ == "__main__":
    main()
