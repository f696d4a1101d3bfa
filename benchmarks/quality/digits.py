"""A small vision transformer on scikit-learn's digits, and an adapter for each way to distort them.

The guard against defaults that suit language alone: other data, another loss, other norms.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from bench import Adapter, Bench
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

RANK = 8
BATCH = 64
BASE_STEPS, BASE_RATE = 600, 2e-3
EFFORTS = tuple((steps, rate) for steps in (60, 120, 240, 480) for rate in (1e-3, 3e-3))
HELD_OUT, VALIDATION = 400, 100
_PERMUTATION = torch.randperm(64, generator=torch.Generator().manual_seed(7))

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "quarter turn": lambda x: x.rot90(1, (2, 3)),
    "half turn": lambda x: x.rot90(2, (2, 3)),
    "three quarters": lambda x: x.rot90(3, (2, 3)),
    "mirror": lambda x: x.flip(3),
    "transpose": lambda x: x.transpose(2, 3),
    "negative": lambda x: 1 - x,
    "shift": lambda x: x.roll((3, 3), (2, 3)),
    "permutation": lambda x: x.flatten(1)[:, _PERMUTATION].view_as(x),
}


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] between 0 and 1, and labels [1797]."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(data.target)[order]


def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels)


def fit(
    model: torch.nn.Module, change: Callable[[Tensor], Tensor], steps: int, rate: float, seed: int
) -> None:
    images, labels = (x[HELD_OUT:] for x in digits())
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss(model, (change(images[chosen]), labels[chosen])).backward()
        optimizer.step()
        schedule.step()


def new_base() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def base(folder: Path) -> Path:
    path = folder / "digits-base"
    if not path.exists():
        model = new_base()
        fit(model, lambda x: x, BASE_STEPS, BASE_RATE, seed=0)
        model.save_pretrained(path)
    return path


def bench(folder: Path) -> Bench:
    """The base with held-out images, distorted as in every task."""
    images, labels = (x[:HELD_OUT] for x in digits())

    def outputs(model: torch.nn.Module, task: str) -> Tensor:
        return model(pixel_values=TASKS[task](images)).logits

    model = ViTForImageClassification.from_pretrained(base(folder)).eval()
    return Bench(model, outputs, dict.fromkeys(TASKS, labels), VALIDATION)


def adapters(folder: Path, seed: int) -> list[Adapter]:
    """An adapter a task; efforts are handed out anew for every seed."""
    order = torch.randperm(len(EFFORTS), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for k, (task, change) in enumerate(TASKS.items()):
        path = folder / f"digits-{seed}" / task.replace(" ", "-")
        found.append(Adapter(task, task, path))
        if path.exists():
            continue
        model = ViTForImageClassification.from_pretrained(base(folder))
        torch.manual_seed(1000 * seed + k)
        linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        targets = [n for n in linear if n != "classifier"]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        adapted = get_peft_model(model, config)
        fit(adapted, change, *EFFORTS[order[k]], seed=1000 * seed + k + 1)
        adapted.save_pretrained(path)
    return found
