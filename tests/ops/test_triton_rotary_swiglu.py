"""The Transformer's own kernels, rotary positions and SwiGLU, against float64: under Triton's interpreter, on a GPU,
and compiled without either.

Triton asks for its interpreter once, when it is imported. So tests of numbers are marked for a GPU, and one test
runs them again in a process of their own, where TRITON_INTERPRET is set and the mark is not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import machine_code
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from e88.baselines.transformer import _turns, rotate

triton = pytest.importorskip("triton")

from e88.ops.triton import conv, rotary, swiglu  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
# One rounding of a result to its dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
START, THETA = 1000, 500.0


def in_a_wider_row(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random [..., C], each row a part of one of C + 9."""
    torch.manual_seed(sum(shape))
    wide = torch.randn(*shape[:-1], shape[-1] + 9, device=DEVICE).to(dtype)
    return wide[..., 4 : 4 + shape[-1]]


def projection(B: int, T: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return in_a_wider_row(B, T, 3 * H * K, dtype=dtype).unflatten(-1, (3, H, K)).requires_grad_()


def turned(qkv: Tensor) -> tuple[Tensor, ...]:
    tables = _turns(START, qkv.shape[1], qkv.shape[-1] // 2, THETA, qkv.device, torch.float32)
    return rotary.split_rotated(qkv, *tables)


def exactly_turned(qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(2)
    return rotate(q, START, THETA), rotate(k, START, THETA), v


def gated(gate_up: Tensor) -> tuple[Tensor, ...]:
    return (swiglu.swiglu(gate_up),)


def exactly_gated(gate_up: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up,)


Function = Callable[[Tensor], tuple[Tensor, ...]]


def check(kernel: Function, exact: Function, x: Tensor, upstream: list[Tensor]) -> None:
    """Results and gradient are those in float64 but for a rounding, packed, and in x's dtype; without gradients too."""
    wide = x.detach().cpu().double().contiguous().requires_grad_()
    results, expected = kernel(x), exact(wide)
    assert all(y.is_contiguous() for y in results)
    (dx,) = torch.autograd.grad(results, x, upstream)
    (expected_dx,) = torch.autograd.grad(expected, wide, [d.cpu().double() for d in upstream])
    assert dx.is_contiguous()
    for got, want in zip((*results, dx), (*expected, expected_dx), strict=True):
        assert got.dtype == x.dtype and got.shape == want.shape
        assert (got.detach().cpu().double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(kernel(x), results, strict=True))


def check_turn(B: int, T: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> None:
    # As attention may hand them over: tokens of a head side by side, heads of a token side by side, in a wider row.
    layouts = (
        torch.randn(B, H, T, K, device=DEVICE).to(dtype).transpose(1, 2),
        torch.randn(B, T, H, K, device=DEVICE).to(dtype),
        in_a_wider_row(B, T, H, K, dtype=dtype),
    )
    check(turned, exactly_turned, projection(B, T, H, K, dtype), list(layouts))


@on_device
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("H", [1, 3, 12])
@pytest.mark.parametrize("K", [2, 8, 24, 40, 64, 96, 128])
def test_rotary_shapes(T: int, H: int, K: int) -> None:
    check_turn(2, T, H, K)


@on_device
@dtypes
def test_rotary_dtypes(dtype: torch.dtype) -> None:
    check_turn(3, 5, 3, 32, dtype)


@on_device
def test_rotary_where_only_some_results_have_gradients() -> None:
    qkv = projection(2, 5, 3, 8)
    upstream = [torch.randn(2, 5, 3, 8, device=DEVICE) for _ in range(3)]
    for given in ([0], [1], [2], [0, 2]):
        chosen = [upstream[i] for i in given]
        (got,) = torch.autograd.grad([turned(qkv)[i] for i in given], qkv, chosen)
        whole = [d if i in given else torch.zeros_like(d) for i, d in enumerate(upstream)]
        # On a GPU another compilation of the kernel, which may contract a * b + c * d in another order.
        error = 0 if INTERPRETED else 1e-6
        torch.testing.assert_close(got, torch.autograd.grad(turned(qkv), qkv, whole)[0], rtol=error, atol=error)


@on_device
def test_rotary_half_precision_keeps_its_dtype_without_a_gradient_of_q() -> None:
    qkv = projection(1, 3, 2, 8, torch.bfloat16)
    (found,) = torch.autograd.grad(turned(qkv)[2].float().sum(), qkv)
    assert found.dtype == torch.bfloat16 and not found[:, :, :2].any() and found[:, :, 2].eq(1).all()


@on_device
def test_rotary_of_columns_that_lie_apart() -> None:
    qkv = torch.randn(8, 3, 2, 5, 2, device=DEVICE).permute(4, 3, 1, 2, 0).requires_grad_()
    upstream = [torch.randn(8, 2, 5, 2, device=DEVICE).permute(3, 2, 1, 0) for _ in range(3)]
    check(turned, exactly_turned, qkv, upstream)


@on_device
@pytest.mark.parametrize("M", [1, 3, 31, 256, 1023, 1024, 1025, 2100])
@dtypes
def test_swiglu_widths_and_dtypes(M: int, dtype: torch.dtype) -> None:
    x = in_a_wider_row(2, 3, 2 * M, dtype=dtype).requires_grad_()
    check(gated, exactly_gated, x, [in_a_wider_row(2, 3, M, dtype=dtype)])


@on_device
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 1, 3, 6)])
def test_swiglu_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE).requires_grad_()
    check(gated, exactly_gated, x, [torch.randn(*shape[:-1], 3, device=DEVICE)])


