"""What the launches of Triton's descent hold to, run by the interpreter: see test_triton.py."""

from __future__ import annotations

import os

import pytest
import torch
from support.shapes import CASES, exact
from torch import Tensor

from domerge_fast.backends.gpu import phases

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_triton.py runs it with TRITON_INTERPRET"
)

NAMES = ("usual", "odd d")


def descend(**rule) -> tuple[list[Tensor], Tensor]:
    from domerge_fast.backends.gpu import triton as backend

    blocks = [exact(CASES[name].rows()) for name in NAMES]
    stacks = [torch.cat(x) for x in blocks]
    grams = [(x @ x.T).float() for x in stacks]
    return backend.orthogonalize(grams, [tuple(map(len, x)) for x in blocks], **rule)


def assert_same(found: tuple[list[Tensor], Tensor], expected: tuple[list[Tensor], Tensor]) -> None:
    assert all(map(torch.equal, found[0], expected[0]))
    assert torch.equal(found[1], expected[1])


def test_problems_that_do_not_fit_at_once_have_the_bits_of_those_that_do(monkeypatch):
    expected = descend(steps=2)
    monkeypatch.setattr(phases, "MEMORY", 1)
    assert_same(descend(steps=2), expected)


@pytest.mark.parametrize("penalty", ["squared", "frobenius"])
def test_steps_after_the_last_one_do_nothing(penalty, monkeypatch):
    expected = descend(penalty=penalty, steps=4, tol=0.1)
    assert float(expected[1][:, 0].min()) < 4
    monkeypatch.setattr(phases, "_is_captured", lambda out: True)
    assert_same(descend(penalty=penalty, steps=4, tol=0.1), expected)
