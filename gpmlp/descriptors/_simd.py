"""Four numbers in one register (lanes) as values of numba's code, and products of small matrices with them.

LLVM compiles loops over short arrays one by one, or by vectors with as much work before and after as in between. Here a variable holds
four numbers, `load` and `store` move them, + - * act on each, and what is not stored stays in registers. On processors with wider or
narrower registers the compiler does the same with those.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic, models, overload, register_model

# sums may be reordered and products fused; NaN and infinity mean what they mean
FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
LANES = 4


class LaneType(types.Type):
    """The type of LANES numbers of a floating type."""

    def __init__(self, of: types.Float) -> None:
        super().__init__(f"lanes({of})")
        self.of = of


@register_model(LaneType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.of).get_value_type(), LANES))


def _address(context, builder, kind, array, at):
    """Of LANES numbers of a contiguous array, as a pointer to a vector."""
    data = context.make_array(kind)(context, builder, array).data
    lanes = ir.VectorType(context.get_data_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [at]), lanes.as_pointer())


@intrinsic
def load(typing, array, at):
    """The numbers of a flat array from `at` on."""

    def make(context, builder, signature, given):
        kind = signature.args[0]
        return builder.load(_address(context, builder, kind, *given), align=kind.dtype.bitwidth // 8)

    return LaneType(array.dtype)(array, types.intp), make


@intrinsic
def store(typing, array, at, lanes):
    """Put numbers into a flat array from `at` on."""

    def make(context, builder, signature, given):
        kind = signature.args[0]
        builder.store(given[2], _address(context, builder, kind, *given[:2]), align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), make


@intrinsic
def load_all(typing, array, at):
    """The number of a flat array at `at`, in all lanes; no place is counted from the end."""

    def make(context, builder, signature, given):
        data = context.make_array(signature.args[0])(context, builder, given[0]).data
        return _in_all(builder, builder.load(builder.gep(data, [given[1]])))

    return LaneType(array.dtype)(array, types.intp), make


@intrinsic
def fill(typing, number):
    """The same number in all lanes."""

    def make(context, builder, signature, given):
        return _in_all(builder, given[0])

    return LaneType(number)(number), make


def _in_all(builder, number):
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _elementwise(name):
    @intrinsic
    def act(typing, a, b):
        def make(context, builder, signature, given):
            return getattr(builder, name)(*given, flags=("contract", "reassoc", "nsz"))

        return a(a, b), make

    return act


_plus, _minus, _times = (_elementwise(name) for name in ("fadd", "fsub", "fmul"))


@overload(operator.add)
def _(a, b):
    return (lambda a, b: _plus(a, b)) if isinstance(a, LaneType) else None


@overload(operator.sub)
def _(a, b):
    return (lambda a, b: _minus(a, b)) if isinstance(a, LaneType) else None


@overload(operator.mul)
def _(a, b):
    return (lambda a, b: _times(a, b)) if isinstance(a, LaneType) else None


def _shuffled(places):
    @intrinsic
    def shuffle(typing, a, b):
        def make(context, builder, signature, given):
            return builder.shuffle_vector(*given, ir.Constant(ir.VectorType(ir.IntType(32), LANES), places))

        return a(a, b), make

    return shuffle


_low, _high = _shuffled([0, 4, 2, 6]), _shuffled([1, 5, 3, 7])
_first, _second = _shuffled([0, 1, 4, 5]), _shuffled([2, 3, 6, 7])


@njit(forceinline=True, **FLAGS)
def transpose_lanes(a, b, c, d):
    """Four lanes as the rows of a matrix -> its columns."""
    e, f, g, h = _low(a, b), _high(a, b), _low(c, d), _high(c, d)
    return _first(e, g), _first(f, h), _second(e, g), _second(f, h)


@njit(**FLAGS)
def round_up(count):
    """The next multiple of LANES."""
    return (count + LANES - 1) // LANES * LANES


@njit(forceinline=True, **FLAGS)
def multiply_matrices(rows, columns, depth, a, a_at, a_row, a_deep, b, b_at, b_deep, c, c_at, c_row):
    """c[row, column] = Σ_k a[row, k] b[k, column], of `columns` a multiple of LANES, in flat arrays with these beginnings and steps.

    Four rows at a time; where fewer are left the last one is computed again, which stores the same number twice.
    """
    last = rows - 1
    for row in range(0, rows, 4):
        second, third, fourth = min(row + 1, last), min(row + 2, last), min(row + 3, last)
        of_a = a_at + row * a_row, a_at + second * a_row, a_at + third * a_row, a_at + fourth * a_row
        of_c = c_at + row * c_row, c_at + second * c_row, c_at + third * c_row, c_at + fourth * c_row
        for column in range(0, columns - LANES, 2 * LANES):
            _two(depth, a, of_a, a_deep, b, b_at + column, b_deep, c, of_c, column)
        if columns // LANES % 2:
            _one(depth, a, of_a, a_deep, b, b_at + columns - LANES, b_deep, c, of_c, columns - LANES)


@njit(forceinline=True, **FLAGS)
def _two(depth, a, of_a, a_deep, b, b_at, b_deep, c, of_c, column):
    """Four rows, the 2 LANES columns from `column` on."""
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = fill(a.dtype.type(0))
    for k in range(depth):
        x, y, at = load(b, b_at + k * b_deep), load(b, b_at + k * b_deep + LANES), k * a_deep
        u = load_all(a, of_a[0] + at)
        s0, t0 = s0 + u * x, t0 + u * y
        u = load_all(a, of_a[1] + at)
        s1, t1 = s1 + u * x, t1 + u * y
        u = load_all(a, of_a[2] + at)
        s2, t2 = s2 + u * x, t2 + u * y
        u = load_all(a, of_a[3] + at)
        s3, t3 = s3 + u * x, t3 + u * y
    _put(c, of_c, column, s0, s1, s2, s3)
    _put(c, of_c, column + LANES, t0, t1, t2, t3)


@njit(forceinline=True, **FLAGS)
def _one(depth, a, of_a, a_deep, b, b_at, b_deep, c, of_c, column):
    """Four rows, the LANES columns from `column` on."""
    s0 = s1 = s2 = s3 = fill(a.dtype.type(0))
    for k in range(depth):
        x, at = load(b, b_at + k * b_deep), k * a_deep
        s0 = s0 + load_all(a, of_a[0] + at) * x
        s1 = s1 + load_all(a, of_a[1] + at) * x
        s2 = s2 + load_all(a, of_a[2] + at) * x
        s3 = s3 + load_all(a, of_a[3] + at) * x
    _put(c, of_c, column, s0, s1, s2, s3)


@njit(forceinline=True, **FLAGS)
def _put(c, of_c, column, s0, s1, s2, s3):
    store(c, of_c[0] + column, s0)
    store(c, of_c[1] + column, s1)
    store(c, of_c[2] + column, s2)
    store(c, of_c[3] + column, s3)
