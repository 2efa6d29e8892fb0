"""Which of a rival's implementations runs, and that the path through a library is the layer's own function."""

import os
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from e88.baselines import libraries, mamba2, transformer
from e88.baselines.libraries import Library, choose, version_numbers
from e88.errors import UserError
from e88.layers.mixer import build_mixer, rival_libraries
from e88.models.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config
from e88.ops import backends, record_backends

DIM = 32
CONFIGS = {
    "gdn": GatedDeltaNetConfig(n_heads=2, head_dim=16, expand_v=2.0),
    "gdn-bare": GatedDeltaNetConfig(n_heads=3, head_dim=16, conv=0, gate=False),
    "mamba2": Mamba2Config(d_state=8, head_dim=16, chunk=8),
    "mamba2-groups": Mamba2Config(d_state=4, head_dim=16, n_groups=2, conv=3),
}
LIBRARY = {"gdn": "fla", "mamba2": "mamba-ssm"}


@pytest.fixture
def everywhere(monkeypatch):
    """The libraries serve any device and dtype, under these names in records."""
    rows = {n: Library(missing=lambda: None, mode=lambda n=n: f"{n} 1.0") for n in libraries.LIBRARIES}
    monkeypatch.setattr(libraries, "LIBRARIES", rows)
    monkeypatch.setattr(libraries, "_misplaced", lambda device, dtype: None)


def module(monkeypatch, name, **functions):
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))


def conv_silu(x, weight, bias=None):
    """The short convolution and its SiLU: x [B, T, C], weight [C, W]."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight)).transpose(1, 2))


@pytest.fixture
def fla(monkeypatch, everywhere):
    """fla's functions as its documentation gives them, one token at a time."""

    def causal_conv1d(x, weight, activation):
        assert activation == "silu"
        return conv_silu(x, weight), None

    def chunk_gated_delta_rule(q, k, v, g, beta, *, A_log, dt_bias, initial_state, output_final_state, **flags):
        assert flags.pop("state_v_first") == (initial_state is None and not output_final_state)
        assert flags == dict.fromkeys(
            ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True
        )
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        decay = torch.exp(-A_log.exp() * F.softplus(g + dt_bias))
        S = q.new_zeros(len(q), *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state
        ys = []
        for t in range(q.shape[1]):
            S = decay[:, t, :, None, None] * S
            error = (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])) * beta[:, t].sigmoid().unsqueeze(-1)
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
            ys.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * q.shape[-1] ** -0.5)
        return torch.stack(ys, 1), S if output_final_state else None

    def rms_norm_gated(x, g, weight, bias, *, eps):
        assert bias is None
        return F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(g)

    module(monkeypatch, "fla", __path__=[])
    module(monkeypatch, "fla.modules", __path__=[])
    module(monkeypatch, "fla.ops", __path__=[])
    module(monkeypatch, "fla.modules.convolution", causal_conv1d=causal_conv1d)
    module(monkeypatch, "fla.modules.fused_norm_gate", rms_norm_gated=rms_norm_gated)
    module(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)


