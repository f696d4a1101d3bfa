"""Derivatives of decompositions where singular values are equal, zero, or neither."""

from __future__ import annotations

import pytest
import torch
from support.close import assert_close
from torch import Tensor

from domerge_fast.algebra import derivatives
from domerge_fast.methods.spectral import space

SPECTRA = {
    "apart": [3.0, 2.0, 1.0],
    "equal": [2.0, 2.0, 1.0],
    "all equal": [1.0, 1.0, 1.0],
}
SHAPES = [(3, 3), (5, 3), (3, 4)]


def matrix(shape: tuple[int, int], values: list[float]) -> Tensor:
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=g).double())[0] for n in shape)
    return (u * torch.tensor(values)) @ v.T


def flat(x: Tensor) -> Tensor:
    """U V^T."""
    u, _, vh = derivatives.svd(x)
    return u @ vh


def cubed(x: Tensor) -> Tensor:
    """U S^3 V^T = X X^T X."""
    u, s, vh = derivatives.svd(x)
    return (u * s[..., None, :] ** 3) @ vh


def values(x: Tensor) -> Tensor:
    return derivatives.svd(x)[1].square().sum()


RIGHT = [(made, name) for made in (flat, values) for name in SPECTRA] + [(cubed, "apart")]
"""Of values that are equal, all that does not change with them."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("made", "name"), RIGHT)
def test_what_does_not_depend_on_how_vectors_are_turned_has_its_derivative(shape, made, name):
    x = matrix(shape, SPECTRA[name]).requires_grad_()
    assert torch.autograd.gradcheck(made, (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_so_has_the_polar_factor(shape, name):
    x = matrix(shape, SPECTRA[name]).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: space.polar(y[None])[0], (x,), atol=1e-6)
    with torch.no_grad():
        assert_close(space.polar(x[None])[0], flat(x), 1e-9)


def test_vectors_of_values_apart_have_theirs():
    x = matrix((5, 3), SPECTRA["apart"]).requires_grad_()

    def leading(x: Tensor) -> Tensor:
        u, s, vh = derivatives.svd(x)
        return torch.outer(u[:, 0], vh[0]) * s[1]

    assert torch.autograd.gradcheck(leading, (x,), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_are_finite_and_keep_the_range(shape):
    """Of a matrix of rank 2 that moves without leaving its range."""
    g = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 2, generator=g).double())[0] for n in shape)
    inner = torch.tensor([[2.0, 0.3], [0.1, 1.0]], dtype=torch.float64, requires_grad=True)

    def polar(inner: Tensor) -> Tensor:
        return space.polar((u @ inner @ v.T)[None])[0]

    def by_svd(inner: Tensor) -> Tensor:
        left, s, vh = derivatives.svd(u @ inner @ v.T)
        present = s > 1e-9
        return (left * present) @ (vh * present[:, None])

    assert torch.autograd.gradcheck(polar, (inner,), atol=1e-6)
    assert torch.autograd.gradcheck(by_svd, (inner,), atol=1e-6)


def test_a_matrix_of_zeros_has_derivatives_of_zero():
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    (values(x) + space.polar(x[None]).sum()).backward()
    assert torch.equal(x.grad, torch.zeros(4, 3).double())


@pytest.mark.parametrize("eigenvalues", [[3.0, 2.0, 1.0], [2.0, 2.0, 2.0], [2.0, 1.0, 0.0]])
def test_a_pseudoinverse_has_its_derivative(eigenvalues):
    g = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(3, 3, generator=g).double())[0]
    present = torch.diag(torch.tensor(eigenvalues).double().sign())
    moved = torch.diag(torch.tensor(eigenvalues).double()).requires_grad_()

    def made(moved: Tensor) -> Tensor:
        inner = present @ (moved + moved.T) @ present / 2
        return space.pseudoinverse((q @ inner @ q.T)[None])[0]

    assert torch.autograd.gradcheck(made, (moved,), atol=1e-6)
