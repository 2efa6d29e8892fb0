"""The only place that asks about the machine: devices, packages, versions, seeds, hardware names.

torch is imported inside the functions that need it, so that commands without tensors stay instant.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e88.errors import UserError

if TYPE_CHECKING:
    import torch

# Dense bf16 matrix peak in FLOP/s, from the vendors' datasheets; the longest matching name wins.
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}
PACKAGES = ("torch", "numpy", "numba", "triton", "safetensors", "schedulefree", "transformers", "tokenizers",
            "fla-core", "tilelang", "mamba-ssm", "causal-conv1d", "cuda-bindings", "tensorboard", "matplotlib",
            "jinja2")  # fmt: skip


@cache
def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python's, ours, and the version of every package of interest that is installed."""
    from e88 import __version__

    found = {name: version for name in PACKAGES if (version := package_version(name))}
    return {"python": platform.python_version(), "e88": __version__, **found}


@cache
def commit() -> str | None:
    """The commit of the source tree this package runs from, `-dirty` where it has changes. Outside a checkout of it
    (a copy may be installed within another project's) it is what the environment variable E88_COMMIT says, or None."""
    folder = Path(__file__).resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("E88_COMMIT")
    return head + ("-dirty" if dirty else "")


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()


@cache
def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware_name(device: torch.device) -> str:
    """What a record calls the hardware: the GPU's name, or the processor's with the threads in use."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def environment(device: torch.device, backends: list[str], processes: int = 1) -> dict[str, Any]:
    """The environment part of a record. processes: how many such devices the run was spread over."""
    name = hardware_name(device)
    return {
        "hardware": name if processes == 1 else f"{processes} x {name}",
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "backends": backends,
    }


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is the first CUDA device where there is one, else the CPU.

    Raises UserError where the device asked for is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' was asked for, but torch {torch.__version__} sees no GPU; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use auto, cpu or cuda")
    return device


def set_threads(threads: int | None) -> None:
    """Use `threads` CPU threads for torch and numba (None: leave as they are)."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a host clock read next is honest."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the GPU, resident set of the process on the CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device: torch.device) -> int | None:
    """What the GPU has, or for the CPU the machine, or the control group that the process is in; None if unknown."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError):
        return None
    with suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that model FLOP utilisation is a share of: the bf16 datasheet figure on a known GPU, the best of a few
    float32 matrix products on a CPU (measured, a tenth or two of a second), None on an unknown GPU."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return max(((len(k), v) for k, v in PEAK_BF16_FLOPS.items() if k in name), default=(0, None))[1]
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2.0 * n**3 / best_seconds(lambda: a @ b, repeats=6)


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The shortest of `repeats` timed calls on the host, after one call unmeasured."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def cache_folder() -> Path:
    """Where prepared data and compiled kernels are kept: E88_CACHE, else ~/.cache/e88."""
    return Path(os.environ.get("E88_CACHE") or Path.home() / ".cache" / "e88")
