"""A byte-level Llama of 0.4M parameters, trained from scratch on four packages of the standard
library, and an adapter for each: high and uneven rates, so that the updates are a good part of
what they are added to.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from bench import Adapter, Bench
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = {"email": 3e-3, "html": 5e-3, "asyncio": 4e-3, "unittest": 6e-3}
"""A package for each adapter, and its learning rate."""
BASE_STEPS, BASE_RATE, STEPS, BATCH = 120, 3e-3, 80, 8
TOKENS = 48
"""Bytes of an example; all but the first are scored."""
VALIDATION, TEST = 64, 192


def examples(package: str) -> Tensor:
    """Of the package's sources [examples, TOKENS], shuffled: VALIDATION + TEST are held out."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: len(data) // TOKENS * TOKENS]
    found = whole.long().view(-1, TOKENS)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def losses(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean over an example's bytes [examples]."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


def base(folder: Path) -> Path:
    path = folder / "byte-llama"
    if not path.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        learned = torch.cat([examples(package)[VALIDATION + TEST :] for package in TEXTS])
        _fit(model, learned, BASE_STEPS, BASE_RATE, seed=0)
        model.save_pretrained(path)
    return path


def bench(folder: Path) -> Bench:
    held = {package: examples(package)[: VALIDATION + TEST] for package in TEXTS}
    model = LlamaForCausalLM.from_pretrained(base(folder)).eval()
    return Bench(model, lambda changed, package: losses(changed, held[package]), {}, VALIDATION)


def adapters(folder: Path, seed: int) -> list[Adapter]:
    """One a package, trained where they are not there yet."""
    found = []
    for k, (package, rate) in enumerate(TEXTS.items()):
        path = folder / f"byte-llama-{seed}" / package
        found.append(Adapter(package, package, path))
        if not path.exists():
            torch.manual_seed(1000 * seed + k)
            config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
            model = get_peft_model(LlamaForCausalLM.from_pretrained(base(folder)), config)
            _fit(model, examples(package)[VALIDATION + TEST :], STEPS, rate, 1000 * seed + k)
            model.save_pretrained(path)
    return found


def _fit(model: torch.nn.Module, tokens: Tensor, steps: int, rate: float, seed: int) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    for rows in order[: steps * BATCH].split(BATCH):
        optimizer.zero_grad()
        losses(model, tokens[rows]).mean().backward()
        optimizer.step()
