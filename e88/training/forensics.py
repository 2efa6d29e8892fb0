"""Naming the place where a number stopped being finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e88.models.lm import LanguageModel


def first_bad_module(model: LanguageModel, windows: Tensor) -> str | None:
    """The first module in order of execution whose output on these windows is not finite (a leaf before its parent)."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in outputs):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.nll(windows)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_bad_gradient(model: LanguageModel) -> str | None:
    """The parameter nearest the output whose gradient is not finite: where the backward pass went wrong first."""
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    ordered = [n for n in bad if n.startswith("norm.")] + [n for n in reversed(bad) if n.startswith("blocks.")] + bad
    return ordered[0] if ordered else None


def explain(model: LanguageModel, windows: Tensor, loss: float, step: int) -> str:
    """One line for a record: what was not finite, at which step, and in which layer it began."""
    module = first_bad_module(model, windows)
    if module is not None:
        return f"loss is {loss} at step {step}; the first output that is not finite is that of {module}"
    parameter = first_bad_gradient(model)
    if parameter is not None:
        return f"a gradient is not finite at step {step} (loss {loss:.4g}); nearest the output: {parameter}"
    return f"loss is {loss} at step {step}; no single layer's output is not finite"
