"""Products with few rows: right at every size on the GPU, and the plain ones elsewhere."""

from __future__ import annotations

import sys

import machine_code
import pytest
import torch
import torch.nn.functional as F
from operands import relative_error

from e88.layers.common import ResidualRMSNorm
from e88.ops import few_rows
from e88.ops.cuda import compile as kernels
from e88.ops.cuda import linear as kernel

SHAPES = [(8, 48), (64, 16), (200, 300), (264, 17), (1792, 5432), (2560, 40), (6144, 33)]


@pytest.mark.parametrize("update", [False, True])
def test_a_norm_and_its_product_are_those_of_the_parts(update):
    norm = ResidualRMSNorm(12).double()
    torch.nn.init.normal_(norm.weight)
    h, u, weight = (
        torch.randn(3, 12).double(),
        torch.randn(3, 12).double() if update else None,
        torch.randn(7, 12).double(),
    )
    stream, y = norm.project(h, u, weight)
    expected, x = norm(h, u)
    assert torch.equal(stream, expected)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is on Linux")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("D", [8, 200, 1792, 6144])
def test_compiles(D: int, many: bool, arch: str) -> None:
    for norm in (False, True):
        code = kernels.compile_cubin("linear", arch, kernel.defines(kernel.MAX_ROWS, D, norm, norm, many))
        assert machine_code.nvidia(code).spilled_bytes <= 64


def check(B: int, D: int, N: int, update: bool) -> None:
    torch.manual_seed(B + D + N)
    h, weight = torch.randn(B, D, device="cuda"), torch.randn(N, D, device="cuda").bfloat16()
    u = torch.randn(B, D, device="cuda").bfloat16() if update else None
    norm = ResidualRMSNorm(D).cuda().requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    # What the allocator hands out next holds no zeros.
    poison = torch.full((1 << 22,), float("nan"), device="cuda")
    del poison
    with torch.no_grad():
        assert few_rows.norm_linear_serves(h, u, weight)
        stream, y = norm.project(h, u, weight)
        plain = few_rows.linear(h.bfloat16(), weight)
    total = h.double() + (0 if u is None else u.double())
    scaled = F.rms_norm(total, (D,), norm.weight.double(), norm.eps)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert relative_error(stream, total) < 1e-7
    assert relative_error(y, scaled @ weight.double().T) < 5e-3
    assert relative_error(plain, h.bfloat16().double() @ weight.double().T) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "N"), SHAPES)
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("update", [False, True])
def test_every_size(B: int, D: int, N: int, update: bool) -> None:
    check(B, D, N, update)


@pytest.mark.gpu
def test_what_the_kernel_is_not_for_is_left_to_the_library() -> None:
    weight = torch.randn(16, 64, device="cuda")
    h = torch.randn(1, 64, device="cuda")
    with torch.no_grad():
        assert not few_rows.norm_linear_serves(h, None, weight)
        assert not few_rows.norm_linear_serves(h.expand(40, 64), None, weight.bfloat16())
        assert not few_rows.norm_linear_serves(h[:, :60], None, weight[:, :60].bfloat16())
    assert not few_rows.norm_linear_serves(h, None, weight.bfloat16().requires_grad_())
