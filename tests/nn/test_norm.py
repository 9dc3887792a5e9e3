"""The norm in few operations is the norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softcfg.nn.fused import add_norm
from softcfg.nn.norm import RMSNorm


def norm_of(width: int, eps: float, dtype: torch.dtype = torch.float32) -> RMSNorm:
    norm = RMSNorm(width, eps)
    nn.init.normal_(norm.weight)
    return norm.to(dtype)


@pytest.mark.parametrize("shape", [(16, 1, 96), (3, 4, 1, 32), (2, 5, 768), (1, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_it_is_the_norm(shape: tuple[int, ...], size: float) -> None:
    norm = norm_of(shape[-1], 1e-5)
    x = size * (torch.randn(2, *shape[:-1], shape[-1]) + 0.3)[1]
    before = x.clone()
    with torch.inference_mode():
        found = norm(x)
    wanted = F.rms_norm(x.double(), shape[-1:], norm.weight.double(), 1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-7)
    assert torch.equal(x, before)


def test_an_eps_that_is_set_later_acts_in_all_ways() -> None:
    norm, x = norm_of(32, 1e-5), torch.randn(4, 1, 32)
    norm.eps = 1.0
    wanted = F.rms_norm(x, (32,), norm.weight, 1.0)
    torch.testing.assert_close(norm(x), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(norm(x), wanted)
        torch.testing.assert_close(add_norm(x, None, norm=norm)[1], wanted)
        torch.testing.assert_close(copy.deepcopy(norm)(x), wanted)


def test_zeros_stay_zeros() -> None:
    with torch.inference_mode():
        assert not norm_of(8, 1e-5)(torch.zeros(2, 8)).any()


def test_gradients_and_other_dtypes_are_pytorchs() -> None:
    norm, x = norm_of(32, 1e-6), torch.randn(4, 32, requires_grad=True)
    plain = nn.RMSNorm(32, 1e-6)
    plain.load_state_dict(norm.state_dict())
    norm(x).square().sum().backward()
    gradients, x.grad, norm_gradient = x.grad, None, norm.weight.grad
    plain(x).square().sum().backward()
    assert torch.equal(gradients, x.grad)  # type: ignore[arg-type]
    assert torch.equal(norm_gradient, plain.weight.grad)  # type: ignore[arg-type]
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float64):
            assert torch.equal(norm.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))
