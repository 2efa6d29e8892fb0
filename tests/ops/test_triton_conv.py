"""The short convolution's kernels against float64: under Triton's interpreter, on a GPU, and compiled without either.

Triton asks for its interpreter once, when it is imported. So tests of numbers are marked for a GPU, and one test
runs them again in a process of their own, where TRITON_INTERPRET is set and the mark is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import machine_code
import pytest
import torch
from torch import Tensor

from e88.layers.common import short_conv

triton = pytest.importorskip("triton")

from e88.ops.triton import conv as kernels  # noqa: E402
from e88.ops.triton.conv import RUN, SHORT_RUN, causal_conv, conv_step  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
# One rounding of a result to its dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def operands(
    B: int, T: int, C: int, W: int, bias: bool = False, tail: bool = False, dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """x, weight, and the bias and tail if there are to be; and dy. x and dy are parts of wider rows."""
    torch.manual_seed(B + T + C + W)
    x, dy = (torch.randn(B, T, C + 9, device=device).to(dtype)[:, :, 4 : 4 + C] for _ in range(2))
    inputs = {"x": x, "weight": torch.randn(C, 1, W, device=device)}
    if bias:
        inputs["bias"] = torch.randn(C, device=device)
    if tail:
        inputs["tail"] = torch.randn(B, C, W - 1, device=device).to(dtype)
    return {name: t.requires_grad_() for name, t in inputs.items()}, dy


def gradients(y: Tensor, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), **{f"d{name}": d for name, d in zip(inputs, found, strict=True)}}


def exact(inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    wide = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.items()}
    y, _ = short_conv(wide["x"], wide["weight"], wide.get("bias"), wide.get("tail"))
    return gradients(y, wide, dy.cpu().double())


def check(*shape: int, bias: bool = False, tail: bool = False, dtype: torch.dtype = torch.float32) -> None:
    inputs, dy = operands(*shape, bias, tail, dtype)
    y = causal_conv(inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("tail"))
    got, want = gradients(y, inputs, dy), exact(inputs, dy)
    assert y.is_contiguous() and got["dx"].is_contiguous()
    assert got["y"].dtype == dtype
    for name, value in got.items():
        dtype = inputs[name[1:]].dtype if name != "y" else y.dtype
        assert value.dtype == dtype and value.shape == want[name].shape, name
        error = ((value.cpu().double() - want[name]).norm() / want[name].norm()).item()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


# Around the filter's width, the tokens taken at once, and a program's tokens.
@on_device
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, SHORT_RUN - 1, SHORT_RUN, SHORT_RUN + 1, 2 * SHORT_RUN + 3])
@pytest.mark.parametrize("tail", [False, True])
def test_lengths(T: int, tail: bool) -> None:
    check(2, T, 5, 4, tail=tail)


@on_device
@pytest.mark.parametrize("T", [RUN - 1, RUN, 2 * RUN + 3])
def test_long_runs(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MANY", 0)
    check(1, T, 3, 4, bias=True, tail=True)


@on_device
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize(("bias", "tail"), [(False, False), (True, True), (True, False)])
def test_widths_and_options(width: int, bias: bool, tail: bool) -> None:
    check(1, 7, 3, width, bias=bias, tail=tail)


@on_device
@pytest.mark.parametrize("C", [1, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_channels_and_dtypes(C: int, dtype: torch.dtype) -> None:
    check(2, 5, C, 4, bias=True, tail=True, dtype=dtype)


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_nothing(shape: tuple[int, ...]) -> None:
    inputs, dy = operands(*shape, bias=True, tail=True)
    got = gradients(causal_conv(*inputs.values()), inputs, dy)
    assert not got["dweight"].any() and not got["dbias"].any() and not got["dtail"].any()


@on_device
def test_transposed_operands() -> None:
    inputs, dy = operands(2, 6, 5, 4)
    lying = inputs["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    other = dy.transpose(1, 2).contiguous().transpose(1, 2)
    expected = gradients(causal_conv(*inputs.values(), None, None), inputs, dy)
    got = gradients(causal_conv(lying, inputs["weight"], None, None), {"x": lying, "weight": inputs["weight"]}, other)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@on_device
def test_compiles_as_one_graph() -> None:
    inputs, dy = operands(2, 5, 3, 4, bias=True, tail=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
        return causal_conv(2 * x, weight, bias, tail) * 3

    torch.compiler.reset()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    got, expected = (gradients(f(*inputs.values()), inputs, dy) for f in (graph, run))
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# B, C, W, with a bias, the dtypes of x and of the tail.
STEPS = [
    (2, 300, 4, True, torch.float32, torch.float32),
    (1, 7, 2, False, torch.bfloat16, torch.float32),
    (3, 256, 8, True, torch.bfloat16, torch.bfloat16),
    (5, 33, 3, False, torch.float16, torch.float32),
]


@on_device
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_one_token(case: tuple) -> None:
    B, C, W, biased, dtype, tail_dtype = case
    inputs, _ = operands(B, 1, C, W, biased, True, dtype)
    x, weight, tail = inputs["x"].detach(), inputs["weight"].detach(), inputs["tail"].detach().to(tail_dtype)
    bias = inputs["bias"].detach() if biased else None
    y, new_tail = conv_step(x.squeeze(1), weight, bias, tail)
    wide = [None if z is None else z.cpu().double() for z in (x, weight, bias, tail)]
    expected, expected_tail = short_conv(*wide)
    assert y.dtype == dtype and new_tail.dtype == tail_dtype
    error = (y.cpu().double() - expected[:, 0]).norm() / expected.norm()
    assert error < TOLERANCE[dtype]
    assert torch.equal(new_tail.cpu(), expected_tail.to(tail_dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "tail"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", [(32, 512, 200, 4), (1, 5000, 513, 3), (3, 1000, 1024, 8), (8, 1000, 5376, 2)])
def test_long_and_wide(shape: tuple[int, ...], bias: bool, tail: bool, dtype: torch.dtype) -> None:
    check(*shape, bias=bias, tail=tail, dtype=dtype)


@pytest.mark.gpu
def test_gradients_are_the_same_every_time() -> None:
    inputs, dy = operands(8, 300, 300, 4, bias=True, dtype=torch.bfloat16)
    first, second = (gradients(causal_conv(*inputs.values(), None), inputs, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 9])
def test_short_conv_treats_dtypes_and_tails_as_on_a_cpu(T: int, autocast: bool) -> None:
    inputs, _ = operands(2, T, 6, 4, bias=True, tail=True, device="cpu")
    for tail in (None, inputs["tail"]):
        given = [None if t is None else t.detach() for t in (inputs["x"], inputs["weight"], inputs["bias"], tail)]
        results = []
        for device in ("cpu", "cuda"):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                results.append(short_conv(*(None if t is None else t.to(device) for t in given)))
        (y, last), (got, got_last) = results
        assert got.dtype == y.dtype and torch.equal(got_last.cpu(), last)
        torch.testing.assert_close(got.cpu(), y, rtol=0, atol=0.05 if autocast else 1e-5)


@compiled
def test_the_same_in_the_interpreter(passed_in_the_interpreter: Callable[[str], int]) -> None:
    # Had the tests been deselected, they would have passed too.
    assert passed_in_the_interpreter(__file__) >= 60


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)


def compile_kernel(name: str, target: str, dtype: torch.dtype, width: int, options: bool) -> machine_code.Usage:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    _, _, constants = kernels._launch(torch.empty(1, 1, 1, dtype=dtype), width)
    warps = constants.pop("num_warps")
    constants |= {"BIAS": options, "TAIL": options}
    if not options:
        constants |= dict.fromkeys({"bias", "tail", "dtail"} & set(kernel.arg_names))
    tensors = dict.fromkeys(["x", "tail", "y", "dy", "dx", "dtail"], {torch.float32: "*fp32"}.get(dtype, "*bf16"))
    tensors |= dict.fromkeys(["weight", "bias", "shares"], "*fp32")
    signature = {a: "constexpr" if a in constants else tensors.get(a, "i32") for a in kernel.arg_names}
    hints = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a not in constants}
    known = {a: constants[a] for a in kernel.arg_names if a in constants}
    source = ASTSource(kernel, signature, known, hints)
    code = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps}).asm
    return machine_code.amd(code["amdgcn"]) if target == "gfx942" else machine_code.nvidia(code["cubin"])


@compiled
@pytest.mark.parametrize(
    ("dtype", "width", "options"),
    [(torch.bfloat16, 4, False), (torch.bfloat16, 4, True), (torch.float32, 4, True), (torch.bfloat16, 8, True)],
)
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str, name: str, dtype: torch.dtype, width: int, options: bool) -> None:
    usage = compile_kernel(name, target, dtype, width, options)
    assert usage.registers >= 16 and usage.spilled_bytes == 0
