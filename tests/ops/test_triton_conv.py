"""One token of the short convolution in one kernel, against float64: under Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from e88.layers.common import short_conv

# B, C, W, with a bias, the dtypes of x and of the tail.
CASES = [
    (2, 300, 4, True, torch.float32, torch.float32),
    (1, 7, 2, False, torch.bfloat16, torch.float32),
    (3, 256, 8, True, torch.bfloat16, torch.bfloat16),
    (5, 33, 3, False, torch.float16, torch.float32),
]


def check(B, C, W, biased, dtype, tail_dtype, device):
    from e88.ops.triton.conv import conv_step

    torch.manual_seed(0)
    # A slice of a joint projection: its rows are further apart than they are long.
    x = torch.randn(B, C + 9, device=device).to(dtype)[:, 4 : 4 + C]
    weight, bias = torch.randn(C, 1, W, device=device), torch.randn(C, device=device) if biased else None
    tail = torch.randn(B, C, W - 1, device=device).to(tail_dtype)
    y, new_tail = conv_step(x, weight, bias, tail)
    exact = [None if z is None else z.cpu().double() for z in (x.unsqueeze(1), weight, bias, tail)]
    expected, expected_tail = short_conv(*exact)
    assert y.dtype == dtype and new_tail.dtype == tail_dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(y.cpu().double(), expected[:, 0], rtol=tolerance, atol=4 * tolerance)
    assert torch.equal(new_tail.cpu(), expected_tail.to(tail_dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is on Linux")
def test_the_kernel_under_the_interpreter():
    # The interpreter is chosen when Triton is imported, so in a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu(case):
    check(*case, "cuda")


if __name__ == "__main__":
    for case in CASES:
        check(*case, "cpu")
