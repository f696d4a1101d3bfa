"""Adapter sets with real shapes and the statistics of trained adapters, made from a seed.

A is uniform as PEFT initialises it (Kaiming), B is normal and an order smaller, and the adapters'
magnitudes spread over a factor of 6, as those of adapters trained at different rates do.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapter
from ..formats import from_tensors

__all__ = ["WORKLOADS", "Member", "Shape", "Workload"]

MAGNITUDE_SPREAD = 6.0
SCALING = 2
"""lora_alpha / r of every adapter."""


class Shape(NamedTuple):
    """A module with an [m, n] update; a convolution's n is its input channels times its kernel."""

    name: str
    m: int
    n: int
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Member:
    """One adapter of a workload: its rank, and the modules it has."""

    rank: int
    modules: tuple[Shape, ...]


@dataclass(frozen=True)
class Workload:
    """A set of adapters of one base model."""

    name: str
    why: str
    members: tuple[Member, ...]
    dtype: torch.dtype = torch.bfloat16

    @cached_property
    def modules(self) -> tuple[Shape, ...]:
        """The modules that any adapter has."""
        return tuple(dict.fromkeys(s for member in self.members for s in member.modules))

    @property
    def rank(self) -> int:
        """The largest rank of an adapter."""
        return max(member.rank for member in self.members)

    @property
    def factor_bytes(self) -> int:
        return sum(self.bytes_of().values())

    def bytes_of(self) -> dict[str, int]:
        """Bytes of all adapters' factors, by module."""
        sizes = dict.fromkeys((s.name for s in self.modules), 0)
        for member in self.members:
            for s in member.modules:
                sizes[s.name] += member.rank * (s.m + s.n) * self.dtype.itemsize
        return sizes

    def only(self, names: Collection[str]) -> Workload:
        """The same adapters on these modules; those that have none of them are left out."""
        parts = [
            Member(member.rank, tuple(s for s in member.modules if s.name in names))
            for member in self.members
        ]
        return dataclasses.replace(self, members=tuple(m for m in parts if m.modules))

    def adapters(self, device: torch.device, seed: int = 0) -> list[Adapter]:
        """The adapters in memory; the values differ between kinds of device, not from run to run.

        Factors of convolutions have the shapes that PEFT stores.
        """
        made = []
        for i, member in enumerate(self.members):
            factors = {s.name: (a, b) for s, a, b in self._factors(i, member, device, seed)}
            made.append(from_tensors(factors, SCALING, name=f"adapter-{i}"))
        return made

    def write(self, folder: Path, seed: int = 0) -> list[Path]:
        """The PEFT folders, made unless they are there already."""
        paths = [folder / self.name / f"adapter-{i}" for i in range(len(self.members))]
        for i, (path, member) in enumerate(zip(paths, self.members)):
            if not (path / "adapter_config.json").exists():
                self._write_adapter(path, i, member, seed)
        return paths

    def _write_adapter(self, path: Path, index: int, member: Member, seed: int) -> None:
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for s, a, b in self._factors(index, member, torch.device("cpu"), seed):
            key = f"base_model.model.{s.name}.lora_"
            tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": f"synthetic/{self.name}",
            "r": member.rank,
            "lora_alpha": SCALING * member.rank,
            "target_modules": self._targets(member),
            "bias": "none",
            "inference_mode": True,
        }
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2))

    def _targets(self, member: Member) -> list[str]:
        """Endings of module names where they select just the member's modules, else the names."""
        endings = {_ending(s.name) for s in member.modules}
        selected = {s for s in self.modules if _ending(s.name) in endings}
        return sorted(
            endings if selected == {*member.modules} else (s.name for s in member.modules)
        )

    def _factors(
        self, index: int, member: Member, device: torch.device, seed: int
    ) -> Iterator[tuple[Shape, Tensor, Tensor]]:
        generator = torch.Generator(device).manual_seed(seed * 10_000 + index)
        share = index / max(1, len(self.members) - 1)
        size = 0.1 * MAGNITUDE_SPREAD ** (share - 1)
        for s in member.modules:
            bound = s.n**-0.5
            a = torch.empty(member.rank, s.n, device=device)
            a.uniform_(-bound, bound, generator=generator)
            b = torch.empty(s.m, member.rank, device=device)
            b.normal_(0, size * bound, generator=generator)
            channels = s.n // math.prod(s.kernel)
            a = a.to(self.dtype).view(member.rank, channels, *s.kernel)
            yield s, a, b.to(self.dtype).view(s.m, member.rank, *(1 for _ in s.kernel))


def _ending(name: str) -> str:
    """The last word of a module's name, with the one before it if it is a number."""
    parent, _, last = name.rpartition(".")
    return f"{parent.rpartition('.')[2]}.{last}" if last.isdecimal() else last


def _alike(name: str, why: str, modules: Iterator[Shape], adapters: int, rank: int) -> Workload:
    return Workload(name, why, (Member(rank, tuple(modules)),) * adapters)


