"""The Triton kernels against float64: on a GPU, on the CPU under Triton's interpreter, and compiled without either.

Triton asks for its interpreter once, when it is imported. So tests of numbers are marked for a GPU, and one test
runs them again in a process of their own, where TRITON_INTERPRET is set and the mark is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import machine_code
import pytest
import torch
from operands import Operands, assert_close, operands, relative_error

from e88.errors import UserError
from e88.ops import available_backends, tanh_delta_rule

triton = pytest.importorskip("triton")

from e88.ops.triton import kernels  # noqa: E402
from e88.ops.triton.recurrence import make_plan, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Exponentials may overflow to infinity, of which the interpreter's numpy would warn.
on_device = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning") if INTERPRETED else pytest.mark.gpu
on_gpu = pytest.mark.gpu
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
SEGMENT = make_plan(32, 32, torch.float32, True, True).segment
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def on(device: str, x: Operands) -> Operands:
    return replace(x, **{name: t.to(device) for name, t in vars(x).items() if isinstance(t, torch.Tensor)})


def check(x: Operands, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    x = on(DEVICE, x).to(dtype)
    results = x.results("triton")
    assert_close(results, x.to(torch.float64).results("checkpointed"), TOLERANCE[dtype])
    return results


@on_device
@pytest.mark.parametrize("T", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 1])
def test_lengths(T: int) -> None:
    check(operands(2, T, 1, 3, 5))


# Padded or not, one block of columns or several, the last of them full or not.
@on_device
@pytest.mark.parametrize(
    ("K", "V"), [(1, 1), (16, 16), (12, 20), (8, 33), (32, 32), (40, 24), (64, 16), (24, 48), (128, 12), (100, 20)]
)
def test_sizes(K: int, V: int) -> None:
    check(operands(1, 3, 2, K, V))


@on_device
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize(("gate", "state"), [(True, False), (False, True), (False, False)])
def test_options(gate: bool, state: bool, activation: str) -> None:
    check(operands(1, 4, 2, 5, 6, gate=gate, state=state, activation=activation))


@on_device
@pytest.mark.parametrize("lengths", [(0, SEGMENT, 0, SEGMENT + 1, 0), (1, 2)])
def test_packed_sequences_equal_separate_ones(lengths: tuple[int, ...]) -> None:
    x = operands(H=1, K=5, V=6, lengths=lengths)
    packed = check(x)
    x = on(DEVICE, x).to(torch.float32)
    ends = x.cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        part = (tensor[:, start:end] for tensor in (x.q, x.k, x.v, x.g, x.beta))
        y, final_state = run(*part, x.initial_state[n : n + 1], None, "tanh")
        # Not to the last bit: a compilation depends on the alignment of pointers.
        assert relative_error(packed["y"][:, start:end], y) <= 1e-6
        assert relative_error(packed["final_state"][n : n + 1], final_state) <= 1e-6
        if start == end:
            assert torch.equal(packed["final_state"][n : n + 1], x.initial_state[n : n + 1])


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_half_precision_inputs(dtype: torch.dtype, activation: str) -> None:
    results = check(operands(1, SEGMENT + 3, 1, 8, 12, activation=activation), dtype)
    assert results["final_state"].dtype == torch.float32
    assert all(value.dtype == dtype for name, value in results.items() if name != "final_state")


@on_device
@pytest.mark.parametrize("log_decay", [(-30.0, -30.0), (-1e-4, 0.0), (0.0, 0.0)])
def test_decay_at_its_ends(log_decay: tuple[float, float]) -> None:
    check(operands(1, SEGMENT + 2, 1, 8, 16, log_decay=log_decay))


@on_device
@pytest.mark.parametrize("scale", [0.0, 1e-3, 5.0])
def test_from_tiny_values_to_saturation(scale: float) -> None:
    x = operands(1, 6, 2, 8, 16, scale=scale, state=scale > 0)
    x.k[:, ::3] = 0
    x.beta.mul_(4)
    check(x)


@on_device
def test_tanh_is_accurate_everywhere() -> None:
    # One step from S = 0 with k = q = 1 and v = x gives y = tanh(x).
    magnitudes = torch.cat([torch.logspace(-30, 2, 320), torch.linspace(0, 12, 192)])
    x = torch.cat([magnitudes, -magnitudes]).view(-1, 1, 1, 128).to(DEVICE)
    one = torch.ones(x.shape[0], 1, 1, 1, device=DEVICE)
    y, _ = run(one, one, x, one[..., 0] * 0, None, None, None, "tanh")
    expected = torch.tanh(x.double())
    assert ((y - expected).abs() / expected.abs().clamp_min(1e-300)).max() <= 1e-6


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_initial_states_give_no_nan(dtype: torch.dtype) -> None:
    x = on(DEVICE, operands(1, 3, 1, 4, 5)).to(dtype)
    for sign in (1, -1):
        x.initial_state.fill_(sign * 1e5)
        assert all(value.isfinite().all() for value in x.results("triton").values())


@on_device
def test_nan_is_passed_on() -> None:
    x = on(DEVICE, operands(1, 6, 2, 8, 16, dtype=torch.float32))
    x.v[0, 3, 1, 2] = float("nan")
    y = x.results("triton")["y"]
    assert y[0, 3:, 1, 2].isnan().all()
    assert y[0, :, 0].isfinite().all()


@on_device
def test_strided_inputs() -> None:
    x = on(DEVICE, operands(2, 2, 3, 8, 16, dtype=torch.float32))
    expected = run(x.q, x.k, x.v, x.g, x.beta, None, None, "tanh")[0]
    fused = torch.cat([tensor.flatten(2) for tensor in (x.q, x.k, x.v)], dim=-1)
    rows = [part.unflatten(2, (3, -1)) for part in fused.split([24, 24, 48], dim=-1)]
    heads = torch.cat([x.q, x.k, x.v], dim=-1).split([8, 8, 16], dim=-1)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x.q, x.k, x.v)]
    g = x.g.transpose(1, 2).contiguous().transpose(1, 2)
    for q, k, v in (rows, heads, turned):
        assert torch.equal(run(q, k, v, g, x.beta, None, None, "tanh")[0], expected)


@on_device
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output: int) -> None:
    x = on(DEVICE, operands(1, 4, 2, 8, 16, dtype=torch.float32))
    gradients = []
    for backend in ("triton", "reference"):
        v = x.v.clone().requires_grad_()
        results = tanh_delta_rule(x.q, x.k, v, x.g, output_final_state=True, backend=backend)
        gradients.append(torch.autograd.grad(results[output].sum(), v)[0])
    assert relative_error(*gradients) <= 1e-5


@on_device
def test_compiles_without_a_graph_break() -> None:
    x = on(DEVICE, operands(1, 4, 2, 8, 16, dtype=torch.float32))
    gradients = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.g, x.beta, x.initial_state)]
        results = function(*leaves, None, "tanh")
        gradients.append(torch.autograd.grad(results, leaves, (x.dy, x.d_final)))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


@on_device
def test_operators_keep_the_rules_of_torch_library() -> None:
    x = on(DEVICE, operands(H=2, K=5, V=6, lengths=(3, 0), dtype=torch.float32))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v, x.g, x.beta, x.initial_state)]
    forward, backward = torch.ops.e88.triton_forward.default, torch.ops.e88.triton_backward.default
    torch.library.opcheck(forward, (*leaves, x.cu_seqlens, True, True), test_utils=tests)
    rest = [t.detach() for t in leaves[:5]]
    saved = forward(*rest, None, x.cu_seqlens, True, True)[2]
    torch.library.opcheck(backward, (x.dy, None, *rest, x.cu_seqlens, saved, True, True), test_utils=tests[:2])


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "shape",
    [(2, 3000, 2, 32, 32), (2, 67, 100, 16, 16), (1, 300, 3, 128, 128), (2, 129, 5, 48, 96), (3, 50, 7, 8, 64)],
)
def test_long_wide_and_many_heads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(operands(*shape), dtype)


@compiled
def test_the_same_in_the_interpreter(passed_in_the_interpreter: Callable[[str], int]) -> None:
    # Had the tests been deselected, they would have passed too.
    assert passed_in_the_interpreter(__file__) >= 40


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compile_kernel(name: str, target: str, dtype: torch.dtype, K: int, V: int, packed: bool = False):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    plan = make_plan(K, V, dtype, True, target != "gfx942")
    constants = plan.constants(K, V, backward=name == "backward_kernel")
    options = {option: constants.pop(option) for option in set(constants) - set(kernel.arg_names)}
    if not packed:
        constants["ends"] = None
    sums = dtype if plan.blocks(V) == 1 else torch.float32
    tensors = dict.fromkeys(["q", "k", "v", "y", "dy", "dv"], dtype) | dict.fromkeys(["dq", "dk"], sums)
    tensors |= dict.fromkeys(["saved", "states"], plan.saved)
    tensors |= dict.fromkeys(["g", "beta", "state", "dstate", "deltas", "dg", "dbeta"], torch.float32)
    signature, hints = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "ends":
            signature[argument] = "*i64"
        elif argument in tensors:
            signature[argument] = "*" + SHORT[tensors[argument]]
        else:
            signature[argument] = "i32"
        if argument in tensors or argument.endswith("_row"):
            hints[(i,)] = [["tt.divisibility", 16]]
    known = {argument: constants[argument] for argument in signature if argument in constants}
    source = ASTSource(kernel, signature, known, hints)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


@compiled
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_devices_that_are_not_here(target: str, name: str, dtype: torch.dtype, packed: bool) -> None:
    code = compile_kernel(name, target, dtype, 32, 32, packed).asm
    usage = machine_code.amd(code["amdgcn"]) if target == "gfx942" else machine_code.nvidia(code["cubin"])
    # Fewer registers for more programs at a time may cost a few of them, which stay in the cache.
    assert usage.registers >= 32 and usage.spilled_bytes <= 32


@compiled
@pytest.mark.parametrize("n", [16, 32, 40, 64, 128])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_nothing_spills(name: str, n: int) -> None:
    assert machine_code.nvidia(compile_kernel(name, "sm_90", torch.bfloat16, n, n).asm["cubin"]).spilled_bytes == 0


@compiled
def test_refusals_say_why(monkeypatch) -> None:
    x = operands(1, 3, 1, 4, 5, dtype=torch.float32)
    if not torch.cuda.is_available():
        assert "no GPU" in available_backends()["triton"]
    with pytest.raises(UserError, match="'triton' cannot serve this call: runs on GPU tensors"):
        x.results("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends()["triton"] is None
    with pytest.raises(UserError, match="float64"):
        x.to(torch.float64).results("triton")
    with pytest.raises(UserError, match="128 at most, not 4 and 129"):
        operands(1, 3, 1, 4, 129, dtype=torch.float32).results("triton")
