"""Vectors of float32 for numba: a type that LLVM maps onto whatever SIMD registers the machine has.

Numba leaves vectorisation to a heuristic that fails on short loops with several sums. Here a vector is a value of
its own, so that a kernel's sums stay in registers. LLVM splits a vector wider than a register, on any target.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

# Lanes of a vector: two blocks of state columns, which may belong to two heads.
HALF = 16
LANES = 2 * HALF

# Numba's own annotation has the signature of the typing function, not that of the call.
intrinsic: Any = extending.intrinsic

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_WIDE = ir.VectorType(_FLOAT, LANES)
_NARROW = ir.VectorType(_FLOAT, HALF)
# Fused multiply-add and reciprocals are welcome. Reordering is not: tanh near 0 depends on the order.
_FLAGS = ("contract", "arcp", "nsz")


class Vector(types.Type):
    """A value of LANES float32."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        super().__init__(manager, fe_type, _WIDE)


def _operator(function: Any, instruction: str) -> None:
    @infer_global(function)
    class _Typing(ConcreteTemplate):
        cases = [signature(vector, vector, vector)]

    @lower_builtin(function, vector, vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args, flags=_FLAGS)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _constant(value: float | int, element: Any = _FLOAT) -> Any:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _pointer(context: Any, builder: Any, kind: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """The LANES numbers of a 1-D array from `index` on."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, _WIDE, sig.args[0], *args), align=4)

    return vector(array, types.intp), lower


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector to a 1-D array from `index` on."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, _WIDE, sig.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), lower


@intrinsic
def pair(typing: Any, array: Any, low: Any, high: Any) -> Any:
    """A vector whose lower half repeats array[low] and whose upper half repeats array[high]."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers = (_pointer(context, builder, _FLOAT, sig.args[0], args[0], i) for i in args[1:])
        low, high = (_splat(builder, builder.load(pointer, align=4), HALF) for pointer in pointers)
        return _shuffle(builder, low, high, list(range(LANES)))

    return vector(array, types.intp, types.intp), lower


@intrinsic
def copy_half(typing: Any, target: Any, to: Any, source: Any, start: Any) -> Any:
    """Copy HALF numbers from one 1-D array to another."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, _NARROW, sig.args[2], *args[2:]), align=4)
        builder.store(value, _pointer(context, builder, _NARROW, sig.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), lower


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A vector that repeats one float32."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0], LANES)

    return vector(types.float32), lower


@intrinsic
def _scaled_magnitude(typing: Any, x: Any) -> Any:
    """max(-2 log2(e) |x|, -127), with NaN kept."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.VectorType(_INT, LANES))
        magnitude = builder.bitcast(builder.and_(bits, _constant(0x7FFFFFFF, _INT)), _WIDE)
        scaled = builder.fmul(magnitude, _constant(float(np.float32(-2 / np.log(2)))))
        low = _constant(-127.0)
        return builder.select(builder.fcmp_ordered("<", scaled, low), low, scaled)

    return vector(vector), lower


@intrinsic
def _round(typing: Any, x: Any) -> Any:
    """x plus a constant that leaves the nearest integer, plus 127, in the low bits."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fadd(args[0], _constant(_MAGIC))

    return vector(vector), lower


@intrinsic
def _unround(typing: Any, x: Any) -> Any:
    """The integer that `_round` left, as a float."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fsub(args[0], _constant(_MAGIC))

    return vector(vector), lower


@intrinsic
def _power_of_two(typing: Any, x: Any) -> Any:
    """2 to the integer that `_round` left."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.VectorType(_INT, LANES))
        return builder.bitcast(builder.shl(bits, _constant(23, _INT)), _WIDE)

    return vector(vector), lower


@intrinsic
def _copy_sign(typing: Any, magnitude: Any, sign: Any) -> Any:
    """A magnitude that is not negative, with the sign of another number."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        magnitude, sign = (builder.bitcast(x, ir.VectorType(_INT, LANES)) for x in args)
        sign = builder.and_(sign, _constant(-0x80000000, _INT))
        return builder.bitcast(builder.or_(magnitude, sign), _WIDE)

    return vector(vector, vector), lower


# 1.5 * 2^23 + 127: adding it rounds to an integer, and the low bits become a float's exponent field.
_MAGIC = 12582912.0 + 127.0
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
# (2^r - 1) / r for |r| <= 1/2 to 1e-8 relative, fitted by iteratively reweighted least squares.
_P0, _P1, _P2, _P3, _P4, _P5 = (
    np.float32(c)
    for c in (0.69314718822, 0.24022649823, 0.055503574337, 0.0096182374938, 0.0013390735567, 0.00015403512634)
)


@njit
def tanh(x: Any) -> Any:
    """tanh(x) and its derivative 1 - tanh(x)^2, each to a few 1e-7 relative, wherever they are not subnormal.

    With a = exp(-2|x|) = 2^n (1 + p), |tanh| = (1 - a) / (1 + a) and the derivative is 4a / (1 + a)^2. The first is
    exact near 0 through p; the second stays accurate in saturation, where 1 - tanh^2 would cancel.
    """
    y = _scaled_magnitude(x)
    shifted = _round(y)
    r = y - _unround(shifted)
    scale = _power_of_two(shifted)
    p = splat(_P4) + r * splat(_P5)
    p = splat(_P3) + r * p
    p = splat(_P2) + r * p
    p = splat(_P1) + r * p
    p = splat(_P0) + r * p
    p = r * p
    numerator = (splat(_ONE) - scale) - scale * p
    a = scale + scale * p
    inverse = splat(_ONE) / (splat(_ONE) + a)
    twice = inverse + inverse
    return _copy_sign(numerator * inverse, x), (a * twice) * twice


# Adding a pair of vectors and interleaving the sums, four times, turns 16 rows into the vector of their sums. Each
# level is two shuffles and an addition, and each shuffle one machine instruction.
_LEVELS = (
    ([0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29], 2),
    ([0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29], 2),
    ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27], 4),
    ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27], 4),
)


def _row_sums(builder: Any, rows: list[Any]) -> Any:
    for lanes, distance in _LEVELS:
        other = [lane + distance for lane in lanes]
        rows = [
            builder.fadd(_shuffle(builder, a, b, lanes), _shuffle(builder, a, b, other), flags=_FLAGS)
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]
    return rows[0]


def _make_row_sums(low: bool, high: bool) -> Any:
    @intrinsic
    def row_sums(typing: Any, target: Any, to: Any, source: Any, start: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            rows = []
            for row in range(HALF):
                at = builder.add(args[3], ir.Constant(args[3].type, row * LANES))
                value = builder.load(_pointer(context, builder, _WIDE, sig.args[2], args[2], at), align=4)
                low_half = _shuffle(builder, value, value, list(range(HALF)))
                high_half = _shuffle(builder, value, value, list(range(HALF, LANES)))
                both = builder.fadd(low_half, high_half, flags=_FLAGS)
                rows.append(both if low and high else low_half if low else high_half)
            pointer = _pointer(context, builder, _NARROW, sig.args[0], *args[:2])
            sums = builder.fadd(_row_sums(builder, rows), builder.load(pointer, align=4), flags=_FLAGS)
            builder.store(sums, pointer, align=4)
            return context.get_dummy_value()

        return types.void(target, types.intp, source, types.intp), lower

    return row_sums


# Add to target[to : to + HALF] the sums of HALF rows of `source`, over one half of the lanes or over all.
add_low_sums = _make_row_sums(True, False)
add_high_sums = _make_row_sums(False, True)
add_sums = _make_row_sums(True, True)
