"""Fused modules of language models, where other adapters have their parts."""

from __future__ import annotations

import pytest
import torch
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast.errors import AdapterError

LAYER = "model.layers.0"
N, Q, K, U = 24, 24, 8, 40
FUSED = {f"{LAYER}.self_attn.qkv_proj": (Q + 2 * K, N), f"{LAYER}.mlp.gate_up_proj": (2 * U, N)}
PARTS = {
    f"{LAYER}.self_attn.q_proj": (Q, N),
    f"{LAYER}.self_attn.k_proj": (K, N),
    f"{LAYER}.self_attn.v_proj": (K, N),
    f"{LAYER}.mlp.gate_proj": (U, N),
    f"{LAYER}.mlp.up_proj": (U, N),
}


@pytest.mark.parametrize(
    "there", [[*PARTS], ["q_proj", "up_proj"], ["v_proj", "gate_proj"], ["q_proj", "k_proj"]]
)
def test_a_fused_module_is_split_as_others_have_it(there, tmp_path):
    fused = random_factors(FUSED, 3, seed=1)
    parts = random_factors({n: x for n, x in PARTS.items() if n.endswith(tuple(there))}, 2)
    a = write_adapter(tmp_path / "a", fused, lora_alpha=6)
    b = write_adapter(tmp_path / "b", parts)
    merged = dm.merge([a, b], "linear", output=tmp_path / "out")
    cut = {}
    for name, (first, second) in fused.items():
        if "mlp" not in name or any("mlp" in x for x in parts):
            names = [n for n in PARTS if n.startswith(name.rpartition(".")[0])]
            rows = second.double().split([PARTS[n][0] for n in names])
            cut |= {n: 2 * x @ first.double() for n, x in zip(names, rows)}
        else:
            cut[name] = 2 * second.double() @ first.double()
    for name, (first, second) in parts.items():
        cut[name] = cut[name] + second.double() @ first.double()
    found = dm.load(tmp_path / "out")
    assert found.modules.keys() == cut.keys()
    for name, wanted in cut.items():
        first, second = found.factors(name)
        torch.testing.assert_close((second @ first).double(), wanted, rtol=0, atol=1e-4)
    assert any("split into" in note for note in merged.report.notes)


def test_without_parts_it_stays_fused(tmp_path):
    a = write_adapter(tmp_path / "a", random_factors(FUSED, 3, seed=1))
    b = write_adapter(tmp_path / "b", random_factors(FUSED, 2, seed=2))
    assert dm.merge([a, b], "linear").names == tuple(sorted(FUSED))


def test_parts_that_do_not_fit_are_refused(tmp_path):
    a = write_adapter(tmp_path / "a", random_factors(FUSED, 3, seed=1))
    wrong = {f"{LAYER}.mlp.up_proj": (U + 1, N)}
    b = write_adapter(tmp_path / "b", random_factors(wrong, 2))
    with pytest.raises(AdapterError) as caught:
        dm.merge([a, b], "linear")
    assert f"module '{LAYER}.mlp.gate_up_proj': has 80 outputs" in str(caught.value)
    assert "(gate_proj 41, up_proj 41)" in str(caught.value)


def test_one_adapter_with_both_is_refused(tmp_path):
    both = FUSED | {f"{LAYER}.mlp.up_proj": (U, N)}
    a = write_adapter(tmp_path / "a", random_factors(both, 3, seed=1))
    with pytest.raises(AdapterError, match="is in this adapter twice"):
        dm.merge([a], "linear")
