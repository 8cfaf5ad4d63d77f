"""Quicker linear layers: what PyTorch's compute, and its gradients."""

import gc
import weakref

import pytest
import torch
from torch import nn

from vlm.models import linear
from vlm.models.linear import _transposed, quicken, weight_gradient
from vlm.runtime import onednn

SHAPES = [  # rows, width in, width out; 16,411 is prime
    (16384, 128, 256),
    (16384, 256, 128),
    (16384, 128, 128),
    (16411, 128, 256),
    (64, 128, 256),
]


@pytest.mark.parametrize(("rows", "width_in", "width_out"), SHAPES)
def test_the_gradient_of_a_weight_is_the_product(rows, width_in, width_out):
    x, of_out = (torch.randn(rows, width).bfloat16() for width in (width_in, width_out))
    found = weight_gradient(of_out, x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, of_out.float().T @ x.float(), rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("shape", [(512, 6), (394, 5), (257, 3), (1, 4)])
def test_a_transposed_copy_is_one(shape):
    matrix = torch.randn(shape).bfloat16()
    assert _transposed(matrix).equal(matrix.T)
    assert _transposed(matrix, torch.float32).equal(matrix.T.float())
    assert _transposed(matrix).is_contiguous()


@pytest.fixture
def layers():
    """Two equal networks, of which the second is quicker."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False))]
    networks.append(nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False)))
    networks[1].load_state_dict(networks[0].state_dict())
    quicken(networks[1])
    return networks


def test_a_quick_layer_goes_when_its_model_does(layers):
    layer = weakref.ref(layers[1][0])
    gc.disable()
    try:
        layers.pop()
        assert layer() is None
    finally:
        gc.enable()


def run(network, x):
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x)
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *network.parameters()])
    return out, gradients


def test_under_autocast_it_computes_the_same(layers):
    x = torch.randn(64, 256, 128, requires_grad=True)
    (out, gradients), (quick, of_quick) = (run(network, x) for network in layers)
    assert quick.dtype == torch.bfloat16
    torch.testing.assert_close(quick, out, rtol=2**-7, atol=2**-7)
    for one, two in zip(gradients, of_quick, strict=True):
        assert two.dtype == torch.float32
        torch.testing.assert_close(two, one, rtol=2e-2, atol=2e-2 * float(one.abs().max()))


def test_elsewhere_it_is_the_layer_that_it_was(layers):
    x = torch.randn(4, 128)
    assert layers[1](x).equal(layers[0](x))
    assert layers[1](x).dtype == torch.float32


def test_what_is_frozen_gets_no_gradient(layers):
    quick = layers[1]
    quick[0].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        quick(torch.randn(16384, 128)).float().sum().backward()
    assert quick[0].weight.grad is None
    assert quick[2].weight.grad.dtype == torch.float32


def gradients_of(network, x):
    out = network(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])]


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="PyTorch without oneDNN")
def test_in_fp32_it_computes_the_same(layers, monkeypatch):
    """On any processor, for it is asked on AMD's alone."""
    monkeypatch.setattr(onednn, "is_quickest_in_fp32", lambda: True)
    calls = []
    monkeypatch.setattr(
        onednn, "linear", lambda *given, plain=onednn.linear: calls.append(given) or plain(*given)
    )
    small, large = (torch.randn(rows, 128, 128, requires_grad=True) for rows in (1, 32))
    assert large.numel() * 256 == linear._MIN_PRODUCTS
    for one, two in zip(*(gradients_of(network, large) for network in layers), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * float(one.detach().abs().max()))
    assert len(calls) == 4  # two layers, forward and backward
    assert layers[1](small).equal(layers[0](small))
    assert len(calls) == 4
    layers[1].double()(large.double())
    assert len(calls) == 4
