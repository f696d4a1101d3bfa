"""Weights in quantized formats, merged into, against what the libraries that know them make of
them: transformers (FP8, MXFP4), compressed-tensors (its own, and AWQ); GPTQ against its packing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from support.make import random_factors, write_adapter, write_folder
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import domerge_fast as dm

NAME, OTHER = "model.layers.0.self_attn.q_proj", "model.norm"
M, N = 48, 64
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Weights are read five rows at a time, wherever blocks and words end."""
    monkeypatch.setattr("domerge_fast.formats.model.write.CHUNK_BYTES", 5 * 4 * N)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_base(folder: Path, tensors: Mapping[str, Tensor], how: Mapping[str, Any] | None) -> Path:
    folder.mkdir()
    tensors = {k: x.contiguous() for k, x in tensors.items()}
    save_file({**tensors, f"{OTHER}.weight": torch.ones(N)}, folder / "model.safetensors")
    config = {"tie_word_embeddings": False, "dtype": "float32"}
    config |= {"quantization_config": how} if how else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merged(tmp_path: Path, tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> Tensors:
    """The tensors of a model in float32 that an adapter of NAME of zeros was merged into: a
    weight is what it stands for. The others are as they were."""
    base = write_base(tmp_path / "base", tensors, how)
    factors = random_factors({NAME: (M, N)}, 2)
    adapter = write_adapter(tmp_path / "a", {NAME: (factors[NAME][0], factors[NAME][1] * 0)})
    dm.merge([adapter], "linear", form="model", base=base, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found.pop(f"{OTHER}.weight"), torch.ones(N))
    return found


def check(found: Mapping[str, Tensor], wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert found.keys() == {f"{NAME}.weight"}
    weight = found[f"{NAME}.weight"]
    assert weight.shape == wanted.shape
    assert weight.dtype == torch.float32
    assert float((weight.double() - wanted.double()).abs().max()) <= tolerance * wanted.abs().max()


def fp8(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """x by blocks, and what each block has to be multiplied by."""
    m, n = x.shape
    scales = torch.empty(-(-m // rows), -(-n // columns))
    data = torch.empty(m, n).to(torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = x[at].abs().max() / 448
            data[at] = (x[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return data, scales


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_in_blocks(dtype, tmp_path):
    x = random(M, N)
    data, scales = fp8(x, 24, 16)
    scales = scales.to(dtype)
    tensors = {f"{NAME}.weight": data, f"{NAME}.weight_scale_inv": scales}
    how = FP8 | {"weight_block_size": [24, 16]}
    wanted = Fp8Dequantize(None)._dequantize_one(data, scales, torch.float32)
    check(merged(tmp_path, tensors, how), wanted)


def test_blocks_at_the_edge_are_smaller(tmp_path):
    """As of DeepSeek's 576 rows in blocks of 128."""
    x = random(M, N)
    data, scales = fp8(x, 32, 48)
    tensors = {f"{NAME}.weight": data, f"{NAME}.weight_scale_inv": scales}
    found = merged(tmp_path, tensors, FP8 | {"weight_block_size": [32, 48]})
    assert scales.shape == (2, 2)
    wanted = data.float() * scales.repeat_interleave(32, 0).repeat_interleave(48, 1)[:M, :N]
    check(found, wanted)
    assert float((wanted - x).norm() / x.norm()) < 0.05


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (M,), (M, 1)])
def test_fp8_of_one_factor_or_one_a_row(shape, tmp_path):
    scales = 0.1 + random(*shape).abs()
    data = random(M, N).to(torch.float8_e4m3fn)
    beside = {f"{NAME}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": scales + 1}
    tensors = {f"{NAME}.weight": data, f"{NAME}.weight_scale": scales, **beside}
    expected = data.float() * (scales.reshape(-1, 1) if scales.numel() > 1 else scales.item())
    check(merged(tmp_path, tensors, FP8), expected)


COMPRESSED = {
    "int4 in groups": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}),
    "int4 with zeros": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": False},
    ),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 with zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 of one": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8 in groups": (
        "naive-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 8, "symmetric": False},
    ),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 in blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
}


def compressed(x: Tensor, form: str, settings: Mapping[str, Any]) -> tuple[Tensors, Tensor]:
    """x as compressed-tensors stores it, and what it takes that for."""
    args = QuantizationArgs(**settings)
    m, n = x.shape
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(x, (0, -n % columns, 0, -m % rows))
        grouped = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        ends = grouped.amin((1, 3)), grouped.amax((1, 3))
    elif args.strategy == "tensor":
        ends = x.min().reshape(1), x.max().reshape(1)
    else:
        grouped = x.reshape(m, -1, args.group_size or n)
        ends = grouped.amin(-1), grouped.amax(-1)
    of_all = generate_gparam(x.min(), x.max()) if args.strategy == "tensor_group" else None
    scales, zeros = calculate_qparams(*ends, args, global_scale=of_all)
    own = {"weight": x, "weight_scale": scales}
    own |= {} if args.symmetric else {"weight_zero_point": zeros}
    own |= {} if of_all is None else {"weight_global_scale": of_all}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(own, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(case, tmp_path):
    form, settings = COMPRESSED[case]
    stored, wanted = compressed(random(M, N), form, settings)
    tensors = {f"{NAME}.{key}": x for key, x in stored.items()}
    how = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
    }
    in_bf16 = wanted.dtype == torch.bfloat16
    check(merged(tmp_path, tensors, how), wanted, 2.0**-8 if in_bf16 else 1e-6)


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def of_experts(tmp_path: Path, tensors: Mapping[str, Tensor], how: dict[str, Any]) -> Tensors:
    """What a merge with an adapter of EXPERTS makes of a base, and its updates [E, m, n]."""
    base = write_base(tmp_path / "base", tensors, how)
    a, b = random(3 * 2, N, seed=4), random(M, 2 * 3, seed=5)
    owner = f"base_model.model.{EXPERTS.rpartition('.')[0]}"
    adapter = write_folder(
        tmp_path / "a",
        {f"{owner}.lora_A.weight": a, f"{owner}.lora_B.weight": b},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
        | {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    )
    dm.merge([adapter], "linear", form="model", base=base, output=tmp_path / "out")
    updates = torch.stack([b[:, e::3] @ a[e * 2 : e * 2 + 2] for e in range(3)])
    return load_file(tmp_path / "out" / "model.safetensors") | {"updates": updates}


def test_experts_of_gpt_oss(tmp_path):
    """Whose matrices are stored as [m, n], and are [n, m] in the model."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, M, N // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, M, N // 32), generator=generator, dtype=torch.uint8)
    biases = random(3, M)
    stored = {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}
    found = of_experts(tmp_path, stored | {f"{EXPERTS}_bias": biases}, {"quant_method": "mxfp4"})
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).double()
    wanted += found.pop("updates").mT
    assert found.keys() == {EXPERTS, f"{EXPERTS}_bias", f"{OTHER}.weight"}
    assert torch.equal(found[f"{EXPERTS}_bias"], biases)
    assert found[EXPERTS].shape == wanted.shape == (3, N, M)
    assert float((found[EXPERTS] - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("block", [(24, 16), (32, 48), None])
def test_experts_in_fp8(block, tmp_path):
    """In blocks, which may end at the edge, or of one factor each."""
    rows, columns = block or (M, N)
    pairs = [fp8(random(M, N, seed=e) * 2**e, rows, columns) for e in range(3)]
    data, scales = (torch.stack(x) for x in zip(*pairs))
    how = FP8 | ({"weight_block_size": [*block]} if block else {})
    stored = {EXPERTS: data, f"{EXPERTS}_scale_inv": scales}
    found = of_experts(tmp_path, stored, how)
    spread = scales.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, :M, :N]
    wanted = data.double() * spread + found["updates"]
    assert float((found[EXPERTS] - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def packed(numbers: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Rows of unsigned numbers in words of 32 bits, one after the other or in other places."""
    each = 32 // bits
    places = places or tuple(range(each))
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // each, dtype=torch.int64)
    for k in range(numbers.shape[1]):
        words[:, k // each] |= numbers[:, k].long() << (bits * places[k % each])
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


@pytest.mark.parametrize("size", [16, 64])
def test_awq(size, tmp_path):
    numbers = torch.randint(0, 16, (N, M), generator=torch.Generator().manual_seed(1))
    zeros = torch.randint(0, 16, (N // size, M), generator=torch.Generator().manual_seed(2))
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    scales = random(N // size, M).abs().half()
    own = {
        f"{NAME}.qweight": packed(numbers, 4, order),
        f"{NAME}.qzeros": packed(zeros, 4, order),
        f"{NAME}.scales": scales,
    }
    how = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    converted = AutoAWQConverter(group_size=size).process(dict(own))
    args = QuantizationArgs(num_bits=4, group_size=size, strategy="group", symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    local = {key.rpartition(".")[2]: x for key, x in converted.items()}
    local["weight_scale"] = local["weight_scale"].float()
    wanted = compressor.decompress(local, scheme)["weight"]
    direct = (numbers - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(
        size, 0
    ).float()
    assert torch.equal(wanted, direct.T)
    check(merged(tmp_path, own, how), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits, ordered, version, tmp_path):
    """Stored zeros are one less, but in version 2."""
    groups, most, generator = 4, 1 << bits, torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, most, (M, N), generator=generator)
    zeros = torch.randint(1, most, (groups, M), generator=generator)
    scales = random(groups, M).abs().half()
    of_columns = torch.arange(N) // (N // groups)
    if not ordered:
        of_columns = of_columns[torch.randperm(N, generator=generator)]
    own = {
        f"{NAME}.qweight": packed(numbers, bits).T,
        f"{NAME}.qzeros": packed(zeros - int(version == "gptq"), bits),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": of_columns.int(),
    }
    how = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    wanted = scales.float()[of_columns].T * (numbers - zeros[of_columns].T)
    check(merged(tmp_path, own, how), wanted)
