"""Functions made of two kernels: eager, compiled and as autograd sees them, with kernels that the CPU can run."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from e88.ops.cuda import launch
from e88.ops.cuda.recurrence import run, run_fused
from e88.ops.differentiable import differentiable, operator

CALLS: list[str] = []


class Operands(NamedTuple):
    x: Tensor
    w: Tensor
    shift: Tensor | None
    times: int


class Results(NamedTuple):
    y: Tensor
    total: Tensor
    powers: Tensor | None


class Saved(NamedTuple):
    x: Tensor
    w: Tensor
    powers: Tensor
    times: int
    need_shift: bool


class Gradients(NamedTuple):
    pair: Tensor
    shift: Tensor | None


def _results(x: Operands, save: bool) -> Results:
    return Results(torch.empty_like(x.x), x.x.new_empty(()), x.x.new_empty(x.x.shape) if save else None)


def _forward(x: Operands, out: Results) -> None:
    """y = times * x^2 * w + shift and the sum of x^2."""
    CALLS.append("forward, saving" if out.powers is not None else "forward")
    square = x.x * x.x
    out.y.copy_(x.times * square * x.w + (0 if x.shift is None else x.shift))
    out.total.copy_(square.sum())
    if out.powers is not None:
        out.powers.copy_(square)


def _keep(x: Operands, out: Results) -> Saved:
    assert out.powers is not None
    return Saved(x.x, x.w, out.powers, x.times, x.shift is not None and x.shift.requires_grad)


def _gradients(dy: Tensor, dtotal: Tensor | None, x: Saved) -> Gradients:
    return Gradients(x.x.new_empty(2, *x.x.shape), x.x.new_empty(x.x.shape) if x.need_shift else None)


def _backward(dy: Tensor, dtotal: Tensor | None, x: Saved, out: Gradients) -> None:
    CALLS.append("backward")
    out.pair[0] = 2 * x.x * (x.times * x.w * dy + (0 if dtotal is None else dtotal))
    out.pair[1] = x.times * x.powers * dy
    if out.shift is not None:
        out.shift.copy_(dy)


def _unpack(x: Saved, found: Gradients) -> tuple[Tensor | None, ...]:
    return *found.pair.unbind(0), found.shift


function = differentiable("e88_test::toy", Operands, Saved, _results, _forward, _keep, _gradients, _backward, _unpack)


def exact(x: Operands) -> tuple[Tensor, Tensor]:
    square = x.x * x.x
    return x.times * square * x.w + (0 if x.shift is None else x.shift), square.sum()


def draw(shift: bool = True) -> Operands:
    torch.manual_seed(0)
    x, w, s = torch.randn(3, 2, 4, dtype=torch.float64).unbind(0)
    return Operands(*(None if t is None else t.clone().requires_grad_() for t in (x, w, s if shift else None)), 3)


def compiled(x: Operands) -> tuple[Tensor, Tensor]:
    return torch.compile(lambda *t: function(Operands(*t)), fullgraph=True, backend="aot_eager")(*x)


def gradients(f: Any, x: Operands, outputs: slice = slice(None)) -> list[Tensor]:
    cotangents = (torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4), torch.tensor(0.7, dtype=torch.float64))
    leaves = [t for t in x if isinstance(t, Tensor) and t.requires_grad]
    loss = sum((out * c).sum() for out, c in zip(f(x)[outputs], cotangents[outputs], strict=True))
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


@pytest.mark.parametrize("f", [function, compiled])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("outputs", [slice(None), slice(0, 1), slice(1, 2)], ids=["both", "first", "second"])
def test_gradients(f: Any, shift: bool, outputs: slice) -> None:
    torch.compiler.reset()
    x = draw(shift)
    torch.testing.assert_close(f(x), exact(x))
    torch.testing.assert_close(gradients(f, x, outputs), gradients(exact, x, outputs))


@pytest.mark.parametrize("f", [function, compiled])
@pytest.mark.parametrize("name", ["x", "w", "shift"])
def test_gradients_only_where_asked(f: Any, name: str) -> None:
    torch.compiler.reset()
    x = draw()._replace(**{n: getattr(draw(), n).detach() for n in ("x", "w", "shift") if n != name})
    torch.testing.assert_close(gradients(f, x), gradients(exact, x))


def test_nothing_is_kept_where_no_gradient_is_asked() -> None:
    CALLS.clear()
    with torch.no_grad():
        assert not function(draw())[0].requires_grad
    with torch.inference_mode():
        function(draw())
    function(Operands(*(t.detach() for t in draw()[:3]), 3))
    assert CALLS == ["forward"] * 3
    function(draw())
    assert CALLS[3:] == ["forward, saving"]


def test_what_is_kept_goes_with_the_backward_pass() -> None:
    x = draw()
    y, _ = function(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y, _ = function(x)
    with torch.no_grad():
        x.w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    x = draw()
    (first,) = torch.autograd.grad(function(x)[0].sum(), x.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


def test_recomputed_in_the_backward_pass() -> None:
    CALLS.clear()
    x = draw()
    found = gradients(lambda x: checkpoint(lambda *t: function(Operands(*t)), *x, use_reentrant=False), x)
    assert CALLS == ["forward, saving", "forward, saving", "backward"]
    torch.testing.assert_close(found, gradients(exact, x))


def test_the_operators_keep_the_rules_of_torch_library() -> None:
    x, names = draw(), torch.ops.e88_test
    torch.library.opcheck(names.toy_forward.default, (*x, True))
    kept = [t.detach() for t in (x.x, x.w, x.x * x.x)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(names.toy_backward.default, (kept[0], None, *kept, 3, True), test_utils=tests)


class Pair(NamedTuple):
    x: Tensor
    n: int


class Two(NamedTuple):
    twice: Tensor
    none: Tensor | None


def _twice(*values: Any) -> Two:
    x = Pair(*values)
    return Two(x.n * x.x, None)


twice = operator("e88_test::twice", _twice, lambda *values: Two(torch.empty_like(values[0]), None), Pair)


def test_a_function_without_gradients() -> None:
    x = torch.randn(3)
    assert torch.equal(twice(x, 2)[0], 2 * x) and twice(x, 2)[1] is None
    torch.compiler.reset()
    graph = torch.compile(lambda x: twice(x, 2)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(x), 2 * x + 1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tensors without values, and calls as the compiler makes them."""
    monkeypatch.setattr(launch, "_shared_bytes", lambda device: 232448)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("full", [True, False])
