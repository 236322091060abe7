"""The second moment of a layer's inputs, and its factor."""

from __future__ import annotations

import pytest
import torch

from optimize.blockwise.hessian import Hessian, factorise


def test_a_hessian_is_the_mean_over_all_finite_tokens() -> None:
    x = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) + 1
    expected = x.T.double() @ x.double() / 300
    hessian = Hessian(50)
    for chunk in x.split([1, 128, 171]):
        hessian.add(chunk)
    bad = torch.ones(3, 50)
    bad[0, 4], bad[1, 0] = torch.nan, -torch.inf
    hessian.add(bad[:2])
    assert (hessian.tokens, hessian.dropped) == (300, 2)
    assert torch.allclose(hessian.matrix.double(), expected, rtol=1e-5)
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    twice = Hessian(50)
    twice.add(torch.cat([x, x]))
    assert torch.allclose(twice.matrix.double(), expected, rtol=1e-5)
    half = Hessian(50)
    half.add(x.to(torch.bfloat16))
    assert half.matrix.dtype == torch.float32
    narrow = x.to(torch.bfloat16).double()
    assert torch.allclose(half.matrix.double(), narrow.T @ narrow / 300, rtol=1e-5)  # nothing more is lost


@pytest.mark.parametrize("flipped", [False, True])
def test_the_factor_makes_up_the_damped_hessian(flipped: bool) -> None:
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 40)
    hessian = Hessian(40)
    hessian.add(x)
    order = torch.arange(40).flip(0) if flipped else torch.arange(40)
    factors = factorise(hessian.matrix, order, 0.02)
    assert factors.damp_percent == 0.02
    assert factors.ridge == pytest.approx(0.02 * float(hessian.matrix.diagonal().mean()), rel=1e-5)
    unit = factors.feedback.triu(1).double() + torch.eye(40)
    made = unit @ factors.variances[order].double().diag() @ unit.T
    wanted = hessian.matrix.double() + factors.ridge * torch.eye(40)
    assert torch.allclose(made, wanted[order][:, order], rtol=1e-4, atol=1e-5)
