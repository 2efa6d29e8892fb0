"""The CUDA kernels from raw projections: that they compile, and on a GPU that they equal the definition in float64."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import machine_code
import pytest
import torch
import torch.nn.functional as F
from operands import assert_close, relative_error
from projections import Projections, projections

from e88.ops import fused_tanh_delta_rule, record_backends
from e88.ops.cuda import compile as kernels
from e88.ops.cuda.plan import Edges, make_plan

TOLERANCE = 4e-3
linux = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC and Triton are on Linux")


@linux
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("n", [16, 32, 64, 128])
@pytest.mark.parametrize("gate", [False, True])
def test_registers_suffice(n: int, kernel: str, gate: bool) -> None:
    plan = make_plan(n, n, torch.bfloat16, True, False, 1792, edges=Edges(fused=True, gate=gate, narrow=True))
    code = kernels.compile_cubin(kernel, "sm_90", plan.defines(kernel == "backward"))
    # A gate takes more; what little does not fit stays in the first cache.
    assert machine_code.nvidia(code).spilled_bytes <= (96 if gate else 0)


@linux
@pytest.mark.parametrize(("K", "V"), [(24, 40), (128, 128)])
def test_the_kernel_that_adds_parts_compiles(K: int, V: int) -> None:
    plan = make_plan(K, V, torch.float16, True, True, 1792, edges=Edges(fused=True))
    assert machine_code.nvidia(kernels.compile_cubin("finish", "sm_80", plan.defines(False))).spilled_bytes == 0


def _check(x: Projections, dtype: torch.dtype = torch.bfloat16, wide: tuple[str, ...] = ()) -> None:
    """Projections rounded to `dtype`, except those in `wide`, against the definition in float64 on the same numbers,
    with q, k and v rounded as the kernels round them."""
    rounded = x.to(dtype).to(torch.float32)
    given = {name: getattr(x, name) for name in ("A_log", "dt_bias", "initial_state", "d_final", *wide)}
    exact = rounded.replace(**{name: None if v is None else v.float() for name, v in given.items()}).to("cuda")
    cast = [name for name in ("qkv", "gate", "a", "b", "dy") if name not in wide and getattr(exact, name) is not None]
    low = exact.replace(**{name: getattr(exact, name).to(dtype) for name in cast})
    # What the allocator hands out next holds no zeros.
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison
    with record_backends() as used:
        actual = low.results("auto")
    assert used == {"cuda"}
    exact = exact.to(torch.float64)
    expected = exact.results_rounded(dtype)
    if exact.dt_bias is not None:
        # Sums over tokens may cancel, so that no share of them bounds their errors. But each is the sum of its terms,
        # which are compared with float64.
        _assert_sums(actual, exact)
        for name in ("d_A_log", "d_dt_bias"):
            del actual[name], expected[name]
    assert_close(actual, expected, TOLERANCE)


def _assert_sums(results: dict[str, torch.Tensor], x: Projections) -> None:
    """The gradients of A_log and dt_bias follow from those of a, as far as rounding has left these."""
    assert x.dt_bias is not None
    z, d_a = x.a + x.dt_bias, results["d_a"].double()
    rounding = torch.finfo(results["d_a"].dtype).eps / 2 + 1e-6
    for name, terms in (("d_dt_bias", d_a), ("d_A_log", d_a * F.softplus(z) / z.sigmoid())):
        off = (results[name].double() - terms.sum((0, 1))).abs() / terms.abs().sum((0, 1)).clamp_min(1e-30)
        assert (off <= rounding).all(), f"{name}: off by {off.max():.1e} of its terms"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_that_lack_a_token_are_seen(dtype: torch.dtype) -> None:
    x = projections(2, 37, 3, 8, 8, gate=True)
    exact = x.results("reference")
    results = exact | {"d_a": exact["d_a"].to(dtype)}
    _assert_sums(results, x)
    for b, t in itertools.product((0, 1), (1, 18, 36)):
        lacking = results | {"d_dt_bias": results["d_dt_bias"] - exact["d_a"][b, t]}
        with pytest.raises(AssertionError, match="d_dt_bias: off by"):
            _assert_sums(lacking, x)


SIZES = [
    (8, 8),
    (16, 16),
    (24, 40),
    (32, 32),
    (40, 40),
    (48, 16),
    (56, 104),
    (64, 64),
    (32, 128),
    (128, 16),
    (128, 128),
]
EVERYTHING: dict[str, Any] = {"gate": True, "b": True, "state": True}


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_every_size(K: int, V: int, options: dict[str, Any]) -> None:
    _check(projections(2, 37, 3, K, V, seed=K + V, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 16, 17, 65, 300])
def test_every_length(T: int) -> None:
    _check(projections(3, T, 5, 32, 32, gate=True, seed=T))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"tied": True, **EVERYTHING},
        {"lengths": (3, 0, 17, 1, 49), **EVERYTHING},
        {"lengths": (0, 0, 5), "gate": True},
        {"decay": False, "b": True},
        {"scale": 12.0, "gate": True},
        {"zeros": True, "gate": True},
    ],
    ids=str,
)
def test_every_option(n: int, options: dict[str, Any]) -> None:
    _check(projections(K=n, V=n, H=3, **({"T": 40} | options)), wide=() if options.get("decay", True) else ("a", "b"))


@pytest.mark.gpu
def test_half_precision_and_wide_scalars() -> None:
    _check(projections(2, 40, 3, 32, 32, **EVERYTHING), torch.float16)
    _check(projections(2, 40, 3, 32, 32, **EVERYTHING), wide=("a",))
    _check(projections(2, 40, 3, 128, 128, **EVERYTHING), wide=("a", "b"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"activation": "identity"}], ids=str)
def test_what_the_float32_kernels_serve(options: dict[str, Any]) -> None:
    x = projections(2, 20, 3, 32, 32, **EVERYTHING, **({"dtype": torch.float32} | options)).to("cuda")
    assert_close(x.results("cuda"), x.to(torch.float64).results("reference"), 2e-5)


@pytest.mark.gpu
def test_long_sequences() -> None:
    x = projections(1, 3000, 2, 32, 32, gate=True)
    _check(x.replace(dt_bias=x.dt_bias - 4))


@pytest.mark.gpu
def test_columns_of_one_product() -> None:
    """Operands that lie side by side are read where they are, and so are their gradients."""
    x = projections(2, 33, 8, 32, 32, gate=True, b=True).to(torch.bfloat16).to("cuda")
    merged = torch.cat([x.qkv, x.gate, x.a, x.b], dim=-1)
    parts = merged.split([z.shape[-1] for z in (x.qkv, x.gate, x.a, x.b)], dim=-1)
    y, _ = x.replace(qkv=parts[0], gate=parts[1], a=parts[2], b=parts[3]).run("cuda")
    assert torch.equal(y, x.run("cuda")[0])
    results = x.results("cuda")
    grads = [results[f"d_{name}"] for name in ("qkv", "gate", "a", "b")]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == 1
    assert [g.storage_offset() for g in grads] == [0, 3 * 256, 4 * 256, 4 * 256 + 8]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [32, 128])
def test_results_repeat(n: int) -> None:
    x = projections(4, 100, 8, n, n, **EVERYTHING).to(torch.bfloat16).to("cuda")
    first, second = x.results("cuda"), x.results("cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    def loss(qkv: torch.Tensor, a: torch.Tensor, vector: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        sizes = {"n_heads": 2, "head_k_dim": 32, "head_v_dim": 32}
        y, _ = fused_tanh_delta_rule(qkv, a, vector, vector, gate=gate, backend=backend, **sizes)
        return (y.float() * 2).sum()

    torch.compiler.reset()
    graph = torch.compile(loss, fullgraph=True)
    for T in (24, 17):
        x = projections(2, T, 2, 32, 32, gate=True).to(torch.float32).to("cuda")
        given = (x.qkv.bfloat16(), x.a.bfloat16(), x.A_log, x.gate.bfloat16())
        leaves = [z.detach().requires_grad_() for z in given]
        with record_backends() as used:
            compiled = torch.autograd.grad(graph(*leaves), leaves)
        assert used == {backend} or T == 17
        for ours, expected in zip(compiled, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert relative_error(ours, expected) < (1e-6 if backend == "cuda" else 1e-2)
