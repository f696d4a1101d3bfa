"""A small model, texts of three tasks that excite it differently, and what its layers are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = [
    *("N", "TARGETS", "TOKENS", "Small", "batches", "energy", "inputs", "moments", "rows", "small"),
    *("texts", "without"),
]

N, TOKENS = 48, 12
TARGETS = ["q_proj", "v_proj", "down"]


class Block(nn.Module):
    """Two layers that share an input, and one that has less directions than inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(N, N), nn.Linear(N, 20)
        self.up, self.down = nn.Linear(20, 8), nn.Linear(8, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q_proj(x) + self.down(self.up(self.v_proj(x)))


class Small(nn.Module):
    def __init__(self, n: int = N) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, n)
        self.layers = nn.ModuleList([Block(), Block()])
        self.experts = nn.ModuleList([nn.Linear(N, 4), nn.Linear(N, 4)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.experts[0](x)


def small() -> Small:
    torch.manual_seed(0)
    made = Small()
    with torch.no_grad():
        made.embed.weight *= torch.logspace(0, -2, N)
    return made.train()


def texts(task: int, count: int = 4, length: int = TOKENS) -> Tensor:
    """Token numbers of a task, which has 30 of its own."""
    generator = torch.Generator().manual_seed(task)
    return torch.randint(30 * task, 30 * task + 30, (count, length), generator=generator)


def batches() -> dict[str, list[Tensor]]:
    return {name: [texts(k), texts(k, 3)] for k, name in enumerate("abc")}


def inputs(model: nn.Module, name: str, given: list[Tensor]) -> Tensor:
    """A layer's inputs [tokens, n], in float64."""
    found: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in given:
            model(batch)
    handle.remove()
    return torch.cat(found).double()


def moments(model: nn.Module, name: str, given: Mapping[str, list[Tensor]]) -> Tensor:
    """Σ H'H / tr over tasks."""
    total = torch.zeros(())
    for own in given.values():
        h = inputs(model, name, own)
        total = total + h.T @ h / (h.T @ h).trace()
    return total


def rows(folder: Path, name: str) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors[f"base_model.model.{name}.lora_A.weight"].double()


def energy(a: Tensor, c: Tensor) -> Tensor:
    return (a @ c @ a.T).trace() / c.trace()


def without(task: str) -> dict[str, list[Tensor]]:
    return {name: own for name, own in batches().items() if name != task}
