"""LoRA files of one kind or another, and what their readers make of them, by their rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]
KOHYA = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (24, 10),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (12, 10, 1, 1),
    "lora_unet_input_blocks_1_0_in_layers_2": (12, 6, 3, 3),
    "lora_unet_mid_block_attentions_0_ff_net_2": (10, 24),
}
"""Shapes of weights, by module."""
DIFFUSERS = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (10, 10),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (12, 10),
    "unet.down_blocks.0.resnets.0.conv1": (12, 6, 3, 3),
}
COMFYUI = {
    "diffusion_model.blocks.0.self_attn.q": (12, 10),
    "diffusion_model.double_blocks.1.img_attn.qkv": (36, 12),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (24, 10),
}
BARE = {"double_blocks.0.img_attn.qkv": (36, 12), "img_in": (12, 6)}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (36, 12),
    "single_blocks.3.processor.proj_lora": (12, 48),
}
STYLES: dict[str, tuple[str, dict[str, Shape], str, str, bool]] = {
    "kohya": ("kohya", KOHYA, ".lora_down.weight", ".lora_up.weight", True),
    "kohya without alpha": ("kohya", KOHYA, ".lora_down.weight", ".lora_up.weight", False),
    "diffusers": ("diffusers", DIFFUSERS, ".lora_A.weight", ".lora_B.weight", False),
    "diffusers with alpha": ("diffusers", DIFFUSERS, ".lora_A.weight", ".lora_B.weight", True),
    "diffusers, lora.down": ("diffusers", DIFFUSERS, ".lora.down.weight", ".lora.up.weight", False),
    "comfyui": ("comfyui", COMFYUI, ".lora_A.weight", ".lora_B.weight", False),
    "comfyui with alpha": ("comfyui", COMFYUI, ".lora_A.weight", ".lora_B.weight", True),
    "comfyui, lora_down": ("comfyui", COMFYUI, ".lora_down.weight", ".lora_up.weight", True),
    "bare": ("bare", BARE, ".lora_A.weight", ".lora_B.weight", False),
    "mochi": ("bare", BARE, ".lora_A", ".lora_B", False),
    "xlabs": ("xlabs", XLABS, ".down.weight", ".up.weight", False),
}
"""By name: the format, modules, the endings of A and B, and whether there are alphas."""


def file_of(
    path: Path,
    style: str,
    rank: int,
    alpha: float = 3.0,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random file of a style."""
    _, shapes, down, up, has_alpha = STYLES[style]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (m, n, *kernel) in shapes.items():
        a = torch.randn(rank, n, *kernel, generator=generator)
        b = torch.randn(m, rank, *[1] * len(kernel), generator=generator)
        tensors |= {module + down: a.to(dtype), module + up: b.to(dtype)}
        if has_alpha:
            tensors[f"{module}.alpha"] = torch.tensor(alpha, dtype=dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=dict(metadata or {"format": "pt"}))
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def comfyui(path: Path, style: str) -> dict[str, Tensor]:
    """ΔW as ComfyUI takes them: alpha, if there is one, over the rows of A; B and A as matrices,
    `lora_mid` between them; in the shape of the weight."""
    tensors, found = tensors_of(path), {}
    _, shapes, down, up, _ = STYLES[style]
    for module, shape in shapes.items():
        if module + down not in tensors:
            continue
        a, b = (tensors.pop(module + end).double() for end in (down, up))
        alpha = tensors.pop(f"{module}.alpha", torch.tensor(a.shape[0])).item()
        scale = alpha / a.shape[0]
        update = b.flatten(1) @ a.flatten(1)
        if (mid := tensors.pop(f"{module}.lora_mid.weight", None)) is not None:
            sides = b.flatten(1), mid.double(), a.flatten(1)
            update = torch.einsum("im,mnxy,nj->ijxy", *sides)
        found[module] = (scale * update).reshape(shape)
    assert not tensors, f"not loaded: {[*tensors]}"
    return found


def sd_scripts(path: Path) -> dict[str, Tensor]:
    """ΔW as sd-scripts merges a file of kohya's kind into a model."""
    tensors, found = tensors_of(path), {}
    for module, shape in KOHYA.items():
        a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("down", "up"))
        alpha = tensors.get(f"{module}.alpha")
        scale = (len(a) if alpha is None else float(alpha)) / len(a)
        if len(shape) == 2:
            found[module] = scale * (b @ a)
        elif shape[2:] == (1, 1):
            update = (b.squeeze(3).squeeze(2) @ a.squeeze(3).squeeze(2))[:, :, None, None]
            found[module] = scale * update
        else:
            update = torch.nn.functional.conv2d(a.permute(1, 0, 2, 3), b).permute(1, 0, 2, 3)
            found[module] = scale * update
    return found