def test_the_cuda_operators_trace_without_a_gpu(traced: Any, dtype: torch.dtype, full: bool) -> None:
    B, T, H, K, V = 2, 7, 3, 16, 128

    def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, requires_grad=True)

    q, k, v = (leaf(B, T, H, n, dtype=dtype) for n in (K, K, V))
    g, beta, state = leaf(B, T, H), leaf(B, T, H) if full else None, leaf(B, H, K, V) if full else None
    results = run(q, k, v, g, beta, state, None, "tanh")
    assert [x.shape for x in results] == [v.shape, (B, H, K, V)]
    check(results, (q, k, v, g, beta, state))
    qkv, a = leaf(B, T, H * (2 * K + V), dtype=dtype), leaf(B, T, H, dtype=dtype)
    gate = leaf(B, T, H * V, dtype=dtype) if full else None
    b = leaf(B, T, H, dtype=torch.float32 if full else dtype)
    vectors = (leaf(H), leaf(H)) if full else (None, None)
    results = run_fused(qkv, a, *vectors, b, gate, state, None, "tanh", (H, K, V))
    assert [x.shape for x in results] == [(B, T, H * V), (B, H, K, V)]
    check(results, (qkv, a, *vectors, b, gate, state))


def check(results: tuple[Tensor, Tensor], operands: tuple[Tensor | None, ...]) -> None:
    leaves = [x for x in operands if x is not None]
    found = torch.autograd.grad(results, leaves, [torch.empty_like(x) for x in results])
    assert [(d.shape, d.dtype, d.device) for d in found] == [(x.shape, x.dtype, x.device) for x in leaves]
