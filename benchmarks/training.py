"""Speed of a whole training step: E88, the same model without its recurrence, its rivals, and their own libraries.

    python benchmarks/training.py [PRESET...] [--batch-size 8] [--window 256] [--seconds 3] [--layers] [--json]

Steps of the models are interleaved, so that a busy machine slows all of them alike; tok/s is the median over rounds.
"Without its recurrence" keeps every projection, convolution, norm and gate and puts a sum in the recurrence's place; on
a GPU torch.compile fuses what is left between the projections, so that the ceiling is not lowered by extra passes.
"In its library alone" is a rival library's own layer in the plainest loop, without this package.
--layers: what a sample of the layers' statistics costs, as a share of a step and at the default interval.
Peak memory is that of one model's step, without what the other models hold.
The output ends with a profile of the first model's step. No speed is printed for a model whose layer fails its check.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from e88 import runtime
from e88.layers import accuracy
from e88.layers import e88 as layer
from e88.layers.mixer import rival_libraries
from e88.models.config import E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.models.lm import LanguageModel
from e88.ops import record_backends
from e88.ops.accuracy import TOLERANCE, Shape, check, worst
from e88.ops.edges import composed
from e88.sizing.presets import preset
from e88.training.config import Budget, TrainingConfig
from e88.training.distributed import Group
from e88.training.layers import LayerStats
from e88.training.optimizer import Optimizer
from e88.training.step import autocast

DEMO = ["tiny-e88", "tiny-gdn", "tiny-mamba2", "tiny-transformer"]


def no_recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *_: object) -> tuple:
    """What stands in for the recurrence: one pass over its inputs, with a gradient for each."""
    y = v + g.unsqueeze(-1).to(v.dtype)
    width = min(q.shape[-1], v.shape[-1])
    y[..., :width] += (q + k)[..., :width]
    return (y if beta is None else y * beta.unsqueeze(-1).to(v.dtype)), None


def without_recurrence(
    qkv: Tensor, a: Tensor, A_log: Tensor | None = None, dt_bias: Tensor | None = None, *,
    n_heads: int, head_k_dim: int, head_v_dim: int, b: Tensor | None = None, gate: Tensor | None = None, **_: object,
) -> tuple:  # fmt: skip
    """The layer's operator with `no_recurrence` inside."""
    sizes = (n_heads, head_k_dim, head_v_dim)
    return composed(no_recurrence, qkv, a, A_log, dt_bias, b, gate, None, None, "tanh", sizes)


