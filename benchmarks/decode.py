"""Speed of decoding: tokens per second, and how near it is to reading the weights and states once a step.

    python benchmarks/decode.py [PRESET...] [--batch 1 8 64] [--seconds 2] [--device auto] [--json]

The decoder that `e88 generate` runs, with random weights: bf16 on a GPU, float32 on a CPU. First its logits over 64
steps of random tokens, and the states after them, are compared with those of an eager float32 step on the same weights,
by relative error. In float32 that may be 1e-4, in bf16 half as much again as plain eager operations under bf16 autocast
are off; where it is more no speed is printed. The floor is the time to move each weight once and each state twice at
the bandwidth that a large copy reaches.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from e88 import runtime
from e88.models.generate import Decoder, Sampling, prepare
from e88.models.lm import LanguageModel, LMState
from e88.ops import record_backends
from e88.sizing.presets import preset

TOLERANCE = 1e-4
# Roundings differ, and the largest of 64 steps with them.
BEYOND_PLAIN = 1.5
STEPS = 64
ROUND = 50


def models(name: str, device: torch.device, dtype: torch.dtype) -> tuple[LanguageModel, LanguageModel]:
    """The model to decode with, and one with the same numbers in float32 that runs plain operations."""
    torch.manual_seed(0)
    with device:
        plain = LanguageModel(preset(name)).requires_grad_(False)
    for matrix in plain.parameters():
        if matrix.ndim == 2:
            matrix.copy_(matrix.to(dtype))
    model = prepare(copy.deepcopy(plain), dtype)
    plain.set_backend("reference")
    return model, plain


class Trace(NamedTuple):
    """The logits [B, N] of each step, and the states after the last in one vector."""

    logits: list[Tensor]
    states: Tensor

    def error(self, exact: Trace) -> dict[str, float]:
        """The largest relative error of a step's logits, and that of the states."""
        pairs = [*zip(self.logits, exact.logits, strict=True), (self.states, exact.states)]
        found = torch.stack([(x.double() - y.double()).norm() / y.double().norm() for x, y in pairs])
        # The largest of a tensor, unlike that of floats, is NaN where one is.
        return {"logits": float(found[:-1].max()), "states": float(found[-1])}


def trace(decoder: Decoder, tokens: Tensor) -> Trace:
    """The decoder's, reading tokens [T, B] instead of its own."""
    decoder.read(tokens[:1].T)
    logits = []
    for token in tokens[1:]:
        decoder.token.copy_(token)
        decoder.advance()
        assert decoder.logits is not None
        logits.append(decoder.logits.clone())
    return Trace(logits, flat(decoder.state))


@torch.no_grad()
def plain_trace(model: LanguageModel, tokens: Tensor, dtype: torch.dtype) -> Trace:
    """The model's own steps, in float32 or under autocast."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, state = model.prefill(tokens[:1].T)
        logits = []
        for token in tokens[1:]:
            out, state = model.step(token, state)
            logits.append(out)
    return Trace(logits, flat(state))


def flat(state: LMState) -> Tensor:
    return torch.cat([part[name].flatten().float() for part in state for name in sorted(part)])


def seconds_a_step(decoder: Decoder, seconds: float) -> float:
    """The shortest of several rounds of steps, each queued as in generation and then waited for."""
    best, end = float("inf"), time.perf_counter() + seconds
    steps = ROUND if decoder.device.type == "cuda" else 2
    while best == float("inf") or time.perf_counter() < end:
        runtime.synchronise(decoder.device)
        start = time.perf_counter()
        for _ in decoder.tokens(steps):
            pass
        runtime.synchronise(decoder.device)
        best = min(best, (time.perf_counter() - start) / steps)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)

    def run() -> None:
        # Not copy_, which the driver runs at two thirds of the speed of a kernel.
        torch.mul(source, 1.0, out=target)
        runtime.synchronise(device)

    return 2 * source.nbytes / runtime.best_seconds(run, repeats=5)


def moved_bytes(decoder: Decoder) -> tuple[int, int]:
    """Bytes of all weights, and of the states read and written."""
    weights = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    return weights, 2 * sum(x.numel() * x.element_size() for part in decoder.state for x in part.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["e88-500m"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows decoded side by side")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least this long a measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = runtime.choose_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    rows = []
    backends: set[str] = set()
    for name in options.presets:
        model, plain = models(name, device, dtype)
        for batch in options.batch:
            decoder = Decoder(model, batch=batch, sampling=Sampling(temperature=0.8))
            tokens = torch.randint(256, (STEPS, batch), generator=torch.Generator().manual_seed(1)).to(device)
            with record_backends() as used:
                reached = trace(decoder, tokens)
            backends |= used
            exact = plain_trace(plain, tokens, torch.float32)
            off, allowed = reached.error(exact), {"logits": TOLERANCE, "states": TOLERANCE}
            if dtype != torch.float32:
                rounded = plain_trace(plain, tokens, dtype).error(exact)
                allowed = {name: BEYOND_PLAIN * error for name, error in rounded.items()}
            if not all(off[name] <= allowed[name] for name in off):
                print(f"{name}, batch {batch}: decoding is wrong ({off}, allowed {allowed}); no speed is reported")
                return 1
            seconds = seconds_a_step(decoder, options.seconds)
            weights, states = moved_bytes(decoder)
            floor = (weights + states) / bandwidth
            row = {"model": name, "batch": batch, "errors": off, "allowed": allowed, "graph": decoder.reason is None}
            row |= {"ms": 1e3 * seconds, "tokens_per_second": batch / seconds, "floor_ms": 1e3 * floor}
            rows.append({**row, "share_of_floor": floor / seconds, "weight_bytes": weights, "state_bytes": states})
    environment = runtime.environment(device, sorted(backends))
    if options.json:
        print(json.dumps({"rows": rows, "copy_bandwidth": bandwidth, "environment": environment}))
        return 0
    print(f"{environment['hardware']}, {str(dtype).removeprefix('torch.')}, copy {bandwidth / 1e12:.2f} TB/s")
    for row in rows:
        head = f"{row['model']:<20} batch {row['batch']:<4} {'graph' if row['graph'] else 'eager'}"
        told = "errors " + ", ".join(f"{k} {e:.1e} (of {row['allowed'][k]:.1e})" for k, e in row["errors"].items())
        speed = f"{row['ms']:8.3f} ms {row['tokens_per_second']:10,.0f} tok/s  {row['share_of_floor']:.0%} of the floor"
        print(f"{head} {speed}  {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
