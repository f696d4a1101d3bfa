"""Real adapters, trained unevenly (tests/data): badly conditioned Grams, norms far apart."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import on_device as ops
from support.merges import at_one
from support.on_device import FAST
from torch import Tensor

import domerge_fast as dm
from domerge_fast.backends import paper
from domerge_fast.cli import main as cli

DIGITS = Path(__file__).parent / "data" / "digits"
FOLDERS = sorted(path.parent for path in DIGITS.glob("*/adapter_config.json"))
MODULES = (
    "vit.layers.3.attention.k_proj",
    "vit.layers.1.mlp.fc1",
    "vit.layers.2.attention.v_proj",
    "vit.layers.3.mlp.fc2",
)
OMEGA = [1 / len(FOLDERS)] * len(FOLDERS)
TO_THE_END = {"steps": 50, "tol": 1e-6}
"""So close to the optimum that a step more or less does not show."""

every_backend = pytest.mark.parametrize("backend", FAST)
every_module = pytest.mark.parametrize("name", MODULES)


@functools.cache
def loaded() -> list[dm.Adapter]:
    return [dm.load(folder) for folder in FOLDERS]


def only(name: str) -> list[dm.Adapter]:
    """The adapters with one of their modules."""
    return [
        dm.from_tensors({name: x.factors(name)}, x.modules[name].scaling, name=x.name)
        for x in loaded()
    ]


@functools.cache
def factors(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """A_i [r, n] and scaled B_i [m, r] of every adapter in float64."""
    pairs = [(x.factors(name), x.modules[name].scaling) for x in loaded()]
    return [a.double() for (a, _), _ in pairs], [s * b.double() for (_, b), s in pairs]


def sides(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks X_i of both sides: A_i and B_i^T."""
    a, b = factors(name)
    return a, [x.T for x in b]


@functools.cache
def oracle(name: str) -> Tensor:
    """ΔW [m, n] of the merge after the whole descent, dense in float64."""
    return paper.do_merging(*factors(name), OMEGA, **TO_THE_END)


@functools.cache
def mean(name: str) -> Tensor:
    return sum(w * b @ a for w, a, b in zip(OMEGA, *factors(name)))


def distance(merged: dm.Merged, name: str, expected: Tensor) -> float:
    a, b = merged.factors(name)
    return float((b.double() @ a.double() - expected).norm() / expected.norm())


def test_the_adapters_are_uneven_and_badly_conditioned():
    found = dm.inspect(FOLDERS)
    assert len(FOLDERS) == 8
    assert max(found.norms) > 4 * min(found.norms)
    for name in MODULES:
        values = [torch.linalg.svdvals(torch.cat(x)) for x in sides(name)]
        assert max(float(v[0] / v[-1]) for v in values) > 200


# Merges


@every_backend
def test_do(backend):
    merged = at_one(FOLDERS, dtype="float32", backend=backend, **TO_THE_END)
    for name in MODULES:
        assert distance(merged, name, oracle(name)) < 1e-4


@every_backend
@pytest.mark.parametrize(
    "options",
    [{"penalty": "frobenius", "steps": 3, "tol": 0.0}, {"orthogonalize": False}],
    ids=["frobenius", "decouple"],
)
def test_do_with_options(options, backend):
    name = MODULES[1]
    merged = at_one(only(name), dtype="float32", backend=backend, renormalize=True, **options)
    expected = paper.do_merging(*factors(name), OMEGA, renormalize=True, **options)
    assert distance(merged, name, expected) < 1e-4


@every_backend
def test_linear(backend):
    merged = at_one(FOLDERS, "linear", weights=OMEGA, dtype="float32", backend=backend)
    for name in MODULES:
        assert distance(merged, name, mean(name)) < 1e-6


