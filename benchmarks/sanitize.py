"""Run the GPU kernels, forward and backward, under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize.py [--backends cuda,triton] [--tools memcheck,racecheck]

memcheck finds accesses outside of a tensor, racecheck races in shared memory. Each backend is run under each tool in a
process of its own, at small shapes: several widths of state, K different from V, a last segment cut short, packed
sequences of which one is empty, with and without a write gate and a given state, in bf16 and float32; of the backend
`cuda`, also the kernels that take raw projections and those that decode; of `triton`, also the short convolution.
Results are compared with float64 on the way. First a call whose sequences end past the last token, which memcheck must
find: it shows that the kernels are looked at. The exit code is 1 where anything else is found. Needs
`compute-sanitizer` (of the CUDA toolkit) on the path.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time

import torch
from torch import Tensor

from e88.layers.common import short_conv
from e88.ops import few_rows, fused_tanh_delta_rule, fused_tanh_delta_rule_step, tanh_delta_rule
from e88.ops.accuracy import TOLERANCE, Shape, draw, relative_errors, worst

SIZES = ((16, 16), (32, 32), (40, 40), (64, 64), (128, 128), (32, 64), (64, 24))
CASES = [(torch.bfloat16, *size) for size in SIZES] + [(torch.float32, *size) for size in ((32, 32), (64, 24))]
CONVOLUTIONS = ((torch.bfloat16, 2, 19, 40, 4), (torch.float32, 1, 3, 129, 8), (torch.float16, 1, 1, 128, 2))
LENGTHS = (3, 0, 17, 1, 8)
HEADS = 3
# Instrumenting the kernels under test alone saves most of the time; each backend's have a name in common.
NAMES = {"cuda": "e88_", "triton": "ward_kernel"}
TOOLS = ("memcheck", "racecheck")
FOUND = 99


def results(operands: list[Tensor], state: Tensor | None, ends: Tensor | None, backend: str) -> list[Tensor]:
    """Output, final state, and the gradients of a weighted sum of both, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in operands]
    y, final_state = tanh_delta_rule(
        *leaves, initial_state=state, cu_seqlens=ends, output_final_state=True, backend=backend
    )
    assert final_state is not None
    weights = torch.linspace(-1, 1, y.shape[-1], device=y.device)
    gradients = torch.autograd.grad((y.double() * weights).sum() + final_state.double().sum(), leaves)
    return [x.detach().cpu() for x in (y, final_state, *gradients)]


def run_shapes(backend: str, device: str = "cuda") -> int:
    """Every case, in rows of equal length and packed; the number of those that are off from float64."""
    wrong = 0
    for (dtype, K, V), packed in itertools.product(CASES, (False, True)):
        # Packed sequences have a write gate and a given state, rows of equal length neither.
        shape = Shape(1 if packed else 2, sum(LENGTHS) if packed else 19, HEADS, K, V)
        operands = [x.detach() for x in draw(shape, device, dtype, gate=packed).operands]
        ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0) if packed else None
        state = torch.randn(len(LENGTHS), HEADS, K, V, device=device).tanh().requires_grad_() if packed else None
        actual = results(operands, state, ends, backend)
        if state is not None and ends is not None:
            state, ends = state.detach().cpu().double(), ends.cpu()
        expected = results([x.cpu().double() for x in operands], state, ends, "checkpointed")
        name, error = worst(relative_errors(actual, expected))
        if not error <= TOLERANCE[dtype]:
            wrong += 1
            print(f"{backend} {shape} {dtype} packed={packed}: {name} is off by {error:.1e}", flush=True)
    return wrong


def run_fused(device: str = "cuda") -> int:
    """The operator from raw projections, with and without gates; the number of cases off from float64."""
    wrong = 0
    for (dtype, K, V), gated in itertools.product(CASES, (False, True)):
        widths = (HEADS * (2 * K + V), HEADS, *((HEADS, HEADS * V) if gated else ()))
        raw = [torch.randn(2, 19, width, device=device).to(dtype) for width in widths]
        vectors = [torch.randn(HEADS, device=device) for _ in range(2)]

        def outcome(raw: list[Tensor], vectors: list[Tensor], sizes: tuple[int, int]) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in raw]
            b, gate = leaves[2:] or (None, None)
            y, _ = fused_tanh_delta_rule(
                *leaves[:2], *vectors, b=b, gate=gate, n_heads=HEADS, head_k_dim=sizes[0], head_v_dim=sizes[1]
            )
            weights = torch.linspace(-1, 1, y.shape[-1], device=y.device)
            return y.detach(), *torch.autograd.grad((y.double() * weights).sum(), leaves)

        exact = [[x.cpu().double() for x in part] for part in (raw, vectors)]
        actual, expected = outcome(raw, vectors, (K, V)), outcome(*exact, (K, V))
        wrong += report(f"fused K{K} V{V} {dtype} gates={gated}", actual, expected, dtype)
    return wrong


