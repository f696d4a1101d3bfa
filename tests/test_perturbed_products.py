"""The perturbation of products that `make test-perturbed` runs all tests under."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.perturb import EXACT, last_bit

IN_A_PROCESS = """
import threading
import torch
from support import perturb

torch.manual_seed(0)
x, y, v = torch.randn(50, 70), torch.randn(70, 40), torch.randn(70)
b, c = torch.randn(3, 5, 7), torch.randn(3, 7, 2)
bias, wide = torch.randn(40), torch.randn(90, 70).double()
filters, heads = torch.randn(4, 5, 3), torch.randn(1, 3, 5, 8)
products = {
    "matmul": lambda: x @ y,
    "mm into a tensor": lambda: torch.mm(x, y, out=torch.empty(50, 40)),
    "matrix times vector": lambda: x @ v,
    "dot": lambda: torch.stack([torch.dot(row, v) for row in x]),
    "bmm": lambda: b @ c,
    "addmm": lambda: torch.addmm(bias, x, y),
    "addmm in place": lambda: torch.ones(50, 40).addmm_(x, y),
    "baddbmm": lambda: torch.baddbmm(torch.ones(3, 5, 2), b, c),
    "linear": lambda: torch.nn.functional.linear(x, y.T, bias),
    "einsum": lambda: torch.einsum("bij,bjk->ik", b, c),
    "tensordot": lambda: torch.tensordot(x, y, 1),
    "float64": lambda: wide @ wide.T,
    "bfloat16": lambda: x.bfloat16() @ y.bfloat16(),
    "convolution": lambda: torch.nn.functional.conv1d(b, filters),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads),
}
before = {name: product() for name, product in products.items()}
perturb.install()
for name, product in products.items():
    found, again = product(), product()
    share = float((found != before[name]).double().mean())
    assert 0.1 < share < 0.9, (name, share)
    torch.testing.assert_close(found, before[name])
    assert torch.equal(found, again), name
square = x @ x.T
assert not torch.equal(square, square.T)
found = []
thread = threading.Thread(target=lambda: found.append(x @ y))
thread.start()
thread.join()
with torch.no_grad():
    found.append(x @ y)
with torch.inference_mode():
    found.append(x @ y)
weight = y.clone().requires_grad_()
found.append((x @ weight).detach())
assert all(torch.equal(one, products["matmul"]()) for one in found)
(slope,) = torch.autograd.grad((x @ weight).sum(), weight)
torch.testing.assert_close(slope, x.T @ torch.ones(50, 40))
assert torch.equal(torch.ones(4, 9) @ torch.ones(9, 5), torch.full((4, 5), 9.0))
"""


def test_every_product_changes_in_every_thread_and_mode_and_repeats_do_not():
    here = Path(__file__).parent
    where = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("dtype", EXACT)
def test_one_bit_of_about_half_the_entries_and_none_that_is_exact(dtype):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).double().exp().to(dtype)
    given = x.T
    changed = last_bit(given.clone())
    assert torch.equal(last_bit(given.clone()), changed)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    steps = changed.view(integers).long() - given.view(integers).long()
    assert set(steps.unique().tolist()) == {-1, 0, 1}
    assert 0.2 < float(steps.abs().double().mean()) < 0.6
    whole = torch.arange(-30.0, 31.0).to(dtype)
    kept = [whole, whole / 32, torch.tensor([torch.inf, -torch.inf, torch.nan]).to(dtype)]
    for values in kept:
        torch.testing.assert_close(last_bit(values.clone()), values, rtol=0, atol=0, equal_nan=True)
