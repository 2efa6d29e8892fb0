"""The CUDA kernels: that they compile everywhere, and on a GPU that they equal the reference in float64."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import machine_code
import pytest
import torch
from machine_code import Usage
from operands import Operands, assert_close, operands

from e88.ops import tanh_delta_rule
from e88.ops.cuda import compile as kernels
from e88.ops.cuda.plan import Edges, Plan, make_plan
from e88.ops.cuda.recurrence import run

BF16 = 5e-3
FLOAT32 = 2e-5
HEADS = 1792
KERNELS = ["forward", "backward"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC and Triton are on Linux")


def _usage(kernel: str, plan: Plan, arch: str) -> Usage:
    """What NVRTC makes of the kernel; it needs no GPU. The package's development tools bring NVRTC."""
    name = f"{kernel}_float" if plan.precise else kernel
    return machine_code.nvidia(kernels.compile_cubin(name, arch, plan.defines(kernel == "backward")))


@linux
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("K", "V", "dtype"), [(32, 32, torch.bfloat16), (64, 64, torch.float16), (24, 40, torch.float32)]
)
def test_compiles_for_every_generation(kernel: str, arch: str, K: int, V: int, dtype: torch.dtype) -> None:
    usage = _usage(kernel, make_plan(K, V, dtype, True, False, HEADS), arch)
    # A limit set for more blocks at a time may cost a few registers, which stay in the cache.
    assert usage.registers >= 32 and usage.spilled_bytes <= 32


@linux
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("K", "V"), [(128, 16), (8, 120), (16, 8)])
def test_compiles_however_unequal_the_sides(K: int, V: int, fused: bool, kernel: str) -> None:
    plan = make_plan(K, V, torch.bfloat16, True, True, HEADS, edges=Edges(fused=fused))
    assert _usage(kernel, plan, "sm_90").spilled_bytes <= 64


@linux
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [8, 16, 40, 96, 128])
def test_registers_suffice(n: int, kernel: str) -> None:
    assert _usage(kernel, make_plan(n, n, torch.bfloat16, True, False, HEADS), "sm_90").spilled_bytes == 0


@linux
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_needs_too_many_registers_is_seen_to_spill(kernel: str) -> None:
    plan = make_plan(128, 128, torch.bfloat16, True, False, HEADS)
    crowded = replace(plan, forward_blocks=16, backward_blocks=16)
    assert _usage(kernel, crowded, "sm_90").spilled_bytes > 0