@torch.no_grad()
def run_decoding(device: str = "cuda") -> int:
    """One-token steps and products with few rows, as decoding calls them; the number of those off from float64."""
    wrong = 0
    for dtype, K, V in CASES:
        widths = (HEADS * (2 * K + V), HEADS, HEADS, HEADS * V)
        qkv, a, b, gate = (torch.randn(2, width, device=device).to(dtype) for width in widths)
        vectors = [torch.randn(HEADS, device=device) for _ in range(2)]
        state = torch.randn(2, HEADS, K, V, device=device).tanh()
        sizes = {"n_heads": HEADS, "head_k_dim": K, "head_v_dim": V}
        inputs = [qkv, a, *vectors, b, gate, state]
        exact = [x.cpu().double() for x in inputs]
        actual, expected = (
            fused_tanh_delta_rule_step(*x[:4], b=x[4], gate=x[5], state=x[6], inplace=True, **sizes)
            for x in (inputs, exact)
        )
        wrong += report(f"step K{K} V{V} {dtype}", actual, expected, dtype)
    for D, N in ((64, 17), (200, 40)):
        h, norm = torch.randn(2, D, device=device), torch.rand(D, device=device)
        weight, update = (torch.randn(n, D, device=device).bfloat16() for n in (N, 2))
        actual = few_rows.norm_linear(h, update, norm, 1e-5, weight)
        total = h.cpu().double() + update.cpu().double()
        scaled = torch.nn.functional.rms_norm(total, (D,), norm.cpu().double(), 1e-5)
        wrong += report(f"norm and product D{D} N{N}", actual, (total, scaled @ weight.cpu().double().T), weight.dtype)
    return wrong


def run_convolution(device: str = "cuda") -> int:
    """Short convolutions of rows that are the ends of wider ones; the number of those off from float64."""
    wrong = 0
    for (dtype, B, T, C, W), more in itertools.product(CONVOLUTIONS, (False, True)):
        x, dy = (torch.randn(B, T, C + 8, device=device).to(dtype)[..., 8:] for _ in range(2))
        tail = torch.randn(B, C, W - 1, device=device).to(dtype)
        given = [x, torch.randn(C, 1, W, device=device), *((torch.randn(C, device=device), tail) if more else ())]

        def outcome(given: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in given]
            y, _ = short_conv(*leaves, *(() if len(leaves) == 4 else (None, None)))
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        actual, expected = outcome(given, dy), outcome([x.cpu().double() for x in given], dy.cpu().double())
        wrong += report(f"convolution {(B, T, C, W)} {dtype} bias and tail={more}", actual, expected, dtype)
    return wrong


def report(name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    pairs = zip(actual, expected, strict=True)
    error = max(float((x.cpu().double() - y).norm() / y.norm()) for x, y in pairs)
    if not error <= TOLERANCE[dtype]:
        print(f"{name}: off by {error:.1e}", flush=True)
    return not error <= TOLERANCE[dtype]


def run_past_the_end(backend: str) -> None:
    """One sequence that is said to be longer than there are tokens."""
    operands = list(draw(Shape(1, 8, HEADS, 32, 32), "cuda", torch.bfloat16).operands)
    results(operands, None, torch.tensor([0, 64], device="cuda"), backend)


def sanitize(backend: str, tool: str, *, control: bool = False) -> bool:
    """Run a backend under a tool and print the verdict. Whether it is as it should be."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    # Bindings probe for functions that a driver may lack, which is no fault of a kernel.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [
        "--kernel-name",
        f"kns={NAMES[backend]}",
        sys.executable,
        __file__,
        "--inside",
        backend,
        *["--control"] * control,
    ]
    begin = time.monotonic()
    # Without torch's pool each tensor is an allocation, whose bounds memcheck knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if control:
        right = "Invalid __global__" in done.stdout
        verdict = "sees an access past the end" if right else "MISSES an access past the end"
    else:
        right = done.returncode == 0
        verdict = "clean" if right else f"FAILED ({done.returncode})"
    print(f"{backend:<7} {tool:<10} {verdict:<28} {time.monotonic() - begin:.0f} s", flush=True)
    if not right:
        print("\n".join(done.stdout.splitlines()[:40]), flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default=",".join(NAMES))
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.control:
        run_past_the_end(arguments.inside)
        return 0
    if arguments.inside:
        rest = (run_fused, run_decoding) if arguments.inside == "cuda" else (run_convolution,)
        wrong = run_shapes(arguments.inside) + sum(run() for run in rest)
        return 1 if wrong else 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the path; install the CUDA toolkit")
    verdicts = []
    for backend in arguments.backends.split(","):
        verdicts.append(sanitize(backend, "memcheck", control=True))
        verdicts += [sanitize(backend, tool) for tool in arguments.tools.split(",")]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
