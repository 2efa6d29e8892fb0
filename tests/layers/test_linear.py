"""Joint projections: equal to separate ones, gradients too, however their gradients arrive."""

import pytest
import torch
import torch.nn.functional as F

from e88.layers.accuracy import check
from e88.layers.linear import _JointLinear, _merged, _whole_rows, joint_linear
from e88.models.config import E88Config, ModelConfig


def problem(dtype=torch.float64, device="cpu", rows=(24, 3, 8)):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=dtype, device=device, requires_grad=True)
    return x, [torch.randn(n, 16, dtype=dtype, device=device, requires_grad=True) for n in rows]


def projection(weight):
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = torch.nn.Parameter(weight)
    return linear


def test_equals_separate_products_with_gradients():
    x, weights = problem()
    assert torch.autograd.gradcheck(lambda x, *w: _JointLinear.apply(x, *w), (x, *weights))
    for got, weight in zip(_JointLinear.apply(x, *weights), weights, strict=True):
        assert torch.allclose(got, F.linear(x, weight), rtol=1e-12)
        assert got.stride(-2) % 8 == 0


@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_gradients_side_by_side_in_one_tensor_or_missing(used, width):
    x, weights = problem()
    wide = torch.randn(2, 5, width, dtype=x.dtype)
    wide[..., 35:] = 0
    columns = wide.split([24, 3, 8, width - 35], -1)
    for grads in (columns, [c.clone() for c in columns]):
        outputs = _JointLinear.apply(x, *weights)
        got = torch.autograd.grad(
            [outputs[i] for i in used], [x, *weights], [grads[i] for i in used], allow_unused=True
        )
        apart = [F.linear(x, weight) for weight in weights]
        want = torch.autograd.grad([apart[i] for i in used], [x, *weights], [grads[i] for i in used], allow_unused=True)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-12), i


@pytest.mark.parametrize("rows", [(10, 101), (64, 61), (128, 3)])
def test_a_last_gradient_with_zeros_of_its_own(rows):
    x, weights = problem(rows=rows)
    own = torch.zeros(2, 5, rows[1] + -rows[1] % 64, dtype=x.dtype)
    grads = [torch.randn(2, 5, rows[0], dtype=x.dtype), own[..., : rows[1]].normal_()]
    got = torch.autograd.grad(_JointLinear.apply(x, *weights), [x, *weights], grads)
    want = torch.autograd.grad([F.linear(x, weight) for weight in weights], [x, *weights], grads)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_neighbours_become_one_matrix_without_a_copy():
    wide = torch.randn(4, 40)
    a, b, c = wide.split([24, 8, 8], -1)
    ((joined, rows),) = _merged([a, b, c], [24, 8, 8])
    assert rows == [24, 8, 8] and torch.equal(joined, wide) and joined.data_ptr() == wide.data_ptr()
    assert [r for _, r in _merged([a, None, c], [24, 8, 8])] == [[24], [8], [8]]
    assert [r for _, r in _merged([a, b.clone(), c], [24, 8, 8])] == [[24], [8], [8]]


def test_a_width_that_products_are_slow_for_takes_the_zeros_behind_it():
    wide = torch.randn(4, 64)
    for width in (35, 61):
        assert _whole_rows(wide[:, :width], 64).shape == (4, 64)
        assert _whole_rows(wide[:, :width], 63).shape == (4, width)
    # A width that is fast already, a matrix that is no more than that, columns that are something else's.
    for other in (wide[:, :36], torch.randn(4, 35), torch.randn(4, 128)[:, :35], wide[:, 1:], wide[:3, :35]):
        assert _whole_rows(other, 128) is other


def test_compiles_as_one_graph():
    x, weights = problem()

    def loss(x, *weights):
        return sum((i + 1) * y.square().sum() for i, y in enumerate(_JointLinear.apply(x, *weights)))

    torch.compiler.reset()
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x, *weights), [x, *weights]) for f in (graph, loss))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_under_autocast_weights_get_gradients_in_their_own_dtype():
    x, weights = problem(torch.float32, "cuda", (64, 8, 3))
    projections = [projection(weight.detach()) for weight in weights]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = joint_linear(x, projections)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    cotangents = [torch.randn_like(y) for y in outputs]
    got = torch.autograd.grad(outputs, [x, *(p.weight for p in projections)], cotangents)
    wide = [t.detach().to(torch.bfloat16).double().requires_grad_() for t in (x, *weights)]
    apart = [F.linear(wide[0], weight) for weight in wide[1:]]
    want = torch.autograd.grad(apart, wide, [c.double() for c in cotangents])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert ((a.double() - b).norm() / b.norm()).item() < 5e-3
    # No rounding to bf16 on the way to the weights' gradients.
    assert ((got[1].double() - want[1]).norm() / want[1].norm()).item() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("n_heads", [5, 12, 72])
def test_a_layer_whose_projections_fill_no_whole_rows(n_heads, gate):
    # What the allocator hands out next holds no zeros.
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison
    config = ModelConfig(dim=256, depth=1, mixer=E88Config(n_heads=n_heads, n_state=16, gate=gate))
    found = check(config, torch.device("cuda"), torch.bfloat16)
    assert found.ok and found.backends == ("cuda",)
