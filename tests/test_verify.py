"""`verify`: what is written is held against the reference, and refused where it is not that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.make import random_factors, write_pair
from torch import Tensor

import domerge_fast as dm
from domerge_fast import ops
from domerge_fast.cli.main import main
from domerge_fast.engine import verifying
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE

SHAPES = {f"layers.{i}.{kind}": shape for i in range(2) for kind, shape in
          (("q_proj", (48, 56)), ("up_proj", (96, 40)))}  # fmt: skip


def adapters(count: int = 3, rank: int = 4, dtype: torch.dtype = torch.float32) -> list[dm.Adapter]:
    found = []
    for i in range(count):
        factors = random_factors(SHAPES, rank, seed=i, dtype=dtype)
        found.append(from_tensors(factors, 2.0, name=f"{i}"))
    return found


def verified(report: dm.Report) -> dict[str, tuple[float, float]]:
    return {name: x.verified for name, x in report.modules.items() if x.verified}


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_is_its_reference(method, dtype):
    loaded = adapters(2 if method == "slerp" else 3, dtype=dtype)
    report = dm.merge(loaded, method, verify=True).report
    found = verified(report)
    assert set(found) == set(SHAPES)
    for error, allowed in found.values():
        assert error <= allowed <= (1e-3 if dtype == torch.float32 else 2e-2)
    assert dict(report.summary())["verified"].startswith("4 modules against the reference")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"post": ["svc"]},
        {"pre": ["equalize"], "post": ["norm_match"]},
        {"weights": [1e20, -1e20, 2e20]},
        {"scale": 1e-12},
        {"form": "deltas"},
        {"rules": [{"modules": "*.q_proj", "method": "linear"}]},
    ],
)
@pytest.mark.parametrize("method", ["do", "tsvm", "ties"])
def test_and_so_is_what_is_done_beside_it(method, options):
    found = verified(dm.merge(adapters(), method, verify=True, **options).report)
    assert set(found) == set(SHAPES)


def test_sizes_far_from_one():
    loaded = [
        from_tensors({n: (a * size, b) for n, (a, b) in random_factors(SHAPES, 4, seed=i).items()})
        for i, size in enumerate((1.0, 1e-15, 1e15))
    ]
    for method in ("linear", "do"):
        assert len(verified(dm.merge(loaded, method, verify=True).report)) == len(SHAPES)


def off(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast backends' results are off by this share of an entry in each row."""
    usual = ops.apply

    def wrong(*args: object, backend: str = "auto", **others: object) -> list[Tensor]:
        found = usual(*args, backend=backend, **others)
        if backend != "reference":
            for x in found:
                x[..., 0] *= 1 + share
        return found

    monkeypatch.setattr(ops, "apply", wrong)


def test_a_wrong_result_is_refused(monkeypatch, tmp_path, capsys):
    off(1.0, monkeypatch)
    paths = [str(path) for path in write_pair(tmp_path)]
    out = tmp_path / "out"
    flags = ["-o", str(out), "--method", "tsvm", "--html", str(tmp_path / "page.html")]
    assert main(["merge", *paths, *flags]) == 0
    before = sorted(os.listdir(out))
    contents = (out / "adapter_model.safetensors").read_bytes()
    (tmp_path / "page.html").unlink()
    assert main(["merge", *paths, *flags, "--overwrite", "--verify"]) == 2
    said = capsys.readouterr().err
    assert "of its norm from the reference, where float32 explains" in said
    assert said.count("\n") == 1
    assert sorted(os.listdir(out)) == before
    assert (out / "adapter_model.safetensors").read_bytes() == contents
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("share", "refused"), [(1e-6, False), (0.05, True)])
def test_it_sees_what_rounding_does_not_explain(share, refused, monkeypatch):
    off(share, monkeypatch)
    if refused:
        with pytest.raises(dm.DomergeError, match=r"module '.*': off by 0\.00"):
            dm.merge(adapters(), "tsvm", verify=True)
    else:
        assert verified(dm.merge(adapters(), "tsvm", verify=True).report)


def test_nan_is_not_small(monkeypatch):
    off(float("nan"), monkeypatch)
    with pytest.raises(dm.DomergeError):
        dm.merge(adapters(), "tsvm", verify=True)


def test_a_sample_is_spread_over_the_model(monkeypatch):
    monkeypatch.setattr(verifying, "MOST_VERIFIED", 2)
    found = verified(dm.merge(adapters(), "linear", verify=True).report)
    assert list(found) == sorted(SHAPES)[::2]


def test_only_small_modules_are_merged_again(monkeypatch):
    monkeypatch.setattr(verifying, "MOST_ENTRIES", 1)
    found = verified(dm.merge(adapters(), "linear", verify=True).report)
    assert set(found) == {name for name in SHAPES if name.endswith("q_proj")}


def test_a_descent_on_factors_is_no_part_of_it():
    loaded = adapters(count=13)  # R = 52, more than a side of every module
    with pytest.raises(dm.OptionError, match="every module descends on its factors"):
        dm.merge(loaded, "do", verify=True)
    assert len(verified(dm.merge(loaded, "tsvm", verify=True).report)) == len(SHAPES)


def test_zero_updates_are_verified():
    loaded = [from_tensors({"x": (torch.zeros(2, 8), torch.zeros(6, 2))}, name=n) for n in "ab"]
    assert verified(dm.merge(loaded, "linear", verify=True).report)["x"][0] == 0.0


def test_without_it_nothing_is():
    assert verified(dm.merge(adapters(), "linear").report) == {}


def test_a_dry_run_has_nothing_to_verify(tmp_path, capsys):
    paths = [str(path) for path in write_pair(tmp_path)]
    assert main(["merge", *paths, "-o", str(tmp_path / "out"), "--verify", "--dry-run"]) == 2
    assert "option 'verify': a dry run writes nothing" in capsys.readouterr().err


def test_recipes_are_verified_too(tmp_path, capsys):
    paths = [str(path) for path in write_pair(tmp_path)]
    assert main(["merge", *paths, "-o", str(tmp_path / "one"), "-q"]) == 0
    again = ["run", str(tmp_path / "one"), "--adapters", str(tmp_path), "-o", str(tmp_path / "two")]
    assert main([*again, "--verify"]) == 0
    assert "against the reference" in capsys.readouterr().out
    one, two = (Path(tmp_path, x, "adapter_model.safetensors").read_bytes() for x in ("one", "two"))
    assert one == two
