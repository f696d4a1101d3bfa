"""Runs the command line in this process and judges how it ended."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftConfig  # here: the children that run cases are forked with it
from safetensors import safe_open

from domerge_fast.cli import main as cli

from .inputs import CONFIG, IN_GGUF, OF_GGUF, OF_MLX, WEIGHTS

LONGEST_LINE = 370
"""Of a refusal: its message and what stands before it."""
TOLERANCE = 1e-4
"""Of an update in an output, relative to the largest norm of one."""


@dataclass(frozen=True)
class Ending:
    code: int
    out: str
    err: str

    def refusal(self) -> str | None:
        """What is wrong with it as a refusal: None if it is one line with exit code 2, and before
        that at most one on what could not be cleared away."""
        lines = self.err.splitlines()
        if len(lines) == 2 and re.match(r"domerge-fast: warning: .* is left in ", lines[0]):
            del lines[0]
        if self.code != 2:
            return f"exit code {self.code}: {self.err[-300:]!r}"
        if len(lines) != 1 or not lines[0].startswith("domerge-fast: error: "):
            return f"not one line: {self.err[:300]!r}"
        if len(lines[0]) > LONGEST_LINE or not lines[0].isprintable():
            return f"a line of {len(lines[0])} characters, or unprintable: {lines[0][:300]!r}"
        return None


def run(*arguments: object) -> Ending:
    """A command in this process, with streams of its own."""
    before = sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    sys.stdout, sys.stderr = out, err
    try:
        code = cli.main([str(a) for a in arguments])
    finally:
        sys.stdout, sys.stderr = before
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))
    return Ending(code, *texts)


def fingerprint(*folders: Path) -> str:
    """Of names and bytes of all regular files below."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
            found.update(str(path).encode(errors="surrogateescape"))
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30:
                found.update(path.read_bytes())
    return found.hexdigest()


def hidden(folder: Path) -> list[str]:
    """Names of what starts with a dot in a folder: nothing of ours may stay."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def remove(path: Path) -> None:
    """A file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def strict_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)


def tensors(*files: Path) -> dict[str, torch.Tensor]:
    """As the safetensors library reads them."""
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_WRAPPERS = re.compile(r"base_model\.model\.|_orig_mod\.")


