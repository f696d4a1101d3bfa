"""Good inputs to damage: adapters of several formats, a base model, a merge that grows by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from support.make import Factors, random_factors, write_adapter, write_mlx

MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.down_proj": (16, 40),
}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILE = "lora.safetensors"
FLAT = {
    "lora_te1_layers_0_q_proj": (24, 16),
    "lora_unet_layers_0_proj_in": (8, 16, 1, 1),
    "lora_unet_layers_1_conv": (8, 4, 3, 3),
    "lora_unet_layers_1_mid": (8, 4, 1, 1),
}
OF_LYCORIS = {
    "lora_unet_layers_2_q": {
        **{"hada_w1_a": (12, 2), "hada_w1_b": (2, 10), "hada_w2_a": (12, 2), "hada_w2_b": (2, 10)}
    },
    "lora_unet_layers_2_k": {"lokr_w1": (2, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8)},
}
"""Names and shapes of the parts of such modules."""
OF_MLX = "adapters.safetensors"
OF_GGUF = "adapter.gguf"
IN_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_down": "mlp.down_proj",
}
TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
STATE = "session.json"
SUM = "session.safetensors"


def adapter(folder: Path, rank: int, seed: int, wide: int = 1) -> Path:
    """A PEFT folder of rank `rank`; every side is `wide` times as long as in MODULES."""
    return write_adapter(
        folder,
        _factors(rank, seed, wide),
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


def lora_file(folder: Path, rank: int, seed: int, wide: int = 1) -> Path:
    """A file of kohya's kind: linear layers and convolutions, one of them with a middle; and
    LyCORIS' kinds of adapters of two layers of other names."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (narrow, short, *kernel) in FLAT.items():
        m, n = narrow * wide, short * wide
        a = _normal(generator, rank, n, *kernel)
        if name.endswith("_mid"):
            tensors[f"{name}.lora_mid.weight"] = _normal(generator, rank, rank, 3, 3)
        tensors[f"{name}.lora_down.weight"] = a
        tensors[f"{name}.lora_up.weight"] = _normal(generator, m, rank, *[1] * len(kernel))
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    for name, shapes in OF_LYCORIS.items():
        tensors |= {f"{name}.{x}": _normal(generator, *size) for x, size in shapes.items()}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / FILE, {"ss_network_dim": str(rank)})
    return folder


def _factors(rank: int, seed: int, wide: int = 1) -> Factors:
    shapes = {name: (m * wide, n * wide) for name, (m, n) in MODULES.items()}
    found = random_factors(shapes, rank, seed=seed)
    return {name: (a / 4, b / 4) for name, (a, b) in found.items()}


def experts(folder: Path, rank: int, seed: int) -> Path:
    """A PEFT folder of three experts in two parameters, and of a module."""
    generator = torch.Generator().manual_seed(seed)
    owner = "model.layers.0.mlp.experts"
    factors = {
        f"{owner}.base_layer": (_normal(generator, 3 * rank, 16), _normal(generator, 20, 3 * rank)),
        owner: (_normal(generator, 3 * rank, 10), _normal(generator, 16, 3 * rank)),
        "model.layers.0.self_attn.q_proj": _factors(rank, seed)["model.layers.0.self_attn.q_proj"],
    }
    return write_adapter(
        folder,
        factors,
        base_model_name_or_path="someone/base",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj"],
        target_parameters=list(TARGETS),
        rank_pattern={},
        alpha_pattern={"down_proj": rank},
        use_rslora=False,
    )


def mlx_adapter(folder: Path) -> Path:
    """An MLX folder of rank 3."""
    return write_mlx(folder, _factors(3, 5), 2.0, model="someone/base", seed=0)


def gguf_adapter(folder: Path) -> Path:
    """A folder with an adapter in GGUF, of rank 3 and scale 2."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / OF_GGUF, "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    for name, (a, b) in _factors(3, 6).items():
        number, _, module = name.removeprefix("model.layers.").partition(".")
        stored = next(k for k, v in IN_GGUF.items() if v == module)
        writer.add_tensor(f"blk.{number}.{stored}.weight.lora_a", a.numpy())
        writer.add_tensor(f"blk.{number}.{stored}.weight.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


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
    if source.is_file():
        return Path(shutil.copyfile(source, target))
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) / 4
