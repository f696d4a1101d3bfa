"""Writes domerge_fast/formats/names/*.txt: what the modules of image and video models are called.

A model's first code and diffusers have names of their own for the same weights, and cut them into
modules otherwise. The names of the first code stand below. Which of diffusers' modules has which of
their rows comes out of diffusers' converters of checkpoints: they are given weights whose entries
say where they are from, and every layer of diffusers' model has to be made of them.

    python tools/name_tables.py [FOLDER]   # needs diffusers; writes the tables
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "domerge_fast/formats/names"
WIDTH = 3072
"""Inputs of a block, which converters have as a constant."""
BLOCKS = 13
"""So many that the numbers of the last two stand nowhere else in a name."""

Row = tuple[str, str]
"""An original name, and diffusers' names of its parts with their shares."""

FLUX = """
{img,txt}_in {time,vector,guidance}_in.{in,out}_layer
double_blocks.#.{img,txt}_{attn.qkv*3,attn.proj*1,mod.lin*6,mlp.0*4,mlp.2*1/4}
single_blocks.#.{linear1*7,linear2*1/5,modulation.lin*3}
final_layer.{linear,adaLN_modulation.1*2}
"""
CHROMA = "distilled_guidance_layer.{{in,out}_proj,layers.#.{in,out}_layer}"
FLUX2 = """
{img,txt}_in {time,guidance}_in.{in,out}_layer
double_stream_modulation_{img,txt}.lin single_stream_modulation.lin
double_blocks.#.{img,txt}_{attn.qkv*3,attn.proj*1,mlp.0*6,mlp.2*1/3}
single_blocks.#.{linear1*9,linear2*1/4}
final_layer.{linear,adaLN_modulation.1*2}
"""
Z_IMAGE = """
x_embedder cap_embedder.1 t_embedder.mlp.{0,2} final_layer.{linear,adaLN_modulation.1}
{layers,noise_refiner,context_refiner}.#.attention.{qkv*3,out}
{layers,noise_refiner,context_refiner}.#.feed_forward.w{1,2,3}
{layers,noise_refiner}.#.adaLN_modulation.0
"""
SD3 = """
x_embedder.proj context_embedder {t,y}_embedder.mlp.{0,2}
joint_blocks.#.{x,context}_block.{attn.qkv*3,attn.proj,mlp.fc1,mlp.fc2}
joint_blocks.#.x_block.{attn2.qkv*3,attn2.proj,adaLN_modulation.1}
joint_blocks.#.context_block.adaLN_modulation.1*6|2
final_layer.{linear,adaLN_modulation.1*2}
"""
HUNYUAN = """
img_in.proj vector_in.{in,out}_layer {time,guidance}_in.mlp.{0,2}
txt_in.{input_embedder,t_embedder.mlp.0,t_embedder.mlp.2,c_embedder.linear_1,c_embedder.linear_2}
txt_in.individual_token_refiner.blocks.#.self_attn_{qkv*3,proj}
txt_in.individual_token_refiner.blocks.#.{mlp.fc1,mlp.fc2,adaLN_modulation.1}
double_blocks.#.{img,txt}_{attn_qkv*3,attn_proj,mod.linear,mlp.fc1,mlp.fc2}
single_blocks.#.{linear1*7,linear2*1/5,modulation.linear}
final_layer.{linear,adaLN_modulation.1*2}
"""
WAN = """
patch_embedding {text,time}_embedding.{0,2} time_projection.1 img_emb.proj.{1,3} head.head
blocks.#.{self,cross}_attn.{q,k,v,o} blocks.#.cross_attn.{k,v}_img blocks.#.ffn.{0,2}
vace_patch_embedding vace_blocks.#.{before,after}_proj
vace_blocks.#.{self,cross}_attn.{q,k,v,o} vace_blocks.#.cross_attn.{k,v}_img vace_blocks.#.ffn.{0,2}
"""


def spelled_out(text: str) -> dict[str, list[Fraction]]:
    """The names of a text without its braces, and of how many times as many rows as it has inputs
    a layer may be, where that is said (``*6|2``)."""
    found = {}
    for word in (word for pattern in text.split() for word in _choices(pattern)):
        name, _, ratios = word.partition("*")
        found[name] = [Fraction(ratio) for ratio in ratios.split("|") if ratio]
    return found


def _choices(pattern: str) -> Iterator[str]:
    if brace := re.search(r"\{([^{}]*)\}", pattern):
        for choice in brace[1].split(","):
            yield from _choices(pattern[: brace.start()] + choice + pattern[brace.end() :])
    else:
        yield pattern


class Marked(dict[str, Tensor]):
    """A checkpoint whose weights' entries are numbers of their own; whatever is no layer (a bias,
    a norm) is made when a converter asks for it."""

    def __init__(self, rows: Mapping[str, int]) -> None:
        self.starts: dict[int, str] = {}
        self.sizes = rows
        start = 0
        for name, count in rows.items():
            self[f"{name}.weight"] = torch.arange(start, start + count)[:, None]
            self.starts[start] = name
            start += count

    def pop(self, key: str, *default: Any) -> Any:
        if key in self or default:
            return super().pop(key, *default)
        if key.endswith((".bias", ".scale", "pos_embed")):
            return torch.full((self.sizes.get(key.removesuffix(".bias"), 1), 1), -1)
        raise KeyError(key)

    def origin(self, entry: int) -> tuple[str, int]:
        """The weight that an entry is of, and its row."""
        start = max(start for start in self.starts if start <= entry)
        return self.starts[start], entry - start


def rows_of(text: str, convert: Callable[[Marked], Mapping[str, Tensor]]) -> list[Row]:
    """The rows of a table from a model's names and diffusers' converter of it."""
    layers = spelled_out(text)
    sizes = {
        name.replace("#", str(k)): _size(ratios, k)
        for name, ratios in layers.items()
        for k in range(BLOCKS if "#" in name else 1)
    }
    marked = Marked(sizes)
    made = convert(marked)
    found: dict[str, list[tuple[int, str, str]]] = {}
    for key, tensor in made.items():
        if key.endswith(".weight") and tensor.ndim == 2 and tensor[0, 0] >= 0:
            module = key.removesuffix(".weight")
            name, row, swapped = _place(tensor[:, 0].tolist(), marked)
            found.setdefault(name, []).append(
                (row, module, f"*{Fraction(len(tensor), WIDTH)}{swapped}")
            )
    rows = {}
    for name, ratios in layers.items():
        for k, ratio in zip((BLOCKS - 2, BLOCKS - 1), ratios or [None]):
            parts = sorted(found.get(name.replace("#", str(k)), ()))
            shares = [_template(module, k) + (share if ratio else "") for _, module, share in parts]
            if len(parts) == 1 and ratio and not shares[0].endswith("~"):
                shares = [f"{_template(parts[0][1], k)}*{ratio}"]
            if parts:
                rows[name, " ".join(shares)] = None
    return list(rows)


def _size(ratios: list[Fraction], block: int) -> int:
    """Rows of a marked weight: whole where parts of it may be told apart; the last block may differ
    from the others."""
    ratio = ratios[-1 if block == BLOCKS - 1 else 0] if ratios else Fraction(1)
    return int(ratio * WIDTH) if ratio.denominator == 1 and ratio else WIDTH


def _place(entries: list[int], marked: Marked) -> tuple[str, int, str]:
    """The original weight of these rows, the first of them there, and "~" if halves are swapped."""
    half, swapped = len(entries) // 2, ""
    if entries[0] > entries[-1]:
        entries, swapped = entries[half:] + entries[:half], "~"
    assert entries == [*range(entries[0], entries[0] + len(entries))]
    return *marked.origin(entries[0]), swapped


def _template(module: str, block: int) -> str:
    return ".".join("#" if part == str(block) else part for part in module.split("."))


def rows_of_unet(model: nn.Module) -> list[Row]:
    """Of a UNet of latent diffusion: the numbers of its blocks follow from diffusers', and
    diffusers' converter has to find them so."""
    per_block = model.config["layers_per_block"] + 1
    up = {name for name in layers_of(model) if "attentions" in name}
    rows = {_ldm(name, per_block, up): name for name in layers_of(model)}
    prefix = converters.LDM_UNET_KEY
    keys = {f"{prefix}{name}.{what}" for name in rows for what in ("weight", "bias")}
    made = converters.convert_ldm_unet_checkpoint({key: key for key in keys}, dict(model.config))
    for original, name in rows.items():
        assert made[f"{name}.weight"] == f"{prefix}{original}.weight", name
    inner = re.compile(r"(transformer_blocks)\.\d+\.")
    short = ((inner.sub(r"\1.#.", a), inner.sub(r"\1.#.", b)) for a, b in rows.items())
    return list(dict.fromkeys(short))


_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def _ldm(name: str, per_block: int, attentions: set[str]) -> str:
    """The name of a UNet's layer in the first code: its blocks are in one list."""
    if name in _AROUND:
        return _AROUND[name]
    part, _, rest = name.partition(".")
    if part == "mid_block":
        kind, k, inner = rest.split(".", 2)
        if kind == "attentions":
            return f"middle_block.1.{inner}"
        return f"middle_block.{2 * int(k)}.{_IN_RESNET[inner]}"
    block, kind, k, inner = rest.split(".", 3)
    first = int(block) * per_block
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block}.0.op"
    if kind == "upsamplers":
        has_attention = any(x.startswith(f"up_blocks.{block}.attentions") for x in attentions)
        return f"output_blocks.{first + per_block - 1}.{1 + has_attention}.conv"
    place = (
        f"input_blocks.{first + int(k) + 1}"
        if part == "down_blocks"
        else f"output_blocks.{first + int(k)}"
    )
    return f"{place}.1.{inner}" if kind == "attentions" else f"{place}.0.{_IN_RESNET[inner]}"


def layers_of(*models: nn.Module) -> list[str]:
    """The modules of models that a LoRA may adapt."""
    kinds = nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding
    names = (n for model in models for n, x in model.named_modules() if isinstance(x, kinds))
    return list(dict.fromkeys(names))


def check(rows: Iterable[Row], *models: nn.Module) -> None:
    """AssertionError unless the rows have each layer of the models, and nothing else."""
    parts = {re.sub(r"\*.*", "", part) for _, right in rows for part in right.split()}
    patterns = [re.compile(re.escape(p).replace(r"\#", r"\d+")) for p in parts]
    used = set()
    for name in layers_of(*models):
        found = [p for p in patterns if p.fullmatch(name)]
        assert len(found) == 1, (name, found)
        used.add(found[0])
    assert len(used) == len(patterns), {p.pattern for p in patterns} - {p.pattern for p in used}


def table(name: str, title: str, left: str, rows: Iterable[Row], folder: Path) -> None:
    """Write a file of rows; where both names are the same it stands once."""
    head = f"""\
# {title}
# Left: names of {left}; right: diffusers', alone where both are the same. '#' is any number,
# on both sides the same. '*6': the layer has 6 times as many outputs as inputs, and parts share
# them in order. '~': the halves of them change places. Written by tools/name_tables.py.
"""
    lines = (a if a == b else f"{a} = {b}" for a, b in rows)
    (folder / f"{name}.txt").write_text(head + "".join(f"{line}\n" for line in lines), "utf-8")


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
CLIP = """
text_model.embeddings.{token,position}_embedding text_projection
text_model.encoder.layers.#.{self_attn.{q,k,v,out}_proj,mlp.fc1,mlp.fc2}
"""
T5 = """
shared encoder.block.#.layer.0.SelfAttention.{q,k,v,o,relative_attention_bias}
encoder.block.#.layer.1.DenseReluDense.{wi_0,wi_1,wo}
"""
XLABS = {
    "double_blocks.#.processor.qkv_lora1": "double_blocks.#.img_attn.qkv",
    "double_blocks.#.processor.proj_lora1": "double_blocks.#.img_attn.proj",
    "double_blocks.#.processor.qkv_lora2": "double_blocks.#.txt_attn.qkv",
    "double_blocks.#.processor.proj_lora2": "double_blocks.#.txt_attn.proj",
    "single_blocks.#.processor.qkv_lora": "single_blocks.#.linear1",
    "single_blocks.#.processor.proj_lora": "single_blocks.#.linear2",
}