def _llama(
    layers: int, hidden: int, key_value: int, feed_forward: int, only: str = "qkvogud"
) -> Iterator[Shape]:
    """`only` names projections by their first letters."""
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
            if name.partition(".")[2][0] in only:
                yield Shape(f"model.layers.{layer}.{name}", m, n)


def _qwen_moe(
    layers: int = 48, experts: int = 128, hidden: int = 2048, feed_forward: int = 768
) -> Iterator[Shape]:
    """Qwen3-30B-A3B: attention with 32 heads of 128 and 4 key and value heads, and its experts."""
    queries, key_value = 32 * 128, 4 * 128
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield Shape(f"{at}.self_attn.q_proj", queries, hidden)
        yield Shape(f"{at}.self_attn.k_proj", key_value, hidden)
        yield Shape(f"{at}.self_attn.v_proj", key_value, hidden)
        yield Shape(f"{at}.self_attn.o_proj", hidden, queries)
        for expert in range(experts):
            yield Shape(f"{at}.mlp.experts.{expert}.gate_proj", feed_forward, hidden)
            yield Shape(f"{at}.mlp.experts.{expert}.up_proj", feed_forward, hidden)
            yield Shape(f"{at}.mlp.experts.{expert}.down_proj", hidden, feed_forward)


_SDXL = {
    "down_blocks.0": ((320, 320), 320, 0),
    "down_blocks.1": ((320, 640), 640, 2),
    "down_blocks.2": ((640, 1280), 1280, 10),
    "mid_block": ((1280, 1280), 1280, 10),
    "up_blocks.0": ((2560, 2560, 1920), 1280, 10),
    "up_blocks.1": ((1920, 1280, 960), 640, 2),
    "up_blocks.2": ((960, 640, 640), 320, 0),
}
"""A block's residual layers by their input channels, its output channels, and how many transformer
layers stand in each of its attentions."""
_SDXL_TEXT = 2048


def _sdxl() -> Iterator[Shape]:
    """The convolutions and the attention of Stable Diffusion XL's U-Net."""
    for block, (inputs, width, depth) in _SDXL.items():
        for i, channels in enumerate(inputs):
            at = f"{block}.resnets.{i}"
            yield Shape(f"{at}.conv1", width, 9 * channels, (3, 3))
            yield Shape(f"{at}.conv2", width, 9 * width, (3, 3))
            if channels != width:
                yield Shape(f"{at}.conv_shortcut", width, channels, (1, 1))
        attentions = 1 if block == "mid_block" else len(inputs)
        for i in range(attentions if depth else 0):
            at = f"{block}.attentions.{i}"
            yield Shape(f"{at}.proj_in", width, width)
            yield Shape(f"{at}.proj_out", width, width)
            for layer in range(depth):
                yield from _sdxl_layer(f"{at}.transformer_blocks.{layer}", width)


def _sdxl_layer(at: str, width: int) -> Iterator[Shape]:
    for attention, context in (("attn1", width), ("attn2", _SDXL_TEXT)):
        yield Shape(f"{at}.{attention}.to_q", width, width)
        yield Shape(f"{at}.{attention}.to_k", width, context)
        yield Shape(f"{at}.{attention}.to_v", width, context)
        yield Shape(f"{at}.{attention}.to_out.0", width, width)
    yield Shape(f"{at}.ff.net.0.proj", 8 * width, width)
    yield Shape(f"{at}.ff.net.2", width, 4 * width)


def _sdxl_members() -> Iterator[Member]:
    """What people train: attention alone, all linear layers, convolutions too, one part only."""
    modules = tuple(_sdxl())
    chosen: dict[int, Callable[[Shape], bool]] = {
        4: lambda s: ".attn" in s.name,
        8: lambda s: s.name.startswith("up_blocks"),
        16: lambda s: ".attn" in s.name or ".ff." in s.name,
        32: lambda s: not s.kernel,
        64: lambda s: True,
        128: lambda s: ".attn2." in s.name,
    }
    for rank, has in chosen.items():
        yield Member(rank, tuple(filter(has, modules)))


def _all() -> Iterator[Workload]:
    llama = (32, 4096, 1024, 14336)
    yield _alike("llama3-8b-8", "the everyday case", _llama(*llama), 8, 16)
    yield _alike("llama3-8b-64", "many adapters", _llama(*llama, "qv"), 64, 8)
    large = _llama(80, 8192, 1024, 28672)
    yield _alike("llama3-70b-8", "larger than a laptop's free memory", large, 8, 16)
    yield _alike("moe-30b-4", "tiny problems", _qwen_moe(), 4, 8)
    yield Workload("sdxl-mixed", "raggedness", tuple(_sdxl_members()))
    yield _alike("library-1000", "very large adapter sets", _llama(*llama, "qv"), 1000, 8)
    yield _alike("llama-tiny", "for tests and the quick mode", _llama(2, 256, 64, 768), 4, 8)


WORKLOADS = {workload.name: workload for workload in _all()}
