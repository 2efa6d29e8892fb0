"""What the CUDA backend hands its kernels, against the parameters in their sources; nothing is launched."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from operands import operands
from projections import projections
from torch import Tensor

from e88.ops.cuda import compile as kernels
from e88.ops.cuda import fused, launch, recurrence
from e88.ops.cuda.plan import Plan

EVERYTHING = {"gate": True, "b": True, "state": True}
PACKED = {"lengths": (3, 0, 4)}


def parameters(kernel: str) -> list[tuple[str, str]]:
    """Type and name of each, types without const, * and __restrict__ but for a final *."""
    found = re.search(rf"^e88_{kernel.removesuffix('_float')}\((.*?)\) {{", kernels.source(kernel), re.S | re.M)
    assert found is not None
    split = (re.fullmatch(r"\s*(?:const )?(\w+)(\*?)(?: __restrict__)? (\w+)", part) for part in found[1].split(","))
    return [(part[1] + part[2], part[3]) for part in split if part is not None]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would have been launched, their arguments checked."""
    names: list[str] = []

    def check(kernel: str, plan: Plan, save: bool, device: Any, grid: Any, pointers: Any, numbers: Any) -> None:
        kernel = f"{kernel}_float" if plan.precise else kernel
        names.append(kernel if save else f"{kernel}, nothing saved")
        wide = torch.float32
        types = {"float*": wide, "i64*": torch.int64, "u16*": torch.float16, "element*": plan.dtype}
        types["head_scalar*"] = plan.dtype if plan.edges.narrow else wide
        types["summed*"] = wide if plan.splits > 1 else plan.dtype
        types["summed_scalar*"] = wide if plan.splits > 1 else types["head_scalar*"]
        wanted = parameters(kernel)
        assert len(wanted) == len(pointers) + len(numbers)
        assert all(type(x) is int or isinstance(x, ctypes.c_int64) for x in numbers) and min(grid) > 0
        for (kind, name), x in zip(wanted, [*pointers, *numbers], strict=True):
            if isinstance(x, Tensor):
                assert types[kind] == x.dtype and x.numel() > 0, name
            elif isinstance(x, ctypes.c_int64):
                assert kind == "i64", name
            else:
                # A number, or the address of a column among the projections.
                assert x is None or kind == "int" or types[kind] == plan.dtype, name

    for module in (recurrence, fused):
        monkeypatch.setattr(module, "launch", check)
    monkeypatch.setattr(launch, "_shared_bytes", lambda device: 232448)
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 128)])
@pytest.mark.parametrize("options", [{}, {"gate": False, "state": False}, PACKED], ids=str)
def test_the_recurrence(launched: list[str], dtype: torch.dtype, K: int, V: int, options: dict[str, Any]) -> None:
    x = operands(2, 7, 3, K, V, **options)
    given = [None if t is None else t.to(dtype).requires_grad_() for t in (x.q, x.k, x.v, x.g, x.beta, x.initial_state)]
    leaves = [t for t in given if t is not None]
    results = recurrence.run(*given, x.cu_seqlens, "tanh")
    grads = torch.autograd.grad(results, leaves, [torch.zeros_like(r) for r in results])
    assert [(d.shape, d.dtype) for d in grads] == [(t.shape, t.dtype) for t in leaves]
    with torch.no_grad():
        recurrence.run(*given, x.cu_seqlens, "tanh")
    names = ["forward", "backward", "forward, nothing saved"]
    if dtype == torch.float32:
        names = ["forward_float", "backward_float", "forward_float, nothing saved"]
    assert launched == names


@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 32), (32, 128), (128, 128)])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("options", [{}, EVERYTHING, EVERYTHING | PACKED, {"decay": False}, {"tied": True}], ids=str)
def test_from_projections(launched: list[str], K: int, V: int, wide: bool, options: dict[str, Any]) -> None:
    V = K if "tied" in options else V
    x = projections(2, 7, 3, K, V, **options).to(torch.float32)
    narrow = {n: getattr(x, n).bfloat16() for n in ("qkv", "a", "b", "gate") if getattr(x, n) is not None}
    x = x.replace(**{n: t for n, t in narrow.items() if not (wide and n in ("a", "b"))})

    def run(x: Any) -> Any:
        given = (x.qkv, x.a, x.A_log, x.dt_bias, x.b, x.gate, x.initial_state, x.cu_seqlens, "tanh", x.sizes)
        return recurrence.run_fused(*given)

    results = x.results_of(run)
    for name, d in results.items():
        given = getattr(x, name.removeprefix("d_"), None)
        assert given is None or (d.shape, d.dtype) == (given.shape, given.dtype), name
    with torch.no_grad():
        run(x)
    assert launched[0] == "forward" and launched[-1] == "forward, nothing saved"
    assert launched[1:-1] in (["backward"], ["backward", "finish"])
    if "decay" not in options:
        packed = results["d_qkv"].untyped_storage().data_ptr()
        assert (results["d_a"].untyped_storage().data_ptr() == packed) == (not wide)
