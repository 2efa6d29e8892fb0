"""Kernels as functions that autograd and the compiler understand, each list of arguments written once, as a NamedTuple.

Called eagerly, such a function runs its kernels at once, under a `torch.autograd.Function` where a gradient is asked
for: a custom operator takes the host several times as long. While torch.compile traces, it is a custom operator, or a
pair of them, which the compiler takes as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

Function = Callable[..., Any]
# NamedTuples all.
Operands = TypeVar("Operands", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Any, ...])
Saved = TypeVar("Saved", bound=tuple[Any, ...])
Gradients = TypeVar("Gradients", bound=tuple[Tensor | None, ...])
# The shape of the tensor that stands for None among an operator's results, where there are only tensors.
NONE = (0,) * 6


def operator(name: str, run: Function, fake: Function, arguments: Any = None, **options: Any) -> Function:
    """`run`, which has no gradient, as a function that the compiler takes as the operator `name`.

    `fake` makes the same results without values. Types are those in the signature of `run`, or where that is (*values),
    the fields of the NamedTuple `arguments`. The options are those of `torch.library.custom_op`.
    """
    hints = {} if arguments is None else get_type_hints(arguments)
    registered = _registered(name, run, fake, hints, get_type_hints(run)["return"], **options)
    return lambda *values: registered(*values) if torch.compiler.is_compiling() else run(*values)


def _registered(name: str, run: Function, fake: Function, hints: dict[str, Any], results: Any, **options: Any) -> Any:
    """A `torch.library` operator, typed by hints, if any; its results are a tensor, or those of a NamedTuple."""
    if hints:
        run, fake = (_typed(f, hints, results) for f in (run, fake))
    made = torch.library.custom_op(name, run, **{"mutates_args": (), **options})
    made.register_fake(fake)
    return made


def _typed(function: Function, hints: dict[str, Any], results: Any) -> Function:
    def call(*values: Any) -> Any:
        found = function(*values)
        return found if results is Tensor else tuple(values[0].new_empty(NONE) if x is None else x for x in found)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in hints.items()]
    returned = Tensor if results is Tensor else tuple[(Tensor,) * len(results._fields)]  # type: ignore[misc]
    call.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return call


def differentiable(
    name: str,
    operands: Callable[..., Operands],
    saved: Callable[..., Saved],
    results: Callable[[Operands, bool], Results],
    forward: Callable[[Operands, Results], None],
    keep: Callable[[Operands, Results], Saved],
    gradients: Callable[..., Gradients],
    backward: Callable[..., None],
    unpack: Callable[[Saved, Gradients], tuple[Tensor | None, ...]] = lambda kept, found: found,
    outputs: int = 2,
    **options: Any,
) -> Callable[[Operands], Any]:
    """The function that two kernels compute, from operands to the first `outputs` of the results.

    Args:
        name: of the operators, NAME_forward and NAME_backward; `options` are those of `torch.library.custom_op`.
        operands, saved: what `forward` and `backward` read. Both begin with their tensors, and with one that is never
            None.
        results: allocates what `forward` fills in: the outputs, any but the first perhaps None, and only if asked for,
            what `backward` needs, else None.
        keep: picks what is saved for `backward`, if anything.
        gradients: allocates what `backward` fills in, given the gradients of the outputs (any but the first perhaps
            None), and what was saved. No two of them share memory.
        unpack: the gradients of the operands that have any, in order, from those.
    """
    hints = get_type_hints(saved)
    tensors = sum(hint in (Tensor, Tensor | None) for hint in hints.values())
    make_results, make_gradients = (get_type_hints(f)["return"] for f in (results, gradients))

    def compute(x: Operands, save: bool) -> Results:
        forward(x, found := results(x, save))
        return found

    def derive(*given: Any) -> Gradients:
        """Given the outputs' gradients and what was saved."""
        backward(*given, found := gradients(*given))
        return found

    def remember(ctx: Any, x: Operands, found: Results) -> None:
        kept = keep(x, found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept[:tensors])
        ctx.numbers, ctx.shape = kept[tensors:], found[0].shape

    def walk(ctx: Any, derive: Function, dy: Tensor | None, *dothers: Tensor | None) -> tuple[Tensor | None, ...]:
        x = saved(*ctx.saved_tensors, *ctx.numbers)
        found = unpack(x, derive(x[0].new_zeros(ctx.shape) if dy is None else dy, *dothers, x))
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    traced_forward = _registered(
        f"{name}_forward",
        lambda *values: compute(operands(*values[:-1]), values[-1]),
        lambda *values: results(operands(*values[:-1]), values[-1]),
        {**get_type_hints(operands), "save": bool},
        make_results,
        **options,
    )
    traced_backward = _registered(
        f"{name}_backward",
        lambda *values: derive(*values[:outputs], saved(*values[outputs:])),
        lambda *values: gradients(*values[:outputs], saved(*values[outputs:])),
        {"dy": Tensor, **{f"dother{i}": Tensor | None for i in range(1, outputs)}, **hints},
        make_gradients,
        **options,
    )

    def restored(make: Function, found: tuple[Tensor, ...]) -> Any:
        return make(*(None if x.shape == NONE else x for x in found))

    def derive_traced(*given: Any) -> Gradients:
        return restored(make_gradients, traced_backward(*given[:-1], *given[-1]))

    traced_forward.register_autograd(
        lambda ctx, *gradients: walk(ctx, derive_traced, *gradients[:outputs]),
        setup_context=lambda ctx, inputs, output: remember(ctx, operands(*inputs[:-1]), restored(make_results, output)),
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
            x = operands(*values)
            found = compute(x, True)
            remember(ctx, x, found)
            return tuple(found[:outputs])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            # Autograd records what it may differentiate again; the operator's results refuse that, kernels' would not.
            return walk(ctx, derive_traced if torch.is_grad_enabled() else derive, *gradients)

    def call(x: Operands) -> tuple[Tensor, ...]:
        save = torch.is_grad_enabled() and any(isinstance(u, Tensor) and u.requires_grad for u in x)
        if torch.compiler.is_compiling():
            return tuple(traced_forward(*x, save)[:outputs])
        return Eager.apply(*x) if save else tuple(compute(x, False)[:outputs])

    return call
