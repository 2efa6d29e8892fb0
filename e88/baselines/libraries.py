"""The libraries that run the rivals on a GPU: is one here, can it be trusted, and what a record calls it.

A rival's `backend` is `auto`, the name of its library, or `torch`: our own PyTorch code, which serves everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from e88.errors import UserError, unknown_name
from e88.ops.backends import announce, note
from e88.ops.norms import compute_dtype
from e88.runtime import package_version

PLAIN = "torch"
HALF = (torch.bfloat16, torch.float16)
# Of this range Triton compiles fla's backward of the gated delta rule wrongly for Hopper (its issue 640).
BAD_TRITON = ((3, 4, 0), (3, 7, 1))


class Library(NamedTuple):
    """A rival's library. `missing`: why this machine cannot use it, or None; `mode`: its name in records, with its
    version and the kernels that serve."""

    missing: Callable[[], str | None]
    mode: Callable[[], str]


def choose(wanted: str, x: Tensor, **misfits: str | None) -> str:
    """The name of what runs a call on x: a library, or `torch`, our PyTorch code; records which.

    misfits: a mixer's libraries in order of preference ("_" for "-"), each with the reason why it cannot serve this
    model, or None. Raises UserError where `wanted` is unknown or cannot be had. A fallback on a GPU is announced once.
    """
    return _chosen(wanted, x.device.type, compute_dtype(x), tuple(misfits.items()))


def _chosen(wanted: str, device: str, dtype: torch.dtype, misfits: tuple[tuple[str, str | None], ...]) -> str:
    names = [name.replace("_", "-") for name, _ in misfits]
    if wanted not in ("auto", PLAIN, *names):
        raise unknown_name("backend", wanted, ["auto", *names, PLAIN])
    misplaced = _misplaced(device, dtype)
    reasons = {}
    for name, (_, misfit) in zip(names, misfits, strict=True):
        if wanted not in ("auto", name):
            continue
        library = LIBRARIES[name]
        reasons[name] = misplaced or misfit or library.missing()
        if reasons[name] is None:
            note(library.mode())
            return name
    if wanted in names:
        raise UserError(f"backend '{wanted}' cannot serve this model here: {reasons[wanted]}; or use backend 'auto'")
    # On a CPU, or in a precision that was asked for, nothing faster could be had.
    if reasons and not misplaced:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        announce(f"this model runs on slow PyTorch code ({why})")
    note(PLAIN)
    return PLAIN


# The compiler calls it while tracing and keeps the result, as in `e88.ops.backends`.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _misplaced(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"it runs on CUDA tensors only, not on {device}"
    if dtype not in HALF:
        return f"it computes in half precision, and the inputs are {str(dtype).removeprefix('torch.')}"
    return None


def status() -> dict[str, str]:
    """For every library what records call it here, or "no" and the reason."""
    reasons = {name: library.missing() for name, library in LIBRARIES.items()}
    return {name: f"no: {why}" if why else f"ready: {LIBRARIES[name].mode()}" for name, why in reasons.items()}


@lru_cache
def _absent(package: str, *modules: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    for module in (*modules, "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed; pip install {package}"
    return None


def _load(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported: a broken installation must not end a run on another rival."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return f"import {name} fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "3.7.1+git" -> (3, 7, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


@lru_cache
def fla_missing() -> str | None:
    """Why flash-linear-attention cannot be used here, or None."""
    package = "flash-linear-attention"
    absent = _absent(package, "fla")
    if absent:
        return absent
    version = package_version("fla-core") or ""
    if version_numbers(version) < (0, 6):
        return f"fla-core {version} is older than 0.6; pip install --upgrade {package}"
    kernels = _load("fla.ops.gated_delta_rule")
    if isinstance(kernels, str):
        return kernels
    import triton

    low, high = BAD_TRITON
    hopper = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    if _tilelang_serves():
        # It tells of every kernel it compiles, on the standard output.
        importlib.import_module("tilelang").set_log_level("WARNING")
    elif hopper and low <= version_numbers(triton.__version__) < high:
        need = "Triton 3.7.1, or tilelang with CUDA's nvcc"
        return f"its gradients are wrong on Hopper GPUs with Triton {triton.__version__}; install {need}"
    return None


def _tilelang_serves() -> bool:
    """Whether fla takes its TileLang kernels for the backward of the gated delta rule."""
    backends: Any = importlib.import_module("fla.ops.common.backends")
    return bool(backends.CommonTileLangBackend.can_use())


@lru_cache
def fla_mode() -> str:
    """fla's name in records."""
    kernels = "tilelang" if _tilelang_serves() else "triton"
    return f"fla {package_version('fla-core')} chunk ({kernels})"


@lru_cache
def mamba_missing() -> str | None:
    """Why mamba-ssm cannot be used here, or None."""
    absent = _absent("mamba-ssm", "mamba_ssm")
    if absent:
        return absent
    # To tune its kernels takes it minutes: the next process, such as the next run of a bench, finds them tuned.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    kernels = _load("mamba_ssm.ops.triton.ssd_combined")
    return kernels if isinstance(kernels, str) else None


@lru_cache
def mamba_is_fused() -> bool:
    """Whether mamba-ssm has the convolution that its fused pass needs (causal-conv1d)."""
    kernels: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    return kernels.causal_conv1d_fwd_function is not None


@lru_cache
def mamba_mode(fused: bool = True) -> str:
    """mamba-ssm's name in records, of its fused pass where there is one, or where not `fused` of its scan."""
    fused = fused and mamba_is_fused()
    convolution = f"fused (causal-conv1d {package_version('causal-conv1d')})" if fused else "scan"
    return f"mamba-ssm {package_version('mamba-ssm')} {convolution}"


@lru_cache
def cudnn_missing() -> str | None:
    """Why cuDNN's flash attention cannot be used here, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0):
        return "it is the faster one on NVIDIA GPUs of capability 9.0 or newer only"
    try:
        # Asked for while generating, too, where no gradient is kept.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.inference_mode(False), torch.enable_grad():
            x = torch.randn(1, 1, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            torch.autograd.grad(F.scaled_dot_product_attention(x, x, x, is_causal=True).sum(), x)
    except RuntimeError as error:
        return f"a first try fails ({str(error).splitlines()[0]})"
    return None


@lru_cache
def flash_missing() -> str | None:
    """Why PyTorch's flash attention cannot be used here, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"


LIBRARIES = {
    "fla": Library(fla_missing, fla_mode),
    "mamba-ssm": Library(mamba_missing, mamba_mode),
    "cudnn": Library(cudnn_missing, lambda: f"sdpa cudnn {torch.backends.cudnn.version()}"),
    "flash": Library(flash_missing, lambda: "sdpa flash"),
}