@linux
def test_code_that_does_not_compile_says_so() -> None:
    defines = make_plan(32, 32, torch.bfloat16, True, False).defines(False)
    with pytest.raises(RuntimeError, match="NVRTC cannot compile the forward kernel"):
        kernels.compile_cubin("forward", "sm_90", defines | {"TILES": 0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("limit", [101376, 232448])
def test_plans_fit(dtype: torch.dtype, limit: int) -> None:
    for K in range(8, 129, 8):
        for V in range(8, 129, 8):
            for heads in (1, HEADS):
                plan = make_plan(K, V, dtype, True, True, heads, limit)
                assert plan.shared_bytes <= limit
                assert plan.cols * plan.splits >= V and plan.cols * (plan.splits - 1) < V
                assert plan.chunk % plan.segment == 0
                assert plan.threads(True) % 32 == 0 and plan.threads(True) <= 1024


def test_headers_are_put_in_place() -> None:
    for kernel in ("forward", "backward", "forward_float", "backward_float"):
        text = kernels.source(kernel)
        assert "#include" not in text
        assert f"__launch_bounds__(THREADS, BLOCKS)\ne88_{kernel.split('_')[0]}(" in text


@linux
def test_cache_is_read_and_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E88_CACHE", str(tmp_path))
    plan = make_plan(8, 8, torch.bfloat16, True, False)
    code = kernels.compile_cubin("forward", "sm_90", plan.defines(False))
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == code
    path.write_bytes(b"kept")
    assert kernels.compile_cubin("forward", "sm_90", plan.defines(False)) == b"kept"
    assert kernels.compile_cubin("forward", "sm_80", plan.defines(False)) != b"kept"


def _on_gpu(drawn: Operands) -> Operands:
    moved = {name: x.cuda() for name, x in vars(drawn).items() if isinstance(x, torch.Tensor)}
    return replace(drawn, **moved)


def _check(drawn: Operands, dtype: torch.dtype, tolerance: float) -> None:
    """Inputs rounded to `dtype`, gates and states in float32, against the reference in float64 on the same numbers."""
    drawn = _on_gpu(drawn)
    rounded = {name: getattr(drawn, name).to(dtype) for name in ("q", "k", "v", "dy")}
    floats = {name: getattr(drawn, name) for name in ("g", "beta", "initial_state", "d_final")}
    given = replace(drawn, **rounded, **{name: None if x is None else x.float() for name, x in floats.items()})
    # What the allocator hands out next holds no zeros.
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison
    assert_close(given.results("cuda"), given.to(torch.float64).results("reference"), tolerance)


SIZES = [(8, 8), (16, 16), (24, 40), (32, 32), (40, 24), (56, 104), (64, 64), (32, 128), (128, 16), (128, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_size(K: int, V: int, dtype: torch.dtype) -> None:
    _check(operands(2, 37, 3, K, V, seed=K + V), dtype, BF16 if dtype == torch.bfloat16 else FLOAT32)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("H", [1, 100])
def test_every_length(T: int, H: int) -> None:
    _check(operands(8 if H == 100 else 2, T, H, 32, 32, gate=False, state=False, seed=T), torch.bfloat16, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16, 32, 64])
def test_long_sequences(n: int) -> None:
    _check(operands(1, 3000, 2, n, n, log_decay=(-0.02, 0.0), seed=n), torch.bfloat16, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.01, 1.0, 12.0])
@pytest.mark.parametrize("log_decay", [(-0.001, 0.0), (-40.0, -5.0), (-2.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saturation_and_decay(scale: float, log_decay: tuple[float, float], dtype: torch.dtype) -> None:
    drawn = operands(2, 40, 3, 32, 32, scale=scale, log_decay=log_decay)
    drawn.k[:, 5] = 0
    drawn.k[:, 6] *= 3
    _check(drawn, dtype, BF16 if dtype == torch.bfloat16 else FLOAT32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_sequences(dtype: torch.dtype) -> None:
    drawn = operands(H=3, K=32, V=32, lengths=(3, 0, 17, 1, 49))
    _check(drawn, dtype, BF16 if dtype == torch.bfloat16 else FLOAT32)


@pytest.mark.gpu
def test_half_precision_and_identity() -> None:
    _check(operands(2, 40, 3, 32, 32), torch.float16, BF16)
    _check(operands(2, 40, 3, 32, 32, activation="identity"), torch.bfloat16, BF16)
    _check(operands(2, 40, 3, 32, 32, activation="identity"), torch.float32, FLOAT32)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_any_finite_size_gives_numbers(size: float) -> None:
    drawn = _on_gpu(operands(1, 20, 2, 32, 32))
    for name in ("q", "k", "v", "dy"):
        given = replace(drawn, **{name: getattr(drawn, name) * size}).to(torch.bfloat16)
        for value in given.results("cuda").values():
            assert torch.isfinite(value).all()


@pytest.mark.gpu
def test_views_of_one_projection() -> None:
    drawn = _on_gpu(operands(2, 33, 3, 32, 32)).to(torch.bfloat16)
    merged = torch.cat([drawn.q.flatten(2), drawn.k.flatten(2), drawn.v.flatten(2)], dim=-1)
    q, k, v = (x.unflatten(-1, (3, 32)) for x in merged.split(96, dim=-1))
    y, _ = tanh_delta_rule(q, k, v, drawn.g.float(), backend="cuda")
    expected, _ = tanh_delta_rule(drawn.q, drawn.k, drawn.v, drawn.g.float(), backend="cuda")
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_compiles_as_one_graph() -> None:
    drawn = _on_gpu(operands(2, 24, 2, 32, 32)).to(torch.bfloat16)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        y, state = run(q, k, v, g, None, None, None, "tanh")
        return (y.float() * 2).sum() + state.sum()

    def gradients(function: object) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (drawn.q, drawn.k, drawn.v, drawn.g.float())]
        return list(torch.autograd.grad(function(*leaves), leaves))  # type: ignore[operator]

    for ours, expected in zip(gradients(torch.compile(loss, fullgraph=True)), gradients(loss), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_results_repeat() -> None:
    drawn = _on_gpu(operands(4, 100, 8, 32, 32)).to(torch.bfloat16)
    first, second = drawn.results("cuda"), drawn.results("cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)
