"""Small PEFT folders, written without PEFT, for tests that need full control of what is in them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
PREFIX = "base_model.model."
PAIR = {f"layers.{i}.q_proj": (40, 48) for i in range(4)} | {"layers.0.up_proj": (64, 40)}
"""Modules of `write_pair`."""


def random_factors(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """A [rank, n] and B [m, rank] for every module name -> (m, n)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, n, generator=generator).to(dtype),
            torch.randn(m, rank, generator=generator).to(dtype),
        )
        for name, (m, n) in shapes.items()
    }


def lora_tensors(
    factors: Factors, *, embeddings: Collection[str] = (), prefix: str = PREFIX
) -> dict[str, torch.Tensor]:
    """Factors under the keys PEFT writes."""
    tensors = {}
    for name, (a, b) in factors.items():
        part = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
        tensors[f"{prefix}{name}.{part.format('A')}"] = a
        tensors[f"{prefix}{name}.{part.format('B')}"] = b
    return tensors


def write_folder(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Path:
    """A PEFT folder of exactly these tensors and this config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(
    folder: Path,
    factors: Factors,
    *,
    carried: Mapping[str, torch.Tensor] | None = None,
    embeddings: Collection[str] = (),
    **config: Any,
) -> Path:
    """A PEFT folder of factors; r and lora_alpha are the first module's rank unless given.

    ``carried`` maps names without prefix ("score.weight") to tensors saved whole.
    """
    rank = next(iter(factors.values()))[0].shape[0]
    tensors = lora_tensors(factors, embeddings=embeddings)
    tensors |= {PREFIX + name: tensor for name, tensor in (carried or {}).items()}
    defaults = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(factors),
    }
    return write_folder(folder, tensors, defaults | config)


def write_pair(folder: Path, **config: Any) -> list[Path]:
    """Adapters "a" and "b" of different ranks; "b" lacks a module."""
    partial = {name: shape for name, shape in PAIR.items() if name != "layers.1.q_proj"}
    return [
        write_adapter(folder / "a", random_factors(PAIR, 12, seed=1), **config),
        write_adapter(folder / "b", random_factors(partial, 8, seed=2), **config),
    ]


def write_mlx(folder: Path, factors: Factors, scale: float = 1.0, **config: Any) -> Path:
    """An MLX folder of factors, all of one rank, as mlx-lm saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.lora_a": a.T.contiguous() for name, (a, _) in factors.items()}
    tensors |= {f"{name}.lora_b": b.T.contiguous() for name, (_, b) in factors.items()}
    save_file(tensors, folder / "adapters.safetensors")
    rank = next(iter(factors.values()))[0].shape[0]
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    defaults = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    return folder
