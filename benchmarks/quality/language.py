"""A small byte-level Llama and eight LoRA adapters of it, trained with PEFT, uneven as real ones.

Every training (a seed) draws its own data order, LoRA initialisation and which adapter is trained
how hard; the base model is the same. Folders that exist already are not made again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from score import Bench
from text import DOMAINS, read, windows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 128, 16
BASE_STEPS, BASE_RATE = 700, 2e-3
RANK = 8
EFFORTS = tuple((steps, rate) for steps in (30, 60, 120, 240) for rate in (1e-3, 4e-3))
"""Steps and learning rate of the adapters, handed out anew for every training."""


def new_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def loss(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    return model(input_ids=tokens, labels=tokens).loss


def fit(model: torch.nn.Module, texts: list[Tensor], steps: int, rate: float, seed: int) -> None:
    """AdamW with a short warm-up and a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, (steps - k) / (steps - warm))
    )
    for _ in range(steps):
        share = BATCH // len(texts)
        tokens = torch.cat([windows(text, share, LENGTH, generator) for text in texts])
        optimizer.zero_grad(set_to_none=True)
        loss(model, tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()


def base(folder: Path) -> Path:
    """The base model's folder."""
    path = folder / "base"
    if not path.exists():
        model = new_base()
        fit(model, [read(domain)[0] for domain in DOMAINS], BASE_STEPS, BASE_RATE, seed=0)
        model.save_pretrained(path)
    return path


def bench(folder: Path) -> Bench:
    """The base with held-out windows of every domain."""
    generator = torch.Generator().manual_seed(0)
    held = {domain: windows(read(domain)[1], 16, LENGTH, generator) for domain in DOMAINS}
    return Bench(LlamaForCausalLM.from_pretrained(base(folder)), held, loss)


def efforts(seed: int) -> dict[str, tuple[int, float]]:
    """Steps and rate of each domain's adapter in one training."""
    order = torch.randperm(len(EFFORTS), generator=torch.Generator().manual_seed(seed)).tolist()
    return {domain: EFFORTS[k] for domain, k in zip(DOMAINS, order, strict=True)}


def adapters(folder: Path, seed: int, shared_a: bool = False) -> dict[str, Path]:
    """The PEFT folder of each domain's adapter. shared_a: all start from the same A."""
    found = {}
    for k, (domain, (steps, rate)) in enumerate(efforts(seed).items()):
        path = folder / f"{'shared' if shared_a else 'seed'}-{seed}" / domain
        found[domain] = path
        if path.exists():
            continue
        model = LlamaForCausalLM.from_pretrained(base(folder))
        torch.manual_seed(1000 * seed + (0 if shared_a else k))
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
        fit(adapted, [read(domain)[0]], steps, rate, seed=1000 * seed + k + 1)
        adapted.save_pretrained(path)
    return found
