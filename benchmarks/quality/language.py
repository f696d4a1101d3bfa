"""A small byte-level Llama and eight LoRA adapters of it, trained with PEFT, uneven as real ones.

Every training (a seed) draws its own data order, LoRA initialisation and which adapter is trained
how hard; the base model is the same. Folders that exist already are not made again, and sets
share the adapters that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from merges import Adapter
from peft import LoraConfig, PeftModel, get_peft_model
from score import Bench
from text import DOMAINS, read, windows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 128, 16
HELD_OUT = 16
"""Windows of every domain that merges are scored on."""
BASE_STEPS, BASE_RATE = 700, 2e-3
RANK = 8
EFFORTS = tuple((steps, rate) for steps in (30, 60, 120, 240) for rate in (1e-3, 4e-3))
"""Steps and learning rate of the adapters, handed out anew for every training."""
SHORT = EFFORTS[:4]
"""Of adapters that come on top of those that another set has trained."""
EVEN = (40, 4e-3)


@dataclass(frozen=True)
class Lesson:
    """An adapter to train, in which folder: on which domain, how hard, from which seeds, on top of
    which other."""

    folder: str
    label: str
    domain: str
    steps: int
    rate: float
    order_seed: int
    first_a_seed: int
    after: str | None = None


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
        fit(model, [read(domain, folder)[0] for domain in DOMAINS], BASE_STEPS, BASE_RATE, seed=0)
        model.save_pretrained(path)
    return path


def bench(folder: Path) -> Bench:
    """The base with held-out windows of every domain."""
    generator = torch.Generator().manual_seed(0)
    held = {
        domain: windows(read(domain, folder)[1], HELD_OUT, LENGTH, generator) for domain in DOMAINS
    }
    return Bench(LlamaForCausalLM.from_pretrained(base(folder)), held, loss)


def apart(seed: int) -> list[Lesson]:
    """One adapter a domain, each with an A of its own."""
    order = torch.randperm(len(EFFORTS), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Lesson(
            f"seed-{seed}/{domain}",
            domain,
            domain,
            *EFFORTS[order[k]],
            1000 * seed + k + 1,
            1000 * seed + k,
        )
        for k, domain in enumerate(DOMAINS)
    ]


def shared_a(seed: int) -> list[Lesson]:
    """The same, all starting from one A."""
    return [
        replace(x, folder=f"shared-{seed}/{x.domain}", first_a_seed=1000 * seed)
        for x in apart(seed)
    ]


def one_from_another(seed: int) -> list[Lesson]:
    """Four adapters, and four that continue each of them on another domain."""
    parents, others = _halves(seed)
    children = [
        replace(
            other,
            folder=f"continued-{seed}/{other.domain}",
            label=f"{other.domain} after {parent.domain}",
            steps=steps,
            rate=rate,
            after=parent.folder,
        )
        for parent, other, (steps, rate) in zip(parents, others, _short(seed))
    ]
    return [*parents, *children]


def related(seed: int) -> list[Lesson]:
    """Four domains, two adapters each: two efforts, two data orders, two first As."""
    firsts, others = _halves(seed)
    again = [
        replace(
            other,
            folder=f"again-{seed}/{first.domain}",
            label=f"{first.domain} again",
            domain=first.domain,
            steps=steps,
            rate=rate,
        )
        for first, other, (steps, rate) in zip(firsts, others, _short(seed))
    ]
    return [*firsts, *again]


def even(seed: int) -> list[Lesson]:
    """One adapter a domain, all trained alike."""
    steps, rate = EVEN
    return [
        replace(x, folder=f"even-{seed}/{x.domain}", steps=steps, rate=rate) for x in apart(seed)
    ]


def _halves(seed: int) -> tuple[list[Lesson], list[Lesson]]:
    lessons = apart(seed)
    return lessons[:4], lessons[4:]


def _short(seed: int) -> list[tuple[int, float]]:
    order = torch.randperm(len(SHORT), generator=torch.Generator().manual_seed(seed)).tolist()
    return [SHORT[k] for k in order]


def adapters(lessons: Callable[[int], list[Lesson]]) -> Callable[[Path, int], list[Adapter]]:
    """A function of a folder and a seed that trains the lessons which are not there yet."""

    def trained(folder: Path, seed: int) -> list[Adapter]:
        for lesson in lessons(seed):
            if not (folder / lesson.folder).exists():
                _train(folder, lesson)
        return [Adapter(x.label, x.domain, folder / x.folder) for x in lessons(seed)]

    return trained


def _train(folder: Path, lesson: Lesson) -> None:
    model = LlamaForCausalLM.from_pretrained(base(folder))
    torch.manual_seed(lesson.first_a_seed)
    if lesson.after:
        adapted = PeftModel.from_pretrained(model, folder / lesson.after, is_trainable=True)
    else:
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
    fit(
        adapted, [read(lesson.domain, folder)[0]], lesson.steps, lesson.rate, seed=lesson.order_seed
    )
    adapted.save_pretrained(folder / lesson.folder)