@pytest.fixture(params=["fused", "scan"])
def mamba(request, monkeypatch, everywhere):
    """mamba-ssm's functions as its documentation gives them, with and without causal-conv1d."""

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, *, D, dt_bias, dt_softplus, initial_states, return_final_states
    ):
        assert dt_softplus and return_final_states
        dt = F.softplus(dt + dt_bias)
        B, C = (z.repeat_interleave(x.shape[2] // z.shape[2], dim=2) for z in (B, C))
        S = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
        ys = []
        for t in range(x.shape[1]):
            S = torch.exp(dt[:, t] * A)[..., None, None] * S
            S = S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
            ys.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]) + D[:, None] * x[:, t])
        return torch.stack(ys, 1), S

    def rmsnorm_fn(x, weight, bias, *, z, eps, group_size, norm_before_gate):
        assert bias is None and not norm_before_gate
        parts = (x * F.silu(z)).unflatten(-1, (-1, group_size))
        return F.rms_norm(parts, (group_size,), None, eps).flatten(-2) * weight

    def mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, chunk_size, *, activation, headdim, ngroups, rmsnorm_weight, rmsnorm_eps,
        norm_before_gate, outproj_weight,
    ):  # fmt: skip
        assert activation == "silu"
        inner = len(A) * headdim
        z, xbc, dt = zxbcdt.split([inner, len(weight), len(A)], dim=-1)
        shared = (len(weight) - inner) // 2
        x, B, C = conv_silu(xbc, weight, bias).split([inner, shared, shared], dim=-1)
        x, B, C = x.unflatten(-1, (-1, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
        y, _ = mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True, initial_states=None,
            return_final_states=True,
        )  # fmt: skip
        size = inner // ngroups
        y = rmsnorm_fn(
            y.flatten(2), rmsnorm_weight, None, z=z, eps=rmsnorm_eps, group_size=size, norm_before_gate=norm_before_gate
        )
        return F.linear(y, outproj_weight)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module(monkeypatch, name, __path__=[])
    module(
        monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined=mamba_split_conv1d_scan_combined,
    )  # fmt: skip
    module(monkeypatch, "mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=rmsnorm_fn)
    monkeypatch.setattr(mamba2, "mamba_is_fused", lambda: request.param == "fused")


def same_function(name):
    """The path through the library equals our own in value, gradient and carried state, in float64."""
    torch.manual_seed(0)
    net = build_mixer(DIM, CONFIGS[name]).double()
    x = torch.randn(2, 21, DIM, dtype=torch.float64, requires_grad=True)
    upstream, found = torch.randn(2, 21, DIM, dtype=torch.float64), {}
    for backend in (LIBRARY[name.partition("-")[0]], "torch"):
        net.backend = backend
        y, none = net(x)
        first, state = net(x[:, :8], return_state=True)
        second, state = net(x[:, 8:20], state, return_state=True)
        last, state = net.step(x[:, 20], state)
        gradients = torch.autograd.grad(y, [x, *net.parameters()], upstream)
        assert none is None
        found[backend] = [y, torch.cat([first, second, last.unsqueeze(1)], 1), *state.values(), *gradients]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["gdn", "gdn-bare"])
def test_gated_deltanet_through_fla_is_the_same_function(name, fla):
    same_function(name)


@pytest.mark.parametrize("name", ["mamba2", "mamba2-groups"])
def test_mamba2_through_mamba_ssm_is_the_same_function(name, mamba):
    same_function(name)


def test_auto_takes_the_library_and_the_record_says_so(everywhere):
    with record_backends() as used:
        assert choose("auto", torch.zeros(1), fla=None) == "fla"
        assert choose("mamba-ssm", torch.zeros(1), mamba_ssm=None) == "mamba-ssm"
        assert choose("auto", torch.zeros(1), cudnn="too wide", flash=None) == "flash"
        assert choose("torch", torch.zeros(1), fla=None) == "torch"
    assert used == {"fla 1.0", "mamba-ssm 1.0", "flash 1.0", "torch"}


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "attention"])
def test_on_a_cpu_our_own_code_runs_without_a_word(kind):
    config = {
        "gated_deltanet": CONFIGS["gdn"], "mamba2": CONFIGS["mamba2"], "attention": AttentionConfig(n_heads=2)
    }[kind]  # fmt: skip
    net = build_mixer(DIM, config)
    with record_backends() as used, warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(1, 5, DIM))
    assert used == {"torch"}


@pytest.mark.parametrize("name", ["gdn", "mamba2"])
def test_a_request_that_cannot_be_met_says_why(name):
    net = build_mixer(DIM, CONFIGS[name])
    net.backend = LIBRARY[name]
    with pytest.raises(UserError, match=f"'{LIBRARY[name]}' cannot serve .* CUDA tensors only, not on cpu"):
        net(torch.randn(1, 5, DIM))
    net.backend = "cuda"
    with pytest.raises(UserError, match=f"unknown backend 'cuda'.*auto.*{LIBRARY[name]}.*torch"):
        net(torch.randn(1, 5, DIM))


def test_a_fallback_on_a_gpu_is_announced_once_with_its_reason(monkeypatch):
    monkeypatch.setattr(backends, "_announced", set())
    broken = Library(missing=lambda: "it is broken; install another", mode=lambda: "fla")
    monkeypatch.setitem(libraries.LIBRARIES, "fla", broken)
    arguments = ("auto", "cuda", torch.bfloat16, (("fla", None),))
    with pytest.warns(UserWarning, match="slow PyTorch code .*fla: it is broken; install another"):
        assert libraries._chosen(*arguments) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert libraries._chosen(*arguments) == "torch"
        # Nobody who asks for float32 is told that half precision would be faster.
        assert libraries._chosen("auto", "cuda", torch.float32, (("fla", None),)) == "torch"
    with pytest.raises(UserError, match="it is broken; install another"):
        libraries._chosen("fla", *arguments[1:])