@on_device
def test_swiglu_of_columns_that_lie_apart() -> None:
    x, dy = torch.randn(10, 4, device=DEVICE).t().requires_grad_(), torch.randn(5, 4, device=DEVICE).t()
    check(gated, exactly_gated, x, [dy])


@on_device
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_swiglu_far_out() -> None:
    """A gate of 100 either way, where exp overflows float32, is the identity or nothing."""
    x = torch.tensor([[100.0, -100.0, 2.0, 3.0]], device=DEVICE).requires_grad_()
    check(gated, exactly_gated, x, [torch.ones(1, 2, device=DEVICE)])


@on_device
def test_nothing() -> None:
    for f, shape in ((turned, (0, 3, 3, 2, 8)), (turned, (2, 0, 3, 2, 8)), (gated, (0, 6)), (gated, (2, 0, 6))):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        (found,) = torch.autograd.grad([y.sum() for y in f(x)], x)
        assert found.shape == shape


@on_device
@pytest.mark.parametrize("f", [turned, gated])
def test_compiles_as_one_graph(f: Function) -> None:
    x = projection(2, 5, 3, 8)

    def run(x: Tensor) -> Tensor:
        return sum((i + 1) * y.square().sum() for i, y in enumerate(f(2 * x)))

    torch.compiler.reset()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    (got,), (expected,) = (torch.autograd.grad(g(x), x) for g in (graph, run))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@compiled
def test_the_same_in_the_interpreter(passed_in_the_interpreter: Callable[[str], int]) -> None:
    # Had the tests been deselected, they would have passed too.
    assert passed_in_the_interpreter(__file__) >= 90


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("shape", [(32, 512, 12, 128), (3, 777, 5, 96), (1, 4000, 7, 64)])
def test_rotary_at_full_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_turn(*shape, dtype=dtype)


@pytest.mark.gpu
@dtypes
def test_swiglu_at_full_size(dtype: torch.dtype) -> None:
    x = torch.randn(3, 1000, 8192, device="cuda").to(dtype).requires_grad_()
    check(gated, exactly_gated, x, [torch.randn(3, 1000, 4096, device="cuda").to(dtype)])


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    x = torch.empty(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(32_768)
    torch.testing.assert_close(swiglu.swiglu(x)[-1], swiglu.swiglu(x[-1:])[0], rtol=0, atol=0)
    x = x[:, :24_576].unflatten(-1, (3, 64, 128)).unsqueeze(0)
    last = _turns(69_999, 1, 64, THETA, x.device, torch.float32)
    tables = _turns(0, 70_000, 64, THETA, x.device, torch.float32)
    for got, want in zip(rotary.split_rotated(x, *tables), rotary.split_rotated(x[:, -1:], *last), strict=True):
        torch.testing.assert_close(got[:, -1:], want, rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("kernel", [rotary.turn_kernel, conv.forward_kernel, conv.backward_kernel])
def test_a_step_from_sequence_to_sequence_may_want_64_bits(kernel: Any) -> None:
    kinds = {parameter.name: parameter.annotation_type for parameter in kernel.params}
    assert kinds["T"] == "i32" and {kind for name, kind in kinds.items() if name.endswith("_row")} == {""}


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)


def compile_kernel(kernel: Any, constants: dict[str, Any], target: str, dtype: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    floats = {"q", "k", "v", "new_q", "new_k", "new_v", "gate_up", "y", "dy", "dgate_up"}
    types = {**dict.fromkeys(floats, dtype), "cos": "*fp32", "sin": "*fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in constants and name not in ("R", "T", "H")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm


KERNELS = {
    "turn": (rotary.turn_kernel, rotary._options(128) | {"BACK": False}),
    "turn back": (rotary.turn_kernel, rotary._options(128) | {"BACK": True}),
    "turn narrow": (rotary.turn_kernel, rotary._options(24) | {"BACK": True}),
    "swiglu": (swiglu.forward_kernel, swiglu._launch(torch.empty(1, 8192))[1]),
    "swiglu back": (swiglu.backward_kernel, swiglu._launch(torch.empty(1, 8192))[1]),
}


@compiled
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_and_moves_whole_vectors(target: str, name: str, dtype: str) -> None:
    code = compile_kernel(*KERNELS[name], target, dtype)
    usage = machine_code.amd(code["amdgcn"]) if target == "gfx942" else machine_code.nvidia(code["cubin"])
    assert usage.registers >= 16 and usage.spilled_bytes == 0
    if dtype == "*bf16":
        # Pairs are taken apart and put together in a thread's own registers.
        assert "convert_layout" not in code["ttgir"]
        if target != "gfx942":
            assert set(re.findall(r"(?:ld|st)\.global[.\w]*", code["ptx"])) == {"ld.global.v4.b32", "st.global.v4.b32"}
