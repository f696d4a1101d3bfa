"""Trains LoRA adapters of three tasks, from PEFT's own start and from one that the other tasks'
inputs hardly excite (OSRM), merges the three of either, and shows what is kept.

The base is a Llama of two small layers that is made here; a task is a rule by which one token
follows another, in an alphabet of its own. Nothing is fetched; it takes seconds.

    python examples/osrm_before_training.py out    # writes everything into the folder out
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import domerge_fast as dm

LETTERS, LENGTH, BATCH = 32, 16, 16
RULES = {"first": (3, 1), "second": (5, 7), "third": (11, 2)}
"""By task, a and b of x → a x + b in its alphabet; one token in eight is any of it."""
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, STEPS, RATE = 4, 8, 60, 1e-2


def texts(task: str, seed: int) -> Iterator[Tensor]:
    """Batches of token numbers [BATCH, LENGTH], without end."""
    order = random.Random(f"{task} {seed}")
    low, (a, b) = LETTERS * list(RULES).index(task), RULES[task]
    while True:
        rows = []
        for _ in range(BATCH):
            row = [order.randrange(LETTERS)]
            while len(row) < LENGTH:
                new = order.randrange(8) == 0
                row.append(order.randrange(LETTERS) if new else (a * row[-1] + b) % LETTERS)
            rows.append([low + x for x in row])
        yield torch.tensor(rows)


def base() -> LlamaForCausalLM:
    """A model that has learnt which tokens are of one alphabet, and no rule."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LETTERS * len(RULES),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    mixed = [texts(task, 1) for task in RULES]
    shuffled = (next(x)[:, torch.randperm(LENGTH)] for _ in range(STEPS) for x in mixed)
    train(model, shuffled, STEPS * len(RULES))
    return model


def train(model: nn.Module, batches: Iterator[Tensor], steps: int) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        ids = next(batches)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def loss(model: nn.Module, task: str) -> float:
    """In nats a token, of texts that nothing was trained on."""
    batches = list(itertools.islice(texts(task, 2), 8))
    return sum(float(model(input_ids=x, labels=x).loss) for x in batches) / len(batches)


def adapters(model: LlamaForCausalLM, folder: Path, starts: Path | None) -> list[Path]:
    """One a task. starts: the folder with what each starts from; None: PEFT's own values."""
    paths = []
    for task in RULES:
        torch.manual_seed(0)
        own = copy.deepcopy(model)  # PEFT puts adapters into the model that it is given
        if starts:
            adapted = PeftModel.from_pretrained(own, starts / task, is_trainable=True)
        else:
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
            adapted = get_peft_model(own, config)
        train(adapted, texts(task, 3), STEPS)
        adapted.save_pretrained(folder / task)
        paths.append(folder / task)
    return paths


def row(label: str, losses: list[float], kept: float | None = None) -> None:
    cells = "".join(f"{x:10.3f}" for x in losses)
    print(f"{label:32}{cells}" + ("" if kept is None else f"{kept:9.1%}"), flush=True)


def compare(model: LlamaForCausalLM, starts: dict[str, Path | None], folder: Path) -> None:
    """A table of losses: of the base, of the adapters from each start, and of their merges."""
    before = [loss(model, task) for task in RULES]
    print(f"{'loss in nats a token':32}{''.join(task.rjust(10) for task in RULES)}     kept")
    row("base", before)
    for name, path in starts.items():
        paths = adapters(model, folder / name, path)
        own = []
        for task, adapter in zip(RULES, paths):
            own.append(loss(PeftModel.from_pretrained(copy.deepcopy(model), adapter), task))
        dm.merge(paths, output=folder / f"{name}-merged", overwrite=True)
        both = PeftModel.from_pretrained(copy.deepcopy(model), folder / f"{name}-merged")
        merged = [loss(both, task) for task in RULES]
        row(f"from {name}: each alone", own)
        shares = [(b - m) / (b - o) for b, m, o in zip(before, merged, own)]
        row(f"from {name}: merged", merged, sum(shares) / len(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything goes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = base()
    batches = {task: list(itertools.islice(texts(task, 4), 4)) for task in RULES}
    made = dm.osrm_init_all(
        model,
        batches,
        target_modules=LAYERS,
        rank=RANK,
        alpha=ALPHA,
        norm="kaiming",
        output=args.folder / "starts",
        overwrite=True,
    )
    for task, start in made.items():
        print(
            f"{task}: A lets {start.others:.4f} of the others' energy through, of its own ", end=""
        )
        own = [x.own for x in start.modules.values()]
        print(f"{sum(own) / len(own):.3f}; random rows have 1")
    starts = {"PEFT's start": None, "OSRM's start": args.folder / "starts"}
    compare(model, starts, args.folder)


if __name__ == "__main__":
    main()
