"""Good inputs to damage: two adapters, a base model, a merge that grows by one adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.make import random_factors, write_adapter

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.down_proj": (16, 40),
}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
STATE = "sequential.json"
SUM = "running_sum.safetensors"


def adapter(folder: Path, rank: int, seed: int, wide: int = 1) -> Path:
    """A PEFT folder of rank `rank`; every side is `wide` times as long as in MODULES."""
    shapes = {name: (m * wide, n * wide) for name, (m, n) in MODULES.items()}
    factors = random_factors(shapes, rank, seed=seed)
    return write_adapter(
        folder,
        {name: (a / 4, b / 4) for name, (a, b) in factors.items()},
        task_type="CAUSAL_LM",
        base_model_name_or_path="someone/base",
        lora_alpha=2 * rank,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={},
        alpha_pattern={"v_proj": rank},
        layers_to_transform=None,
        modules_to_save=None,
        use_rslora=False,
        inference_mode=True,
    )


def base_model(folder: Path, wide: int = 1) -> Path:
    """A model folder in two shards, with a tokenizer file beside them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(9)
    tensors = {
        f"{name}.weight": _normal(generator, m * wide, n * wide) for name, (m, n) in MODULES.items()
    }
    tensors["model.embed_tokens.weight"] = _normal(generator, 32, 16 * wide)
    tensors["lm_head.weight"] = _normal(generator, 32, 16 * wide)
    where = {}
    for number, keys in enumerate((sorted(tensors)[:3], sorted(tensors)[3:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(keys, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "vocab_size": 32, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def copy(source: Path, target: Path) -> Path:
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) / 4
