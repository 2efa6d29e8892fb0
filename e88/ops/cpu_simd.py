"""SIMD vectors for numba: values of many float32 that LLVM maps onto the machine's registers.

Numba leaves vectorisation to a heuristic that fails on short loops with several sums, and passes an array as seven
words with a reference count. Here vectors and bare pointers are types of their own, so that sums stay in registers.

A vector is LANES columns of one row of the state, in two halves. It is wider than a register on purpose: the parts
are independent work for a processor that would wait on the long chain of arithmetic in tanh.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

HALF = 16
LANES = 2 * HALF

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
# Fused multiply-add and reciprocals are welcome. Reordering is not: tanh near 0 depends on the order.
_FLAGS = ("contract", "arcp", "nsz")


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: _Vector) -> None:
        super().__init__(manager, fe_type, ir.VectorType(_FLOAT, LANES))


vector = _Vector()
floats = types.CPointer(types.float32)
integers = types.CPointer(types.int64)


def _define(result: Any, *parameters: Any, name: Any = None) -> Callable[[Any], Any]:
    """Make a function that emits instructions callable from kernels, without its first argument, the builder."""

    def register(emit: Any) -> Any:
        key = name or emit
        if key is emit:
            # Numba looks the name up in its module, where a decorator has yet to put it.
            setattr(sys.modules[emit.__module__], emit.__name__, emit)

        @infer_global(key)
        class _Typing(ConcreteTemplate):
            cases = [signature(result, *parameters)]

        @lower_builtin(key, *parameters)
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = emit(builder, *args)
            if isinstance(value, tuple):
                return context.make_tuple(builder, sig.return_type, value)
            return context.get_dummy_value() if value is None else value

        return key

    return register


def _constant(value: float, like: Any, element: Any = _FLOAT) -> Any:
    kind = ir.VectorType(element, like.type.count)
    return ir.Constant(kind, [float(np.float32(value)) if element is _FLOAT else value] * kind.count)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return _shuffle(builder, first, undefined, [0] * lanes)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _part(builder: Any, value: Any, index: int, lanes: int) -> Any:
    return _shuffle(builder, value, value, list(range(index * lanes, (index + 1) * lanes)))


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=_FLAGS)


def _sub(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b, flags=_FLAGS)


def _mul(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b, flags=_FLAGS)


_define(vector, vector, vector, name=operator.add)(_add)
_define(vector, vector, vector, name=operator.sub)(_sub)
_define(vector, vector, vector, name=operator.mul)(_mul)


def _at(builder: Any, pointer: Any, index: Any, lanes: int) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(_FLOAT, lanes).as_pointer())


def _load(builder: Any, pointer: Any, index: Any, lanes: int) -> Any:
    return builder.load(_at(builder, pointer, index, lanes), align=4)


def _store(builder: Any, pointer: Any, index: Any, value: Any) -> None:
    builder.store(value, _at(builder, pointer, index, value.type.count), align=4)


@_define(floats, types.int64)
def floats_at(builder: Any, address: Any) -> Any:
    """The pointer to float32 at an address."""
    return builder.inttoptr(address, _FLOAT.as_pointer())


@_define(integers, types.int64)
def integers_at(builder: Any, address: Any) -> Any:
    """The pointer to int64 at an address."""
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@_define(types.int64, integers)
def take(builder: Any, counter: Any) -> Any:
    """Add one to a counter that threads share; what it was before."""
    return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")


@_define(floats, floats, types.intp)
def advance(builder: Any, pointer: Any, count: Any) -> Any:
    """The pointer `count` numbers further on."""
    return builder.gep(pointer, [count])


@_define(vector, floats, types.intp)
def load(builder: Any, pointer: Any, index: Any) -> Any:
    """The vector at pointer[index]."""
    return _load(builder, pointer, index, LANES)


@_define(types.void, floats, types.intp, vector)
def store(builder: Any, pointer: Any, index: Any, value: Any) -> None:
    """Write a vector to pointer[index]."""
    _store(builder, pointer, index, value)


@_define(types.void, floats, types.intp, floats, types.intp)
def copy_half(builder: Any, target: Any, to: Any, source: Any, start: Any) -> None:
    """Copy HALF numbers."""
    _store(builder, target, to, _load(builder, source, start, HALF))


@_define(types.void, floats, types.intp, types.intp, vector, types.boolean)
def store_halves(builder: Any, pointer: Any, low: Any, high: Any, value: Any, together: Any) -> None:
    """Write the halves of a vector to pointer[low] and pointer[high], or their sum to pointer[low]."""
    halves = [_part(builder, value, i, HALF) for i in range(2)]
    with builder.if_else(together) as (then, otherwise):
        with then:
            _store(builder, pointer, low, _add(builder, *halves))
        with otherwise:
            _store(builder, pointer, low, halves[0])
            _store(builder, pointer, high, halves[1])


@_define(vector, types.float32)
def splat(builder: Any, value: Any) -> Any:
    """A vector that repeats one number."""
    return _splat(builder, value, LANES)


@_define(vector, floats, types.intp, types.intp)
def pair(builder: Any, pointer: Any, low: Any, high: Any) -> Any:
    """A vector whose halves repeat pointer[low] and pointer[high]."""
    first, second = (builder.load(builder.gep(pointer, [index]), align=4) for index in (low, high))
    return _shuffle(builder, _splat(builder, first, HALF), _splat(builder, second, HALF), list(range(LANES)))


# Adding a pair of vectors and interleaving the sums, four times, turns 16 rows into the vector of their sums. Each
# level is two shuffles and an addition, and each shuffle one machine instruction.
_LEVELS = (
    ([0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29], 2),
    ([0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29], 2),
    ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27], 4),
    ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27], 4),
)


@_define(types.void, floats, types.intp, floats, types.intp, types.boolean)
def sum_rows(builder: Any, target: Any, to: Any, source: Any, start: Any, keep: Any) -> None:
    """Write to target[to] the sums of HALF rows of HALF numbers, added to what is there if `keep`."""
    places = [builder.add(start, ir.Constant(start.type, row * HALF)) for row in range(HALF)]
    rows = [_load(builder, source, place, HALF) for place in places]
    for lanes, distance in _LEVELS:
        other = [lane + distance for lane in lanes]
        shuffled = [
            (_shuffle(builder, a, b, lanes), _shuffle(builder, a, b, other))
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]
        rows = [_add(builder, a, b) for a, b in shuffled]
    before = _load(builder, target, to, HALF)
    kept = builder.select(keep, before, _constant(0.0, before))
    _store(builder, target, to, _add(builder, rows[0], kept))
