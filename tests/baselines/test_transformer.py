import math

import pytest
import torch

from e88.baselines.transformer import Attention, rotate
from e88.models.config import AttentionConfig
from e88.ops.backends import record_backends


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def by_the_equations(net, x):
    """Softmax attention over the tokens so far, one query at a time."""
    B, T, D = x.shape
    H, K, theta = net.config.n_heads, net.head_dim, net.config.rope_theta
    q, k, v = (part.view(B, T, H, K) for part in (x @ net.qkv_proj.weight.T).split(D, dim=-1))

    def turned(z, t):
        out = torch.empty_like(z)
        for i in range(K // 2):
            angle = t * theta ** (-2 * i / K)
            out[..., 2 * i] = z[..., 2 * i] * math.cos(angle) - z[..., 2 * i + 1] * math.sin(angle)
            out[..., 2 * i + 1] = z[..., 2 * i] * math.sin(angle) + z[..., 2 * i + 1] * math.cos(angle)
        return out

    if net.config.qk_norm:
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    keys, out = torch.stack([turned(k[:, t], t) for t in range(T)], 1), []
    for t in range(T):
        scores = torch.einsum("bhk,bshk->bhs", turned(q[:, t], t), keys[:, : t + 1]) / math.sqrt(K)
        out.append(torch.einsum("bhs,bshk->bhk", torch.softmax(scores, -1), v[:, : t + 1]).flatten(1))
    return torch.stack(out, 1) @ net.o_proj.weight.T


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_the_formula_in_value_and_gradient(qk_norm):
    torch.manual_seed(0)
    net = Attention(12, AttentionConfig(n_heads=3, rope_theta=100.0, qk_norm=qk_norm)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    y, expected = net(x)[0], by_the_equations(net, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    inputs, upstream = [x, *net.parameters()], torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(z, inputs, upstream) for z in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = [(rotate(q, 5 + shift, 1e4) * rotate(k, 2 + shift, 1e4)).sum() for shift in (0, 1, 1000, 100_000)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4), rtol=1e-9, atol=1e-9)


def test_float32_angles_stay_exact_far_out():
    x = torch.randn(1, 4, 2, 16)
    far = rotate(x, 1_000_000, 1e4)
    torch.testing.assert_close(far, rotate(x.double(), 1_000_000, 1e4).float(), rtol=1e-5, atol=1e-6)


def test_layer_equals_transformers_gptj():
    reason = "Transformers, the maintained implementation to compare with, is not installed"
    pytest.importorskip("transformers", reason=reason)
    from transformers.models.gptj.configuration_gptj import GPTJConfig
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    torch.manual_seed(0)
    D, H, T = 32, 4, 20
    ours = Attention(D, AttentionConfig(n_heads=H))
    config = GPTJConfig(n_embd=D, n_head=H, rotary_dim=D // H, n_positions=T, attn_pdrop=0.0)
    theirs = GPTJAttention(config, layer_idx=0)
    with torch.no_grad():
        for name, weight in zip("qkv", ours.qkv_proj.weight.split(D), strict=True):
            getattr(theirs, f"{name}_proj").weight.copy_(weight)
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x = torch.randn(2, T, D, requires_grad=True)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    (y, _), (expected, _) = ours(x), theirs(x, attention_mask=mask, position_ids=torch.arange(T)[None])
    assert error(y, expected) < 1e-6
    upstream = torch.randn_like(y)
    (a,), (b,) = (torch.autograd.grad(z, x, upstream) for z in (y, expected))
    assert error(a, b) < 1e-5


def test_cache_grows_by_the_tokens_seen():
    net = Attention(8, AttentionConfig(n_heads=2))
    state = net.init_state(3)
    assert state["k"].shape == state["v"].shape == (3, 2, 0, 4)
    for length, total in ((5, 5), (1, 6), (2, 8)):
        with record_backends() as used:
            _, state = net(torch.randn(3, length, 8), state, return_state=True)
        assert used == {"torch"}
        assert state["k"].shape == state["v"].shape == (3, 2, total, 4)