@every_backend
@every_module
def test_svd(name, backend):
    merged = at_one(only(name), "svd", weights=OMEGA, dtype="float32", backend=backend)
    u, s, vh = torch.linalg.svd(mean(name), full_matrices=False)
    assert distance(merged, name, u[:, :8] * s[:8] @ vh[:8]) < 1e-5
    kept = float(s[:8].square().sum() / s.square().sum())
    assert merged.report[name].energy_kept == pytest.approx(kept, abs=1e-6)


@every_backend
def test_rounding_to_bfloat16_is_all_that_a_merge_in_bfloat16_adds(backend):
    merged = at_one(FOLDERS, backend=backend, **TO_THE_END)
    for name in MODULES:
        assert {x.dtype for x in merged.factors(name)} == {torch.bfloat16}
        assert distance(merged, name, oracle(name)) < torch.finfo(torch.bfloat16).eps


# Ops


@every_backend
@every_module
def test_the_descent_reaches_the_optimum_of_the_oracle(name, backend):
    for x in sides(name):
        stacked, ranks = torch.cat(x), [len(block) for block in x]
        gram = (stacked @ stacked.T).float()
        (c,), stats = ops.orthogonalize([gram], [ranks], backend=backend, **TO_THE_END)
        expected, (steps, before, after, cross, change) = paper.descend(x, **TO_THE_END)
        result = c.double() @ stacked
        assert float((result - torch.cat(expected)).norm() / stacked.norm()) < 1e-3
        assert stats[0].tolist()[1:] == pytest.approx([before, after, cross, change], rel=1e-3)
        assert abs(stats[0, 0] - steps) <= 2
        reached = float(paper.loss(result.split(ranks), x))
        assert reached == pytest.approx(after, rel=1e-5)
        assert after < 0.6 * before


@every_backend
@every_module
def test_the_cut_of_a_merge_is_the_svd_of_the_whole(name, backend):
    whole = at_one(only(name), dtype="float32", backend=backend)
    a, b = whole.factors(name)
    values = torch.linalg.svdvals(b.double() @ a.double())
    cut = at_one(only(name), dtype="float32", rank=10**6, backend=backend)
    assert distance(cut, name, b.double() @ a.double()) < 1e-5
    (pair,), (kept,) = ops.truncate([(a, b)], rank=5, backend=backend)
    u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    error = pair[1].double() @ pair[0].double() - u[:, :5] * s[:5] @ vh[:5]
    assert float(error.norm() / s.norm()) < 1e-5
    assert kept == pytest.approx(float(values[:5].square().sum() / values.square().sum()))


# Files


def test_from_files_to_files_and_into_the_base_model(tmp_path):
    # Imported here, because the interpreter's process has no use for them and they take seconds.
    import peft
    from transformers import ViTConfig, ViTForImageClassification

    out = tmp_path / "merged"
    options = ["--method", "do", "--scale", "1"]
    options += ["--dtype", "float32", "--steps", "50", "--tol", "1e-6"]
    assert cli.main(["merge", *map(str, FOLDERS), "-o", str(out), *options]) == 0
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig.from_pretrained(DIGITS / "digits-base")).eval()
    before = {name: base.get_submodule(name).weight.detach().clone() for name in MODULES}
    model = peft.PeftModel.from_pretrained(base, out)
    for name in MODULES:
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert float((delta.double() - oracle(name)).norm() / oracle(name).norm()) < 1e-4
    merged = model.merge_and_unload()
    for name, weight in before.items():
        change = merged.get_submodule(name).weight - weight
        assert float((change.double() - oracle(name)).norm() / oracle(name).norm()) < 1e-3


def test_triton_in_the_interpreter():
    """One step on one module of two adapters: the interpreter takes its time."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) < 1e-5


if __name__ == "__main__":
    module, rule = MODULES[0], {"steps": 1, "tol": 0.0}
    by_triton = at_one(only(module)[:2], dtype="float32", backend="triton", **rule)
    a, b = factors(module)
    print(distance(by_triton, module, paper.do_merging(a[:2], b[:2], [0.5, 0.5], **rule)))
