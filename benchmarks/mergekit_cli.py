"""mergekit on the path that its users take: full models from base and adapter, merged, extracted.

`mergekit-yaml` first applies every adapter to a copy of the base and merges the copies, then
`mergekit-extract-lora` factors what changed. The base here is a Llama with random weights, the
workload's shapes and one layer. The other layers are reckoned to take as long as that one, beyond
what a layer of llama-tiny takes, which is mergekit's start.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from domerge_fast.bench.workloads import WORKLOADS, Workload

MERGE, EXTRACT = "mergekit-yaml", "mergekit-extract-lora"
METHODS = {"task_arithmetic": "", "ties": ", density: 0.2"}
"""Merge methods, and what their recipes say of a model besides its weight."""
HEAD = 128


def missing(scripts: Path) -> str:
    """Why mergekit cannot be run from a folder of scripts, or ""."""
    if (scripts / MERGE).exists():
        return ""
    return f"{MERGE} is not in {scripts}: pip install mergekit, or --no-mergekit"


def run(workload: Workload, scripts: Path, data: Path) -> dict[str, Any]:
    """Seconds of every step for one layer and for one of llama-tiny, and for all, by method."""
    with TemporaryDirectory(dir=data) as folder:
        start = _steps(WORKLOADS["llama-tiny"], scripts, Path(folder))
    with TemporaryDirectory(dir=data) as folder:
        layer = _steps(workload, scripts, Path(folder))
    layers = len(workload.modules) // len(_layer(workload).modules)
    whole = {k: start[k] + layers * max(0.0, layer[k] - start[k]) for k in layer}
    return {
        "version": _version(scripts),
        "layers": layers,
        "start": start,
        "layer": layer,
        "seconds": {method: whole[method] + whole[EXTRACT] for method in METHODS},
    }


def _layer(workload: Workload) -> Workload:
    names = [s.name for s in workload.modules if s.name.startswith("model.layers.0.")]
    return dataclasses.replace(workload.only(names), name="adapters")


def _steps(workload: Workload, scripts: Path, folder: Path) -> dict[str, float]:
    """Seconds of both merges, and of the extraction from the last one, with one layer."""
    part = _layer(workload)
    adapters = part.write(folder)
    base = _write_base(part, folder / "base")
    seconds = {}
    for method in METHODS:
        recipe = folder / f"{method}.yml"
        recipe.write_text(_recipe(method, base, adapters))
        with TemporaryDirectory(dir=folder) as cache:
            words = [scripts / MERGE, recipe, folder / method, "--no-copy-tokenizer"]
            seconds[method] = _seconds([*words, "--lora-merge-cache", cache])
    rank = str(workload.rank)
    words = [scripts / EXTRACT, "--model", folder / method, "--base-model", base]
    seconds[EXTRACT] = _seconds([*words, "--out-path", folder / "lora", "--max-rank", rank])
    return seconds


def _write_base(part: Workload, path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shapes = {s.name.rpartition(".")[2]: s for s in part.modules}
    hidden, key_value = shapes["q_proj"].n, shapes["k_proj"].m
    head = min(HEAD, key_value)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=shapes["gate_proj"].m,
        num_hidden_layers=1,
        num_attention_heads=hidden // head,
        num_key_value_heads=key_value // head,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def _recipe(method: str, base: Path, adapters: Sequence[Path]) -> str:
    parameters = f"weight: {1 / len(adapters)}{METHODS[method]}"
    models = [
        f"  - model: {base}+{adapter}\n    parameters: {{{parameters}}}" for adapter in adapters
    ]
    head = [f"merge_method: {method}", f"base_model: {base}", "dtype: bfloat16", "models:"]
    return "\n".join([*head, *models]) + "\n"


def _seconds(command: Sequence[object]) -> float:
    words = [str(word) for word in command]
    start = time.perf_counter()
    done = subprocess.run(
        words, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    elapsed = time.perf_counter() - start
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:]
        sys.exit(f"{Path(words[0]).name} failed: {' '.join(last)}")
    return elapsed


def _version(scripts: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    done = subprocess.run(
        [scripts / "python", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
