"""Trains four small LoRA adapters with PEFT, merges them, and shows what the merge kept.

A byte-level Llama of 0.4M parameters is trained on four kinds of text from Python's own library,
then one adapter a kind, at uneven learning rates. The adapters are merged with DO-Merging from
the command line, loaded back by PEFT, and compared with the plain sum and mean.

    python examples/demo.py demo
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import domerge_fast as dm
from domerge_fast.cli import main as domerge

TEXTS = {"email": 3e-3, "html": 6e-3, "asyncio": 4e-3, "unittest": 8e-3}
"""A package of the standard library for each adapter, and its learning rate."""
CONTEXT, BATCH = 48, 8


def text_of(package: str) -> torch.Tensor:
    """The source of a standard-library package as bytes."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batches(text: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Random pieces [count, BATCH, CONTEXT]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT, (count, BATCH, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT)]


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def train(model: torch.nn.Module, text: torch.Tensor, steps: int, rate: float) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate)
    for tokens in batches(text, steps, seed=0):
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()


@torch.inference_mode()
def score(model: torch.nn.Module, texts: dict[str, torch.Tensor]) -> list[float]:
    """Mean loss on held-out batches of every text."""
    return [
        sum(float(loss(model, tokens)) for tokens in batches(text, 4, seed=1)) / 4
        for text in texts.values()
    ]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def make_adapters(folder: Path, texts: dict[str, torch.Tensor]) -> tuple[Path, list[Path]]:
    """Train and save the base model and one adapter a text."""
    base = base_model()
    train(base, torch.cat(list(texts.values())), 60, 3e-3)
    base.save_pretrained(folder / "base")
    paths = []
    for name, rate in TEXTS.items():
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        train(adapted, texts[name], 25, rate)
        adapted.save_pretrained(folder / name)
        paths.append(folder / name)
    return folder / "base", paths


def with_adapter(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)


def main() -> None:
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = {name: text_of(name) for name in TEXTS}

    print("1. Training a small base model and four LoRA adapters with PEFT …", flush=True)
    started = time.perf_counter()
    base, adapters = make_adapters(folder, texts)
    print(f"   {time.perf_counter() - started:.0f} s\n")

    sources = [str(path) for path in adapters]
    print(f"2. domerge-fast inspect {' '.join(sources)}\n", flush=True)
    if domerge(["inspect", *sources]):
        sys.exit("inspect failed")

    merged = folder / "merged"
    print(f"\n3. domerge-fast merge {' '.join(sources)} -o {merged}\n", flush=True)
    if domerge(["merge", *sources, "-o", str(merged)]):
        sys.exit("merge failed")

    mean = folder / "mean"
    dm.merge(adapters, method="linear", weights=[1 / len(adapters)] * len(adapters), output=mean)

    print("\n4. Loaded back by PEFT: loss on held-out text (lower is better)\n", flush=True)
    alone = score(LlamaForCausalLM.from_pretrained(base), texts)
    own = [score(with_adapter(base, path), texts)[k] for k, path in enumerate(adapters)]
    rows = [
        ("base model", alone),
        ("each text's own adapter", own),
        ("merged by DO-Merging", score(with_adapter(base, merged), texts)),
        ("merged by the mean", score(with_adapter(base, mean), texts)),
    ]
    print(f"   {'':26}" + "".join(f"{name:>10}" for name in texts))
    for label, values in rows:
        print(f"   {label:26}" + "".join(f"{value:10.3f}" for value in values))
    print(f"\nThe report is in {merged / 'README.md'}")


if __name__ == "__main__":
    main()