class LibraryModel(nn.Module):
    """A rival library's own layers, each behind a norm, added to the residual stream; embedding tied with the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(library_layer(config) for _ in range(config.depth))
        self.norms = nn.ModuleList(nn.RMSNorm(config.dim, eps=1e-5) for _ in range(config.depth + 1))

    def nll(self, windows: Tensor) -> Tensor:
        h = self.embedding(windows[:, :-1])
        for norm, mixer in zip(self.norms, self.layers, strict=False):
            y = mixer(norm(h))
            h = h + (y[0] if isinstance(y, tuple) else y)
        logits = F.linear(self.norms[-1](h), self.embedding.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def library_layer(config: ModelConfig) -> nn.Module:
    """The layer of the rival's library with the sizes of this model's mixer."""
    c = config.mixer
    if isinstance(c, GatedDeltaNetConfig):
        from fla.layers import GatedDeltaNet

        return GatedDeltaNet(
            config.dim, expand_v=c.expand_v, head_dim=c.head_dim, num_heads=c.n_heads, use_gate=c.gate,
            use_short_conv=c.conv > 0, conv_size=c.conv,
        )  # fmt: skip
    assert isinstance(c, Mamba2Config)
    from mamba_ssm import Mamba2

    return Mamba2(
        config.dim, d_state=c.d_state, d_conv=c.conv, expand=c.expand, headdim=c.head_dim, ngroups=c.n_groups,
        chunk_size=c.chunk,
    )  # fmt: skip


def library_of(config: ModelConfig, device: torch.device) -> str | None:
    """The name of the library whose own layer can be timed here beside ours, or None."""
    name = {"gated_deltanet": "fla", "mamba2": "mamba-ssm"}.get(config.mixer.kind)
    return name if name and device.type == "cuda" and rival_libraries()[name].startswith("ready") else None


class Step:
    """One model with its optimiser, ready to take training steps on random tokens.

    `operator` stands in for the layer's own where it is given. `sampled`: every step samples the layers.
    """

    def __init__(
        self,
        model: type[nn.Module],
        config: ModelConfig,
        batch: int,
        window: int,
        device: torch.device,
        operator: Callable | None = None,
        sampled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.tokens = device, batch * window
        self.operator = operator or layer.fused_tanh_delta_rule
        held = allocated(device)
        with device:
            self.model = model(config).train()
        self.stats = LayerStats(self.model, Group(device)) if sampled else None
        self.training = TrainingConfig(budget=Budget(steps=1))
        self.optimizer = Optimizer(self.model, self.training)
        self.windows = torch.randint(config.vocab_size, (batch, window + 1), device=device)
        for _ in range(2):
            self()
        self.own = allocated(device) - held

    def __call__(self) -> None:
        with patch.object(layer, "fused_tanh_delta_rule", self.operator):
            with autocast(self.device, "auto"), self.stats.watching() if self.stats else nullcontext():
                loss = self.model.nll(self.windows).mean()
            loss.backward()
        if self.stats:
            self.stats.read()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int | None:
        """Bytes that a step of this model needs at most, parameters and optimiser state included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        others = allocated(self.device) - self.own
        self()
        return torch.cuda.max_memory_allocated(self.device) - others


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def recurrence_error(config: E88Config, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of the recurrence against float64, at the model's head shape."""
    shape = Shape(2, 70, min(config.n_heads, 4), config.head_k_dim, config.head_v_dim)
    return worst(check(shape, device, dtype))[1]


def timed(step: Callable[[], None], device: torch.device) -> float:
    runtime.synchronise(device)
    start = time.perf_counter()
    step()
    runtime.synchronise(device)
    return time.perf_counter() - start


def measure(steps: dict[str, Step], seconds: float, device: torch.device) -> dict[str, float]:
    """Median seconds of a step of each model, interleaved, for at least `seconds` a model."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    while min(map(len, times.values())) < 5 or time.perf_counter() - started < seconds * len(steps):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: statistics.median(values) for name, values in times.items()}


def profile_table(step: Step, rows: int = 14) -> list[dict]:
    """Share of a step's time by operation, largest first."""
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA if step.device.type == "cuda" else ProfilerActivity.CPU}
    with profile(activities=activities) as recorded:
        for _ in range(3):
            step()
        runtime.synchronise(step.device)
    key = "self_device_time_total" if step.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events)
    return [
        {"operation": e.key, "share": getattr(e, key) / total, "ms": getattr(e, key) / 3e3, "calls": e.count // 3}
        for e in events[:rows]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=DEMO)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0, help="at least this long a model")
    parser.add_argument("--layers", action="store_true", help="also steps that sample the layers' statistics")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = runtime.choose_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    steps: dict[str, Step] = {}
    errors: dict[str, float] = {}
    checks: dict[str, accuracy.Verdict] = {}
    alone: dict[str, str] = {}
    used: set[str] = set()
    bare = torch.compile(without_recurrence) if device.type == "cuda" else without_recurrence
    for name in options.presets:
        config = preset(name)
        if isinstance(config.mixer, E88Config):
            errors[name] = recurrence_error(config.mixer, device, dtype)
            if not errors[name] <= TOLERANCE[dtype]:
                print(f"{name}: recurrence is wrong (relative error {errors[name]:.1e}); no speed is reported")
                return 1
        found = checks[name] = accuracy.check(config, device, dtype, tune=(options.batch_size, options.window))
        if not found.ok:
            print(f"{name}: its layer is wrong ({found.tensor} off by {found.error:.1e}); no speed is reported")
            return 1
        sizes = (config, options.batch_size, options.window, device)
        with record_backends() as backends:
            steps[name] = Step(LanguageModel, *sizes)
        used |= backends
        if isinstance(config.mixer, E88Config):
            steps[f"{name} without its recurrence"] = Step(LanguageModel, *sizes, bare)
        if options.layers:
            steps[f"{name} sampling its layers"] = Step(LanguageModel, *sizes, sampled=True)
        library = library_of(config, device)
        if library:
            alone[name] = f"{name} in {library} alone"
            steps[alone[name]] = Step(LibraryModel, *sizes)
    seconds = measure(steps, options.seconds, device)
    rows = {name: {"ms": s * 1e3, "tokens_per_second": steps[name].tokens / s} for name, s in seconds.items()}
    for name, step in steps.items():
        rows[name]["peak_bytes"] = step.peak_bytes()
    for name in errors:
        rows[name]["recurrence_error"] = errors[name]
        rows[name]["share_of_ceiling"] = seconds[f"{name} without its recurrence"] / seconds[name]
    if options.layers:
        every = steps[options.presets[0]].training.layers_every
        for name in options.presets:
            extra = seconds[f"{name} sampling its layers"] / seconds[name] - 1
            rows[name] |= {"sample_share": extra, "sampling_share": extra / every}
    for name, found in checks.items():
        rows[name]["layer_check"] = {"tensor": found.tensor, "error": found.error, "backends": found.backends}
    for name, other in alone.items():
        rows[name]["share_of_library"] = seconds[other] / seconds[name]
    table = profile_table(steps[options.presets[0]])
    environment = runtime.environment(device, sorted(used))
    shape = {"batch_size": options.batch_size, "window": options.window}
    if options.json:
        print(json.dumps({**shape, "models": rows, "profile": table, "environment": environment}))
        return 0
    print(f"{environment['hardware']}, batch {options.batch_size} x {options.window}, backends {sorted(used)}")
    for name, row in rows.items():
        share = f"  {row['share_of_ceiling']:.0%} of the ceiling" if "share_of_ceiling" in row else ""
        peak = f"  {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
        if "share_of_library" in row:
            share = f"  {row['share_of_library']:.0%} of its library alone"
        if "sample_share" in row:
            share += f"  a sample costs {row['sample_share']:.1%} of a step, {row['sampling_share']:.2%} by default"
        print(f"{name:<40} {row['ms']:8.1f} ms  {row['tokens_per_second']:10,.0f} tok/s{peak}{share}")
    print(f"\nprofile of a step of {options.presets[0]}")
    for row in table:
        print(f"{row['share']:6.1%} {row['ms']:8.2f} ms  x{row['calls']:<5} {row['operation'][:80]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
