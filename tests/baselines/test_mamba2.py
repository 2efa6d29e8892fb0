import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from e88.baselines.mamba2 import Mamba2
from e88.baselines.ssd import ssd, ssd_step
from e88.models.config import Mamba2Config


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(outputs, inputs, upstream):
    return torch.autograd.grad(sum((y * u.to(y.dtype)).sum() for y, u in zip(outputs, upstream, strict=True)), inputs)


def by_the_equations(xbc, dt, log_decay, D, state, groups):
    """The paper's recurrence, one token at a time: S = a S + dt x B^T, y = S C + D x."""
    b, T, _ = xbc.shape
    _, H, P, N = state.shape
    x, B, C = xbc.split([H * P, groups * N, groups * N], dim=2)
    x = x.reshape(b, T, H, P)
    B, C = (z.reshape(b, T, groups, N).repeat_interleave(H // groups, dim=2) for z in (B, C))
    S, ys = state, []
    for t in range(T):
        S = torch.exp(log_decay[:, t, :, None, None]) * S
        S = S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), S


def operands(b, T, R, P, N, groups, *, dtype=torch.float64, step=0.3, decay=4.0, seed=0):
    torch.manual_seed(seed)
    H = R * groups
    dt = step * torch.rand(b, T, H, dtype=dtype)
    tensors = (
        torch.randn(b, T, H * P + 2 * groups * N, dtype=dtype),
        dt,
        -decay * dt * torch.rand(H, dtype=dtype),
        torch.randn(H, dtype=dtype),
        torch.randn(b, H, P, N, dtype=dtype),
    )
    return [x.requires_grad_() for x in tensors]


@settings(max_examples=25)
@given(
    T=st.integers(1, 40), chunk=st.sampled_from([1, 4, 12, 32]), R=st.integers(1, 3), groups=st.integers(1, 3),
    P=st.integers(1, 6), N=st.integers(1, 6), decay=st.sampled_from([0.0, 4.0, 300.0]), seed=st.integers(0, 999),
)  # fmt: skip
@example(T=1, chunk=32, R=2, groups=1, P=4, N=4, decay=4.0, seed=0)
def test_chunked_form_equals_the_recurrence_in_value_and_gradient(T, chunk, R, groups, P, N, decay, seed):
    inputs = operands(2, T, R, P, N, groups, decay=decay, seed=seed)
    ours, truth = ssd(*inputs, groups=groups, chunk=chunk), by_the_equations(*inputs, groups)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    upstream = [torch.randn_like(y) for y in truth]
    for a, b in zip(gradients(ours, inputs, upstream), gradients(truth, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("chunk", "step", "decay"), [(32, 0.1, 8.0), (64, 1.0, 16.0), (16, 0.01, 1.0)])
def test_float32_is_as_exact_as_float32_can_be(poison, chunk, step, decay):
    exact = operands(1, 150, 3, 32, 64, 1, step=step, decay=decay)
    single = [x.detach().float().requires_grad_() for x in exact]
    ours, truth = ssd(*single, chunk=chunk), by_the_equations(*exact, 1)
    assert max(error(a, b) for a, b in zip(ours, truth, strict=True)) < 2e-6
    upstream = [torch.randn_like(y) for y in truth]
    pairs = zip(gradients(ours, single, upstream), gradients(truth, exact, upstream), strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_step_is_the_recurrence(groups):
    xbc, dt, log_decay, D, state = (x.detach() for x in operands(2, 1, 2, 3, 5, groups))
    y, new = ssd_step(xbc[:, 0], dt[:, 0], log_decay[:, 0], D, state, groups=groups)
    expected, final = by_the_equations(xbc, dt, log_decay, D, state, groups)
    torch.testing.assert_close(y, expected[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new, final, rtol=1e-12, atol=1e-12)


def test_parameters_are_those_of_the_library():
    """Names and shapes of mamba_ssm.modules.mamba2.Mamba2, by its documentation."""
    net = Mamba2(24, Mamba2Config(d_state=16, head_dim=8, expand=2, n_groups=2))
    inner, heads, conv = 48, 6, 48 + 2 * 2 * 16
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == {
        "in_proj.weight": (inner + conv + heads, 24), "conv1d.weight": (conv, 1, 4), "conv1d.bias": (conv,),
        "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "norm.weight": (inner,), "out_proj.weight": (24, inner),
    }  # fmt: skip
    assert torch.equal(net.D, torch.ones(heads))


def test_count_of_the_documented_model():
    with torch.device("meta"):
        net = Mamba2(1600, Mamba2Config())
    per_block = sum(p.numel() for p in net.parameters()) + 1600
    assert 32 * per_block + 256 * 1600 + 1600 == 508_309_760


def test_config_caps_the_chunk(monkeypatch):
    seen = []

    def spy(*args, chunk, **options):
        seen.append(chunk)
        return ssd(*args, chunk=chunk, **options)

    monkeypatch.setattr("e88.baselines.mamba2.ssd", spy)
    x = torch.randn(1, 40, 8)
    for chunk in (5, 256):
        Mamba2(8, Mamba2Config(d_state=4, head_dim=4, chunk=chunk))(x)
    assert seen[0] == 5 and seen[1] <= 256


@pytest.mark.parametrize("groups", [1, 2])
def test_layer_equals_transformers_mamba2(groups):
    reason = "Transformers, the maintained implementation to compare with, is not installed"
    pytest.importorskip("transformers", reason=reason)
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    D, P, N = 24, 8, 16
    ours = Mamba2(D, Mamba2Config(d_state=N, head_dim=P, n_groups=groups))
    torch.nn.init.normal_(ours.norm.weight)
    config = TheirConfig(
        hidden_size=D, num_heads=2 * D // P, head_dim=P, state_size=N, expand=2, n_groups=groups, conv_kernel=4,
        use_conv_bias=True, use_bias=False, hidden_act="silu", chunk_size=16, num_hidden_layers=1,
        layer_norm_epsilon=ours.norm.eps,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    # The same names, so the parameters load as they are.
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 45, D, requires_grad=True)
    (y, _), expected = ours(x), theirs(x)
    assert error(y, expected) < 2e-6
    a = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
    named = dict(theirs.named_parameters())
    b = torch.autograd.grad(expected.square().sum(), [x, *(named[name] for name, _ in ours.named_parameters())])
    assert max(error(p, q) for p, q in zip(a, b, strict=True)) < 1e-5


@torch.no_grad()
def test_layer_around_the_recurrence_is_the_papers():
    """Split projection, short filter with bias, SiLU, softplus step, gate before the norm, written out."""
    torch.manual_seed(1)
    D, T, P, N = 8, 9, 4, 5
    net = Mamba2(D, Mamba2Config(d_state=N, head_dim=P, conv=3)).double()
    torch.nn.init.normal_(net.norm.weight)
    torch.nn.init.normal_(net.D)
    x = torch.randn(2, T, D, dtype=torch.float64)
    z, xbc, dt = (x @ net.in_proj.weight.T).split([16, 16 + 2 * N, 4], dim=-1)
    padded, w = F.pad(xbc, (0, 0, 2, 0)), net.conv1d.weight[:, 0]
    xbc = F.silu(sum(padded[:, i : i + T] * w[:, i] for i in range(3)) + net.conv1d.bias)
    dt = torch.log1p(torch.exp(dt + net.dt_bias))
    zero = torch.zeros(2, 4, P, N, dtype=torch.float64)
    y, _ = by_the_equations(xbc, dt, -net.A_log.exp() * dt, net.D, zero, 1)
    y = y.flatten(2) * F.silu(z)
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + net.norm.eps) * net.norm.weight
    torch.testing.assert_close(net(x)[0], y @ net.out_proj.weight.T, rtol=1e-10, atol=1e-12)
