"""The runtimes, with what each demands. None of them is run here: the demands are rules read in
their sources, of the versions named. A new runtime is a row."""

from __future__ import annotations

from .runtime import Runtime, Together

__all__ = ["ROWS"]

_LAYERS = ("linear", "embedding")
_IMAGES = ("linear", "conv1d", "conv2d", "conv3d")

VLLM = Runtime(
    "vllm",
    "vLLM 0.33",
    "vllm/lora/peft_helper.py, lora_model.py, utils.py, config/lora.py of the wheel 0.33.0",
    ("peft",),
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    flag="--max-lora-rank",
    stated=("r", "lora_alpha", "target_modules"),
    whole=("classifier", "score"),
    kinds=_LAYERS,
    largest_head=258048,
    replicated=False,
    together=(
        *(
            Together(names, names, "takes experts with all of them", owners=owners)
            for names, owners in (
                (("gate_up_proj", "down_proj"), r".*\.experts"),
                (("gate_proj", "up_proj", "down_proj"), r".*\.experts\.\d+"),
                (("w1", "w2", "w3"), r".*\.experts\.\d+"),
            )
        ),
    ),
    told=True,
)
SGLANG = Runtime(
    "sglang",
    "SGLang 0.5.23",
    "sglang/srt/lora/lora.py, lora_config.py, mem_pool.py, utils.py of the wheel 0.5.23",
    ("peft",),
    stated=("r", "lora_alpha", "target_modules"),
    one_rank=True,
    scale="lora_alpha / r",
    listed=True,
    whole=(),
    kinds=_LAYERS,
    experts=False,
    replicated=False,
    together=(
        Together(
            ("q_proj", "k_proj", "v_proj"),
            ("q_proj", "v_proj"),
            "joins q, k and v and needs q and v",
            filled=True,
        ),
    ),
    told=True,
)
LLAMA_CPP = Runtime(
    "llama.cpp",
    "llama.cpp",
    "convert_lora_to_gguf.py at 0b03adaa, src/llama-adapter.h at 215841fc",
    ("peft", "gguf"),
    stated=("lora_alpha",),
    scale="lora_alpha / own rank",
    whole=(),
    kinds=_LAYERS,
    experts=False,
    replicated=False,
    told=True,
)
TRTLLM = Runtime(
    "trtllm",
    "TensorRT-LLM",
    "tensorrt_llm/lora_manager.py at 007e181b",
    ("peft",),
    flag="max_lora_rank",
    stated=("r", "lora_alpha"),
    scale="lora_alpha / own rank, rsLoRA",
    whole=("embed_tokens", "lm_head"),
    kinds=("linear",),
    experts=False,
    others=("DoRA",),
    numbered=True,
    replicated=False,
    told=True,
)
MLX = Runtime(
    "mlx",
    "mlx-lm 0.32",
    "mlx_lm/tuner/utils.py of the wheel 0.32.2",
    ("mlx",),
    one_rank=True,
    whole=(),
    kinds=_LAYERS,
    experts=False,
    replicated=False,
)
COMFYUI = Runtime(
    "comfyui",
    "ComfyUI",
    "comfy/lora.py, lora_convert.py, weight_adapter/ at a125cd84",
    ("comfyui", "kohya", "diffusers"),
    skips=True,
    others=("LoHa", "LoKr", "diff"),
    changes=True,
    whole=(),
    kinds=_IMAGES,
    experts=False,
    replicated=False,
)
DIFFUSERS = Runtime(
    "diffusers",
    "diffusers 0.42",
    "diffusers/loaders/, utils/peft_utils.py of the wheel 0.42.1",
    ("diffusers",),
    whole=(),
    kinds=_IMAGES,
    experts=False,
    replicated=False,
)
KOHYA = Runtime(
    "kohya",
    "kohya's sd-scripts",
    "networks/lora.py, lora_flux.py at 48d368f",
    ("kohya",),
    whole=(),
    kinds=_IMAGES,
    experts=False,
    replicated=False,
)
PEFT = Runtime(
    "peft",
    "PEFT 0.21",
    "peft/tuners/lora of the wheel 0.21.2",
    ("peft",),
    changes=True,
    others=("DoRA",),
)

ROWS = (VLLM, SGLANG, LLAMA_CPP, TRTLLM, MLX, COMFYUI, DIFFUSERS, KOHYA, PEFT)
