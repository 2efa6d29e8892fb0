import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from e88.baselines.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, unit_lower_inverse
from e88.baselines.gated_deltanet import GatedDeltaNet
from e88.models.config import GatedDeltaNetConfig, ModelConfig


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(outputs, inputs, upstream):
    return torch.autograd.grad(sum((y * u.to(y.dtype)).sum() for y, u in zip(outputs, upstream, strict=True)), inputs)


def by_the_equations(qkv, log_decay, beta_logit, state, k_dim):
    """The paper's recurrence, one token at a time: S = a S + b k (v - a S^T k)^T, y = S^T q."""
    B, T, _ = qkv.shape
    H, K = state.shape[1], k_dim
    q, k, v = (part.reshape(B, T, H, -1) for part in qkv.split([H * K, H * K, qkv.shape[2] - 2 * H * K], dim=2))
    q, k = (part / torch.sqrt((part * part).sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    a, b, S, ys = torch.exp(log_decay), torch.sigmoid(beta_logit), state, []
    for t in range(T):
        decayed = a[:, t, :, None, None] * S
        read = torch.einsum("bhkv,bhk->bhv", decayed, k[:, t])
        S = decayed + torch.einsum("bh,bhk,bhv->bhkv", b[:, t], k[:, t], v[:, t] - read)
        ys.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5)
    return torch.stack(ys, 1), S


def operands(B, T, H, K, V, *, dtype=torch.float64, decay=0.5, seed=0):
    torch.manual_seed(seed)
    tensors = (
        torch.randn(B, T, H * (2 * K + V), dtype=dtype),
        -decay * torch.rand(B, T, H, dtype=dtype),
        torch.randn(B, T, H, dtype=dtype),
        torch.randn(B, H, K, V, dtype=dtype),
    )
    return [x.requires_grad_() for x in tensors]


@settings(max_examples=25)
@given(
    T=st.integers(1, 40), chunk=st.sampled_from([None, 1, 4, 12, 32]), H=st.integers(1, 3), K=st.integers(1, 9),
    V=st.integers(1, 9), decay=st.sampled_from([0.0, 0.5, 30.0]), seed=st.integers(0, 999),
)  # fmt: skip
@example(T=71, chunk=64, H=2, K=8, V=4, decay=0.5, seed=0)
@example(T=1, chunk=None, H=2, K=8, V=4, decay=0.5, seed=0)
def test_chunked_form_equals_the_recurrence_in_value_and_gradient(T, chunk, H, K, V, decay, seed):
    inputs = operands(2, T, H, K, V, decay=decay, seed=seed)
    ours, truth = gated_delta_rule(*inputs, k_dim=K, chunk=chunk), by_the_equations(*inputs, K)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    upstream = [torch.randn_like(y) for y in truth]
    for a, b in zip(gradients(ours, inputs, upstream), gradients(truth, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("K", "V", "decay"), [(64, 64, 0.5), (32, 64, 5.0), (128, 32, 0.01)])
def test_float32_is_as_exact_as_float32_can_be(poison, K, V, decay):
    exact = operands(1, 100, 2, K, V, decay=decay)
    single = [x.detach().float().requires_grad_() for x in exact]
    ours, truth = gated_delta_rule(*single, k_dim=K), by_the_equations(*exact, K)
    assert max(error(a, b) for a, b in zip(ours, truth, strict=True)) < 2e-6
    upstream = [torch.randn_like(y) for y in truth]
    pairs = zip(gradients(ours, single, upstream), gradients(truth, exact, upstream), strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-5


def test_equal_keys_at_full_strength_stay_exact():
    """The hardest system: every pair of keys is parallel, so powers of L would grow as binomials."""
    qkv, log_decay, _, state = (x.detach() for x in operands(1, 64, 1, 16, 16, decay=0.0))
    qkv[:, :, 16:32] = qkv[:, :1, 16:32].clone()
    logits = torch.full((1, 64, 1), 20.0, dtype=torch.float64)
    exact, _ = by_the_equations(qkv, log_decay, logits, state, 16)
    ours, _ = gated_delta_rule(*(x.float() for x in (qkv, log_decay, logits, state)), k_dim=16, chunk=64)
    assert error(ours, exact) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 16, 24, 32, 64])
def test_unit_lower_inverse(size):
    torch.manual_seed(0)
    full = torch.randn(3, size, size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    # Entries of the order of scores of unit keys, so that the inverse stays of the order of one.
    full *= 0.3
    torch.testing.assert_close((eye + full.tril(-1)) @ unit_lower_inverse(full), eye.expand(3, size, size))


def test_step_is_the_recurrence():
    qkv, log_decay, logits, state = (x.detach() for x in operands(2, 1, 3, 4, 6))
    q, k, v = (part.view(2, 3, -1) for part in qkv[:, 0].split([12, 12, 18], dim=1))
    y, new = gated_delta_rule_step(q, k, v, log_decay[:, 0], logits[:, 0], state)
    expected, final = by_the_equations(qkv, log_decay, logits, state, 4)
    torch.testing.assert_close(y, expected[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new, final, rtol=1e-12, atol=1e-12)


def parameters_of_the_library(D, H, K, V, W):
    """Names and shapes of fla.layers.GatedDeltaNet, by its documentation."""
    return {
        "q_proj.weight": (H * K, D), "k_proj.weight": (H * K, D), "v_proj.weight": (H * V, D),
        "a_proj.weight": (H, D), "b_proj.weight": (H, D), "A_log": (H,), "dt_bias": (H,),
        "q_conv1d.weight": (H * K, 1, W), "k_conv1d.weight": (H * K, 1, W), "v_conv1d.weight": (H * V, 1, W),
        "g_proj.weight": (H * V, D), "o_norm.weight": (V,), "o_proj.weight": (D, H * V),
    }  # fmt: skip


def test_parameters_are_those_of_the_library():
    net = GatedDeltaNet(24, GatedDeltaNetConfig(n_heads=3, head_dim=8, expand_v=2.0))
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    assert shapes == parameters_of_the_library(24, 3, 8, 16, 4)
    bare = GatedDeltaNet(24, GatedDeltaNetConfig(n_heads=3, head_dim=8, conv=0, gate=False)).state_dict()
    assert not any("conv" in name or "g_proj" in name for name in bare)


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "expand_v", "count"),
    [(2304, 20, 18, 1.0, 533_694_928), (1664, 24, 13, 2.0, 533_779_696)],
)
def test_counts_of_the_documented_models(dim, depth, heads, expand_v, count):
    config = ModelConfig(dim=dim, depth=depth, mixer=GatedDeltaNetConfig(n_heads=heads, expand_v=expand_v))
    with torch.device("meta"):
        net = GatedDeltaNet(dim, config.mixer)
    per_block = sum(p.numel() for p in net.parameters()) + dim
    assert depth * per_block + config.vocab_size * dim + dim == count


@pytest.fixture(scope="module")
def qwen():
    reason = "Transformers, the maintained implementation to compare with, is not installed"
    pytest.importorskip("transformers", reason=reason)
    from transformers.models.qwen3_next import modeling_qwen3_next
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

    return modeling_qwen3_next, Qwen3NextConfig


@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_operator_equals_transformers(qwen, form):
    inputs = operands(2, 70, 3, 16, 24, dtype=torch.float32)
    ours = gated_delta_rule(*inputs, k_dim=16)
    qkv, log_decay, logits, state = inputs
    q, k, v = (part.reshape(2, 70, 3, -1) for part in qkv.split([48, 48, 72], dim=2))
    theirs = getattr(qwen[0], form)(
        q, k, v, g=log_decay, beta=torch.sigmoid(logits), initial_state=state, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    if form == "torch_chunk_gated_delta_rule":
        upstream = [torch.randn_like(y) for y in ours]
        pairs = zip(gradients(ours, inputs, upstream), gradients(theirs, inputs, upstream), strict=True)
        assert max(error(a, b) for a, b in pairs) < 1e-5


@torch.no_grad()
def copy_to_qwen(ours, theirs, H):
    """Their projections interleave the parts of each head: q, k, v, z of head 0, then of head 1; b and a likewise."""

    def interleave(*weights):
        return torch.cat([w.view(H, -1, w.shape[1]) for w in weights], dim=1).flatten(0, 1)

    p = dict(ours.named_parameters())
    theirs.in_proj_qkvz.weight.copy_(interleave(*(p[f"{n}_proj.weight"] for n in "qkvg")))
    theirs.in_proj_ba.weight.copy_(interleave(p["b_proj.weight"], p["a_proj.weight"]))
    theirs.conv1d.weight.copy_(torch.cat([p[f"{n}_conv1d.weight"] for n in "qkv"]))
    theirs.norm.weight.copy_(p["o_norm.weight"])
    theirs.out_proj.weight.copy_(p["o_proj.weight"])
    theirs.A_log.copy_(p["A_log"])
    theirs.dt_bias.copy_(p["dt_bias"])


def test_layer_equals_transformers_qwen3_next(qwen):
    torch.manual_seed(0)
    D, H, K, V, T = 40, 3, 16, 32, 75
    ours = GatedDeltaNet(D, GatedDeltaNetConfig(n_heads=H, head_dim=K, expand_v=2.0))
    torch.nn.init.normal_(ours.o_norm.weight)
    module, config = qwen
    theirs = module.Qwen3NextGatedDeltaNet(
        config(
            hidden_size=D, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=K,
            linear_value_head_dim=V, linear_conv_kernel_dim=4, hidden_act="silu", rms_norm_eps=ours.o_norm.eps,
            num_hidden_layers=1, layer_types=["linear_attention"],
        ),
        layer_idx=0,
    )  # fmt: skip
    copy_to_qwen(ours, theirs, H)
    x = torch.randn(2, T, D, requires_grad=True)
    (y, _), expected = ours(x), theirs(x)
    assert error(y, expected) < 2e-6
    names = ("A_log", "dt_bias")
    ours_in = [x, ours.o_proj.weight, ours.o_norm.weight, *(getattr(ours, name) for name in names)]
    theirs_in = [x, theirs.out_proj.weight, theirs.norm.weight, *(getattr(theirs, name) for name in names)]
    a = torch.autograd.grad(y.square().sum(), ours_in)
    b = torch.autograd.grad(expected.square().sum(), theirs_in)
    assert max(error(p, q) for p, q in zip(a, b, strict=True)) < 1e-5


@torch.no_grad()
def test_gate_norm_and_convolution_are_the_papers():
    """The layer around the recurrence, written out: short filters, SiLU, gated per-head norm, output projection."""
    torch.manual_seed(1)
    D, H, K, V, T = 12, 2, 4, 8, 9
    net = GatedDeltaNet(D, GatedDeltaNetConfig(n_heads=H, head_dim=K, expand_v=2.0, conv=3)).double()
    torch.nn.init.normal_(net.o_norm.weight)
    x = torch.randn(2, T, D, dtype=torch.float64)
    parts = []
    for name in "qkv":
        z = F.pad(x @ getattr(net, f"{name}_proj").weight.T, (0, 0, 2, 0))
        w = getattr(net, f"{name}_conv1d").weight[:, 0]
        parts.append(F.silu(sum(z[:, i : i + T] * w[:, i] for i in range(3))))
    log_decay = -net.A_log.exp() * torch.log1p(torch.exp(x @ net.a_proj.weight.T + net.dt_bias))
    zero = torch.zeros(2, H, K, V, dtype=torch.float64)
    y, _ = by_the_equations(torch.cat(parts, -1), log_decay, x @ net.b_proj.weight.T, zero, K)
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + net.o_norm.eps) * net.o_norm.weight
    y = y.flatten(2) * F.silu(x @ net.g_proj.weight.T)
    torch.testing.assert_close(net(x)[0], y @ net.o_proj.weight.T, rtol=1e-10, atol=1e-12)