def main(folder: Path) -> None:
    write_transformers(folder)
    write_unets(folder)
    clip = [(name.replace("text_model.", ""), name) for name in spelled_out(CLIP)]
    table("clip", "CLIP's text models", "some versions of transformers", clip, folder)
    table("t5", "T5's encoder", "transformers", [(x, x) for x in spelled_out(T5)], folder)


def without_weights(kind: str, **config: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config)


def write_unets(folder: Path) -> None:
    for name, title, config in (
        ("sd15", "Stable Diffusion 1 and 2", {"cross_attention_dim": 768}),
        ("sdxl", "Stable Diffusion XL", SDXL),
    ):
        model = without_weights("UNet2DConditionModel", **config)
        rows = rows_of_unet(model)
        check(rows, model)
        table(name, f"{title}: the UNet", "latent diffusion", rows, folder)


def write_transformers(folder: Path) -> None:
    flux = rows_of(FLUX, converters.convert_flux_transformer_checkpoint_to_diffusers)
    chroma = rows_of(FLUX + CHROMA, converters.convert_chroma_transformer_checkpoint_to_diffusers)
    flux = list(dict.fromkeys(flux + chroma))
    known = (
        without_weights("FluxTransformer2DModel", guidance_embeds=True),
        without_weights("ChromaTransformer2DModel"),
    )
    check(flux, *known)
    table("flux", "FLUX.1 and Chroma", "Black Forest Labs", flux, folder)
    parts = dict(flux)
    xlabs = [
        (name, parts[original].split(" single_transformer_blocks.#.proj_mlp")[0])
        for name, original in XLABS.items()
    ]
    table("flux_xlabs", "FLUX.1: the LoRA layers of XLabs", "XLabs", xlabs, folder)
    flux2 = rows_of(FLUX2, converters.convert_flux2_transformer_checkpoint_to_diffusers)
    check(flux2, without_weights("Flux2Transformer2DModel"))
    table("flux2", "FLUX.2", "Black Forest Labs", flux2, folder)
    z_image = rows_of(Z_IMAGE, converters.convert_z_image_transformer_checkpoint_to_diffusers)
    check(z_image, without_weights("ZImageTransformer2DModel"))
    table("z-image", "Z-Image", "Tongyi", z_image, folder)
    sd3 = rows_of(SD3, converters.convert_sd3_transformer_checkpoint_to_diffusers)
    check(sd3, without_weights("SD3Transformer2DModel", num_layers=3, dual_attention_layers=(0,)))
    table("sd3", "Stable Diffusion 3 and 3.5", "Stability AI", sd3, folder)
    hunyuan = rows_of(HUNYUAN, converters.convert_hunyuan_video_transformer_to_diffusers)
    check(hunyuan, without_weights("HunyuanVideoTransformer3DModel", guidance_embeds=True))
    table("hunyuanvideo", "HunyuanVideo", "Tencent", hunyuan, folder)
    wan = rows_of(WAN, converters.convert_wan_transformer_to_diffusers)
    images = {"image_dim": 1280, "added_kv_proj_dim": 5120}
    check(
        wan,
        without_weights("WanTransformer3DModel", **images),
        without_weights("WanVACETransformer3DModel", **images),
    )
    table("wan", "Wan 2", "Alibaba", wan, folder)
    names = layers_of(without_weights("QwenImageTransformer2DModel", num_layers=1))
    qwen = [(x, x) for x in (name.replace("blocks.0.", "blocks.#.") for name in names)]
    table("qwen-image", "Qwen-Image", "Qwen", qwen, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