@pytest.mark.filterwarnings("ignore:this model runs on slow")
def test_attention_knows_which_kernel_fits_its_heads_and_queries(everywhere, monkeypatch):
    taken = []
    real = transformer.sdpa_kernel
    monkeypatch.setattr(
        transformer, "sdpa_kernel", lambda kernels, set_priority: taken.append(kernels[0]) or real(SDPBackend.MATH)
    )
    for dim, length in ((64, 5), (64, 1), (512, 5), (24, 5)):
        net = build_mixer(dim, AttentionConfig(n_heads=2))
        first, state = net(torch.randn(1, length, dim), return_state=True)
        # A prompt after a prompt needs a mask, and runs where PyTorch can.
        net(torch.randn(1, 3, dim), state)
    assert taken == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.FLASH_ATTENTION]


def test_float32_and_unfit_models_are_refused(monkeypatch):
    monkeypatch.setitem(libraries.LIBRARIES, "fla", Library(missing=lambda: None, mode=lambda: "fla"))
    for dtype, misfit, reason in ((torch.float32, None, "half precision"), (torch.bfloat16, "too odd", "too odd")):
        with pytest.raises(UserError, match=reason):
            libraries._chosen("fla", "cuda", dtype, (("fla", misfit),))
    assert build_mixer(12, GatedDeltaNetConfig(n_heads=2, head_dim=6))._misfit()
    assert build_mixer(12, Mamba2Config(d_state=5, head_dim=4))._misfit()
    assert build_mixer(16, Mamba2Config(d_state=8, head_dim=4, conv=5))._misfit()


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with fla installed; returns a function that sets Triton's version and whether TileLang serves."""

    def machine(triton, tilelang, version="0.6.0"):
        libraries.fla_missing.cache_clear()
        monkeypatch.setattr(libraries, "_absent", lambda *names: None)
        monkeypatch.setattr(libraries, "_load", lambda name: SimpleNamespace())
        monkeypatch.setattr(libraries, "package_version", lambda name: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
        module(monkeypatch, "triton", __version__=triton)
        monkeypatch.setattr(libraries, "_tilelang_serves", lambda: tilelang)
        module(monkeypatch, "tilelang", set_log_level=lambda level: None)
        return libraries.fla_missing()

    yield machine
    libraries.fla_missing.cache_clear()


@pytest.mark.parametrize(
    ("triton", "tilelang", "refused"),
    [("3.3.1", False, False), ("3.4.0", False, True), ("3.6.0", False, True), ("3.7.0+git1", False, True),
     ("3.7.1", False, False), ("3.6.0", True, False)],
)  # fmt: skip
def test_wrong_gradients_on_hopper_are_refused(hopper, triton, tilelang, refused):
    reason = hopper(triton, tilelang)
    assert (reason is not None) == refused
    if refused:
        assert triton in reason and "tilelang" in reason


def test_an_old_fla_is_refused(hopper):
    assert "older than 0.6" in hopper("3.7.1", False, version="0.5.9")


def test_a_library_that_does_not_import_is_no_crash(tmp_path, monkeypatch):
    (tmp_path / "broken_library_of_a_rival.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = libraries._load("broken_library_of_a_rival")
    assert isinstance(reason, str) and "there_is_no_such_module" in reason and "\n" not in reason


def test_mamba_keeps_what_it_tuned_unless_the_user_says_otherwise(monkeypatch):
    loaded = []
    monkeypatch.setattr(libraries, "_absent", lambda *names: None)
    monkeypatch.setattr(libraries, "_load", lambda name: loaded.append(os.environ["TRITON_CACHE_AUTOTUNING"]))
    monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", "0")
    assert libraries.mamba_missing.__wrapped__() is None
    monkeypatch.delenv("TRITON_CACHE_AUTOTUNING")
    assert libraries.mamba_missing.__wrapped__() is None
    assert loaded == ["0", "1"]


def test_versions_compare_as_numbers():
    assert version_numbers("3.10.2+cu130") == (3, 10, 2) > version_numbers("3.9") > version_numbers("dev") == ()


def test_status_names_every_library():
    assert rival_libraries().keys() == {"fla", "mamba-ssm", "cudnn", "flash"}
    for text in rival_libraries().values():
        assert text.startswith(("ready: ", "no: "))
