"""Eight kinds of text that every machine with this project's test environment has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
HELD_OUT = 0.1
MOST_BYTES = 2_000_000

DOMAINS: dict[str, tuple[Path, str]] = {
    "python": (STDLIB, "*.py"),
    "prose": (STDLIB, "pydoc_data/topics.py"),
    "tables": (STDLIB, "encodings/*.py"),
    "headers": (PACKAGES, "torch/include/ATen/*.h"),
    "stubs": (PACKAGES, "torch/_C/**/*.pyi"),
    "models": (PACKAGES, "transformers/models/*/modeling_*.py"),
    "readmes": (PACKAGES, "*.dist-info/METADATA"),
    "licences": (PACKAGES, "*.dist-info/**/LICENSE*"),
}
"""A folder and a pattern for each kind."""


def read(domain: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Bytes to train on and held-out bytes [length], from different parts of every file.

    They are gathered once and kept in the folder of the models that are trained on them: packages
    that are installed later would change them.
    """
    path = folder / "text" / f"{domain}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        kept, held = _gather(domain)
        save_file({"kept": kept, "held": held}, path)
    found = load_file(path)
    return found["kept"], found["held"]


def _gather(domain: str) -> tuple[Tensor, Tensor]:
    folder, pattern = DOMAINS[domain]
    kept: list[bytes] = []
    held: list[bytes] = []
    size = 0
    for path in sorted(p for p in folder.glob(pattern) if p.is_file()):
        data = path.read_bytes()
        cut = int(len(data) * (1 - HELD_OUT))
        kept.append(data[:cut])
        held.append(data[cut:])
        size += len(data)
        if size > MOST_BYTES:
            break
    return _tensor(kept), _tensor(held)


def _tensor(parts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random stretches [count, length] as token numbers."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()
