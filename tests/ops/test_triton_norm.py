"""Residual add and RMSNorm in one kernel, against float64: under Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

CASES = [
    (5, 40, torch.float32, torch.float32, torch.float32, True),
    (3, 64, torch.float32, torch.bfloat16, torch.bfloat16, True),
    (1, 7, torch.float32, torch.bfloat16, torch.bfloat16, False),
    (4, 33, torch.float32, torch.float16, torch.float16, True),
    (600, 1792, torch.float32, torch.bfloat16, torch.bfloat16, True),
]


def errors(rows, dim, h_dtype, update_dtype, out_dtype, add, device):
    """Relative errors of the stream, the norm and every gradient against autograd in float64."""
    from e88.ops.triton.norm import add_rms_norm

    torch.manual_seed(0)
    h = torch.randn(rows, dim, device=device).to(h_dtype).requires_grad_()
    update = torch.randn(rows, dim, device=device).to(update_dtype).requires_grad_() if add else None
    weight = (1 + 0.3 * torch.randn(dim, device=device)).requires_grad_()
    dstream, dy = torch.randn(rows, dim, device=device), torch.randn(rows, dim, device=device)
    inputs = [x for x in (h, update, weight) if x is not None]

    def run(h, update, weight, kernel):
        if kernel:
            stream, y = add_rms_norm(h, update, weight, 1e-5, out_dtype)
        else:
            stream = h if update is None else h + update
            y = stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        loss = (y * dy.to(y.dtype)).sum() + (stream * dstream.to(stream.dtype)).sum()
        return [stream, y, *torch.autograd.grad(loss, [x for x in (h, update, weight) if x is not None])]

    got = run(h, update, weight, True)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (h, update, weight)]
    want = run(*wide, False)
    assert [x.dtype for x in got[2:]] == [x.dtype for x in inputs]
    assert (got[0].dtype, got[1].dtype) == (h_dtype, out_dtype)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


def limits(case):
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[case[4]]
    return [2e-6, *[tolerance] * 8]


def test_equals_float64_under_the_interpreter():
    code = "from tests.ops.test_triton_norm import CASES, errors\nfor case in CASES[:4]: print(*errors(*case, 'cpu'))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(CASES, done.stdout.splitlines(), strict=False):
        found = [float(x) for x in line.split()]
        assert len(found) == (5 if case[5] else 4)
        assert all(a < b for a, b in zip(found, limits(case), strict=False)), (case, found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64_on_a_gpu(case):
    found = errors(*case, "cuda")
    assert all(a < b for a, b in zip(found, limits(case), strict=False)), found
