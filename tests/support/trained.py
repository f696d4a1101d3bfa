"""Adapters that PEFT saves, with every parameter moved away from where it began."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import torch
from torch import nn

__all__ = ["trained"]


def trained(model: nn.Module, seed: int, folder: Path, **settings: object) -> Path:
    """An adapter of a copy of the model, of rank 3 and alpha 6 unless settings say otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6} | settings)
        made = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in made.parameters():
            if x.requires_grad:
                x.add_(0.1 * torch.randn(x.shape, generator=generator))
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder
