"""tanh and its derivative for `cpu_simd` vectors, without calls or branches.

With y = -2 log2(e) |x| = n + r, n an integer and |r| <= 1/2, and 2^r = (E + r) / (E - r), where E is even in r,

    tanh |x| = (1 - 2^y) / (1 + 2^y) = ((1 - 2^n) E - (1 + 2^n) r) / D       D = 2^n (E + r) + E - r
    1 - tanh^2 x = 4 * 2^n (E + r) (E - r) / D^2

Near 0, n is 0 and the first is -r / E, exact; in saturation the second keeps its relative accuracy, which 1 - tanh^2
would lose. Both are good to about 3e-7, the second up to |x| ulp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from e88.ops.cpu_simd import _INT, _add, _constant, _define, _mul, _sub, vector

# What x is multiplied by before `tanh`: callers fold it into numbers that are the same for many x.
SCALE = np.float32(2 / np.log(2))
# E = r / tanh(r / SCALE) as a polynomial in r^2, to 2e-9. Its constant term is SCALE, so that tanh has slope 1 at 0.
_E = (float(SCALE), 0.11552425, -0.0009214)
# 1.5 * 2^23 + 127: adding it rounds to an integer, and the low bits become a float's exponent field.
_MAGIC = 12582912.0 + 127.0


def _parts(builder: Any, scaled: Any) -> tuple[Any, ...]:
    def constant(value: float) -> Any:
        return _constant(value, scaled)

    kind, integer = scaled.type, ir.VectorType(_INT, scaled.type.count)
    bits, sign_bit = builder.bitcast(scaled, integer), _constant(-0x80000000, scaled, _INT)
    y = builder.bitcast(builder.or_(bits, sign_bit), kind)
    # In this order NaN passes through. 2^-127 comes out as zero.
    y = builder.select(builder.fcmp_ordered("<", y, constant(-127.0)), constant(-127.0), y)
    shifted = builder.fadd(y, constant(_MAGIC))
    r = _sub(builder, y, builder.fsub(shifted, constant(_MAGIC)))
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, integer), _constant(23, scaled, _INT)), kind)

    square = _mul(builder, r, r)
    E = _add(builder, _mul(builder, square, constant(_E[2])), constant(_E[1]))
    E = _add(builder, _mul(builder, square, E), constant(_E[0]))
    less = _mul(builder, _sub(builder, constant(1.0), power), E)
    numerator = _sub(builder, less, _mul(builder, _add(builder, constant(1.0), power), r))
    above = _mul(builder, power, _add(builder, E, r))
    below = _sub(builder, E, r)
    return builder.and_(bits, sign_bit), numerator, _add(builder, above, below), above, below


def _signed(builder: Any, magnitude: Any, sign: Any) -> Any:
    return builder.bitcast(builder.or_(builder.bitcast(magnitude, sign.type), sign), magnitude.type)


@_define(vector, vector)
def tanh(builder: Any, scaled: Any) -> Any:
    """tanh(x) from x * SCALE."""
    sign, numerator, denominator, _, _ = _parts(builder, scaled)
    return _signed(builder, builder.fdiv(numerator, denominator), sign)


@_define(types.UniTuple(vector, 2), vector)
def tanh_and_slope(builder: Any, scaled: Any) -> Any:
    """tanh(x) and 1 - tanh(x)^2 from x * SCALE."""
    sign, numerator, denominator, above, below = _parts(builder, scaled)
    inverse = builder.fdiv(_constant(1.0, scaled), denominator)
    twice = _add(builder, inverse, inverse)
    slope = _mul(builder, _mul(builder, above, below), _mul(builder, twice, twice))
    return _signed(builder, _mul(builder, numerator, inverse), sign), slope
