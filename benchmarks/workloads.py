"""Adapter sets with real shapes and the statistics of trained adapters, made from a seed.

A is uniform as PEFT initialises it (Kaiming), B is normal and an order smaller, and the adapters'
magnitudes spread over a factor of 6, as those of adapters trained at different rates do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

MAGNITUDE_SPREAD = 6.0


@dataclass(frozen=True)
class Workload:
    """T adapters of one rank on modules given as (name, m, n)."""

    name: str
    why: str
    modules: tuple[tuple[str, int, int], ...]
    adapters: int
    rank: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def factor_bytes(self) -> int:
        per_rank = sum(m + n for _, m, n in self.modules)
        return self.adapters * self.rank * per_rank * self.dtype.itemsize

    def write(self, folder: Path, seed: int = 0) -> list[Path]:
        """The PEFT folders, made unless they are there already."""
        paths = [folder / self.name / f"adapter-{i}" for i in range(self.adapters)]
        for i, path in enumerate(paths):
            if not (path / "adapter_config.json").exists():
                self._write_adapter(path, i, torch.Generator().manual_seed(seed * 10_000 + i))
        return paths

    def _write_adapter(self, path: Path, index: int, generator: torch.Generator) -> None:
        path.mkdir(parents=True, exist_ok=True)
        share = index / max(1, self.adapters - 1)
        size = 0.1 * MAGNITUDE_SPREAD ** (share - 1)
        tensors = dict(self._factors(size, generator))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": f"synthetic/{self.name}",
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": sorted({name.rpartition(".")[2] for name, _, _ in self.modules}),
            "bias": "none",
            "inference_mode": True,
        }
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2))

    def _factors(
        self, size: float, generator: torch.Generator
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, m, n in self.modules:
            key = f"base_model.model.{name}.lora_"
            bound = n**-0.5
            a = torch.empty(self.rank, n).uniform_(-bound, bound, generator=generator)
            b = torch.empty(m, self.rank).normal_(0, size * bound, generator=generator)
            yield f"{key}A.weight", a.to(self.dtype)
            yield f"{key}B.weight", b.to(self.dtype)


def _llama(layers: int, hidden: int, key_value: int, feed_forward: int) -> Iterator:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    for layer in range(layers):
        for name, (m, n) in shapes.items():
            yield f"model.layers.{layer}.{name}", m, n


WORKLOADS = {
    w.name: w
    for w in (
        Workload("llama3-8b-8", "the everyday case", tuple(_llama(32, 4096, 1024, 14336)), 8, 16),
        Workload(
            "llama-tiny", "for tests and the quick mode", tuple(_llama(2, 256, 64, 768)), 4, 8
        ),
    )
}
