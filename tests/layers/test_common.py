import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.layers.common import GatedRMSNorm, RMSNorm, ShortConv, decay_parameters
from e88.ops.norms import l2_norm, rms_norm

EPS = 1e-5


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def plain_rms(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5), (3, 2, 4, 8)])
def test_rms_norm_and_its_gradients_are_those_of_the_formula(shape):
    x, weight = rand(*shape), rand(shape[-1])
    y, expected = rms_norm(x, weight, EPS), plain_rms(x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight), upstream)
    for grad, plain in zip(grads, torch.autograd.grad(expected, (x, weight), upstream), strict=True):
        torch.testing.assert_close(grad, plain, rtol=1e-12, atol=1e-12)


def test_rms_norm_without_weights_is_that_with_ones():
    x = rand(3, 4, 8).transpose(0, 1)
    torch.testing.assert_close(rms_norm(x, None, EPS), plain_rms(x, 1.0), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS), (x,))


def test_l2_norm_and_its_gradient_are_those_of_the_formula():
    x = rand(2, 5, 6)
    expected = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(l2_norm(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(l2_norm, (x,))


def test_norms_of_zero_are_zero_with_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    total = rms_norm(x, torch.ones(4)).sum() + l2_norm(x).sum()
    assert total == 0
    (grad,) = torch.autograd.grad(total, x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("norm", [l2_norm, rms_norm, lambda x: rms_norm(x, torch.ones(64))])
def test_norms_of_bf16_reduce_in_float32(norm):
    # The two sides differ in their last float32 bit, which in one draw of 250 turns a rounding to bf16.
    torch.manual_seed(0)
    x = torch.randn(32, 64).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, norm(x.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_is_the_formula(gate_first, groups):
    norm = GatedRMSNorm(12, EPS, gate_first=gate_first, groups=groups).double()
    torch.nn.init.normal_(norm.weight)
    x, gate = rand(2, 5, 12), rand(2, 5, 12)
    silu = gate * torch.sigmoid(gate)
    inner = x * silu if gate_first else x
    parts = inner.view(2, 5, groups, -1)
    expected = plain_rms(parts, 1.0).view(2, 5, 12) * norm.weight * (1.0 if gate_first else silu)
    y = norm(x, gate)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream, inputs = torch.randn_like(y), (x, gate, norm.weight)
    grads = torch.autograd.grad(y, inputs, upstream)
    for grad, plain in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [2, 4, 5])
def test_short_conv_is_a_causal_depthwise_conv1d(bias, width):
    conv = ShortConv(6, width, bias=bias).double()
    x = rand(3, 11, 6)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    expected = F.conv1d(padded, conv.weight, conv.bias, groups=6).transpose(1, 2)
    y, tail = conv(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tail, x[:, -(width - 1) :].transpose(1, 2))
    upstream, inputs = torch.randn_like(y), (x, *conv.parameters())
    grads = torch.autograd.grad(y, inputs, upstream)
    for grad, plain in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, plain, rtol=1e-11, atol=1e-12)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), width=st.integers(2, 5), seed=st.integers(0, 99))
def test_short_conv_in_pieces_equals_the_whole(lengths, width, seed):
    torch.manual_seed(seed)
    conv = ShortConv(4, width, bias=True).double()
    x = rand(2, sum(lengths), 4)
    whole, last = conv(x)
    tail, pieces = conv.init_tail(2), []
    for piece in x.split(lengths, dim=1):
        y, tail = conv(piece, tail)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tail, last)
    upstream, inputs = torch.randn_like(whole), (x, conv.weight)
    grads = torch.autograd.grad(torch.cat(pieces, 1), inputs, upstream)
    for grad, plain in zip(grads, torch.autograd.grad(whole, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, plain, rtol=1e-11, atol=1e-12)


def test_short_conv_initialises_as_conv1d():
    ours, theirs = ShortConv(3000, 4, bias=True), torch.nn.Conv1d(3000, 3000, 4, groups=3000)
    assert ours.weight.shape == theirs.weight.shape
    for name in ("weight", "bias"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.abs().max() <= 0.5
        assert error(a.std(), b.std()) < 0.05


def test_decay_parameters_start_in_their_ranges():
    torch.manual_seed(0)
    a_log, dt_bias = decay_parameters(5000)
    a, dt = a_log.exp(), F.softplus(dt_bias)
    assert 1 <= a.min() < 1.1 and 15.9 < a.max() <= 16 + 1e-4
    assert abs(a.mean() - 8.5) < 0.3
    assert 1e-3 * 0.99 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1 * 1.01
    assert abs(dt.log().mean() - torch.tensor([1e-3, 0.1]).log().mean()) < 0.1


def test_norms_biases_and_decays_are_exempt_from_weight_decay():
    exempt = [RMSNorm(4).weight, GatedRMSNorm(4).weight, ShortConv(4, 3, bias=True).bias, *decay_parameters(2)]
    assert all(getattr(p, "_no_weight_decay", False) for p in exempt)
    assert not hasattr(ShortConv(4, 3).weight, "_no_weight_decay")