def updates(folder: Path) -> dict[str, torch.Tensor] | None:
    """scaling B A of every module, in float64, by PEFT's rules read literally; None where these
    would run a pattern that is not a plain name."""
    config = json.loads((folder / CONFIG).read_bytes())
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors(folder / WEIGHTS).items():
        if match := _FACTOR.fullmatch(_WRAPPERS.sub("", key)):
            sides.setdefault(match[1], {})[match[2]] = tensor.double().flatten(1)
    for field in ("rank_pattern", "alpha_pattern"):
        if not all(re.fullmatch(r"[\w.]*", key) for key in config.get(field) or {}):
            return None

    def value(field: str, module: str, default: float) -> float:
        for key, number in (config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return number
        return default

    found = {}
    for module, pair in sides.items():
        rank = value("rank_pattern", module, config.get("r", 8))
        alpha = value("alpha_pattern", module, config.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[module] = scaling * pair["B"] @ pair["A"]
    return found


def updates_of_experts(folder: Path) -> dict[str, torch.Tensor] | None:
    """Of every expert, one below the other, by the layout of PEFT's `ParamWrapper`; None where the
    config names other parameters, or has patterns that are no plain names."""
    config = json.loads((folder / CONFIG).read_bytes())
    ends = {str(x).rpartition(".")[2] for x in config.get("target_parameters") or ()}
    fields = [config.get(field) or {} for field in ("rank_pattern", "alpha_pattern")]
    if ends != {"gate_up_proj", "down_proj"} or any({*x} - {"down_proj"} for x in fields):
        return None
    found, sides = {}, dict[str, dict[str, torch.Tensor]]()
    for key, tensor in tensors(folder / WEIGHTS).items():
        if match := _FACTOR.fullmatch(_WRAPPERS.sub("", key)):
            sides.setdefault(match[1], {})[match[2]] = tensor.double()
    for path, pair in sides.items():
        a, b = pair["A"], pair["B"]
        last = "gate_up_proj" if path.endswith(".base_layer") else "down_proj"
        is_down = path.endswith("experts")
        rank = (fields[0] if is_down else {}).get(last, config.get("r", 8))
        alpha = (fields[1] if is_down else {}).get(last, config.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        count = len(a) // rank
        rows = a.reshape(count, rank, -1)
        found[path] = scaling * torch.einsum("mje,ejn->emn", b.reshape(-1, rank, count), rows)
    return {name: x.flatten(0, 1) for name, x in found.items()}


def file_updates(path: Path) -> dict[str, torch.Tensor]:
    """alpha / rank times B A of every module of a file of kohya's kind, in float64, as ComfyUI
    takes them."""
    found = tensors(path)
    updates = {}
    for key in found:
        module = key.removesuffix(".lora_down.weight")
        if module == key:
            continue
        a, b = found[key].double(), found[f"{module}.lora_up.weight"].double().flatten(1)
        scale = float(found.get(f"{module}.alpha", torch.tensor(float(len(a))))) / len(a)
        mid = found.get(f"{module}.lora_mid.weight")
        if mid is not None:
            a = torch.einsum("mnxy,nj->mjxy", mid.double(), a.flatten(1))
        updates[module] = scale * b @ a.flatten(1)
    return updates | _of_lycoris(found)


def _of_lycoris(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of LoHa and LoKr, by their definitions."""
    updates = {}
    for key in found:
        module, _, part = key.rpartition(".")

        def wide(part: str, module: str = module) -> torch.Tensor:
            return found[f"{module}.{part}"].double()

        scale = float(found.get(f"{module}.alpha", torch.tensor(2.0))) / 2
        if part == "hada_w1_a":
            one, two = (wide(f"hada_w{k}_a") @ wide(f"hada_w{k}_b") for k in (1, 2))
            updates[module] = scale * one * two
        elif part == "lokr_w1":
            two = wide("lokr_w2_a") @ wide("lokr_w2_b")
            updates[module] = scale * torch.kron(wide(part), two)
    return updates


def updates_of_mlx(folder: Path) -> dict[str, torch.Tensor]:
    """The same of an MLX folder."""
    scale = json.loads((folder / CONFIG).read_bytes())["lora_parameters"]["scale"]
    found = {key: x.double() for key, x in tensors(folder / OF_MLX).items()}
    modules = {key.rpartition(".")[0] for key in found}
    return {x: scale * (found[f"{x}.lora_a"] @ found[f"{x}.lora_b"]).T for x in modules}


def updates_of_gguf(folder: Path) -> dict[str, torch.Tensor]:
    """The same of an adapter in GGUF, as llama.cpp applies it."""
    reader = gguf.GGUFReader(folder / OF_GGUF)
    alpha = reader.fields.get("adapter.lora.alpha")
    found = {x.name: torch.tensor(np.array(x.data)).double() for x in reader.tensors}
    updates = {}
    for name in {key.rpartition(".")[0] for key in found}:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        scale = alpha.contents() / b.shape[1] if alpha and alpha.contents() else 1.0
        _, number, stored, _ = name.split(".")
        module = IN_GGUF.get(stored, stored)
        updates[f"model.layers.{number}.{module}"] = scale * (b @ a)
    return updates


def differs(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str | None:
    """What differs between two sets of updates. Where names differ, which may be right (modules
    are renamed to agree), shapes and norms are compared."""
    largest = max((float(x.norm()) for x in wanted.values()), default=0.0)
    if got.keys() == wanted.keys():
        for name, x in wanted.items():
            if got[name].shape == x.T.shape != x.shape:  # a base that stores it the other way
                x = x.T
            off = float((got[name] - x).norm())
            if not off <= TOLERANCE * max(largest, 1e-300):
                return f"{name}: off by {off:.3g}, the largest norm is {largest:.3g}"
        return None
    rows = [
        sorted((tuple(x.shape), float(x.norm())) for x in side.values()) for side in (got, wanted)
    ]
    same = len(rows[0]) == len(rows[1]) and all(
        x[0] == y[0] and abs(x[1] - y[1]) <= TOLERANCE * max(largest, 1e-300) for x, y in zip(*rows)
    )
    return None if same else f"updates of {sorted(got)} instead of {sorted(wanted)}"


def total(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sum of updates, module by module."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, x in part.items():
            found[name] = found[name] + x if name in found else x
    return found


def adapter_problem(folder: Path) -> str | None:
    """What is wrong with a written adapter, whatever is in it."""
    config = strict_json(folder / CONFIG)
    try:
        PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        return f"PEFT refuses its config: {error}"
    for key, tensor in tensors(folder / WEIGHTS).items():
        if not bool(torch.isfinite(tensor.double()).all()):
            return f"{key} is not finite"
        rank = tensor.shape[0] if "lora_A" in key else tensor.shape[1] if "lora_B" in key else None
        several = 3 if config.get("target_parameters") and ".experts" in key else 1
        ranks = (config["r"], *(config["rank_pattern"] or {}).values())
        if rank not in (None, *(several * r for r in ranks)):
            return f"{key} has rank {rank}, the config says {config['r']}"
    (folder / "README.md").read_bytes().decode("utf-8")
    return None
