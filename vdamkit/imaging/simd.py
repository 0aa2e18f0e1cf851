"""Short vectors in functions compiled by Numba: 64 bytes of an array that are read, multiplied, added and written at once.

LLVM finds vector instructions for long loops by itself, but makes three times as many as are needed of loops over the 10 to 40
numbers of a column. Here a kernel says what it means::

    total = fused(load(a, j), y, scaled(load(a, i), x))  # of float32: a[i:i + 16] * x + a[j:j + 16] * y
    store(out, k, total)

Places count the numbers of an array flattened, which must be contiguous; nothing checks them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

BYTES = 64  # of a vector: one instruction with AVX-512, two with AVX2, four with NEON
FAST = ("fast",)  # sums may be taken in any order, as everywhere in what is compiled here


class Vector(types.Type):
    """So many numbers of one kind as a register holds."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector):
        element = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, BYTES * 8 // kind.dtype.bitwidth))


def _pointer(context: Any, builder: Any, kind: types.Array, array: Any, at: Any, vector: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _splat(builder: Any, kind: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), kind.count), 0)
    )


@intrinsic
def load(typing, array, at):
    """The numbers of `array` from place `at`."""

    def generate(context, builder, sig, args):
        kind = context.get_value_type(sig.return_type)
        return builder.load(_pointer(context, builder, sig.args[0], *args, kind), align=sig.return_type.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def store(typing, array, at, vector):
    """Write a vector to `array` from place `at`."""

    def generate(context, builder, sig, args):
        to = _pointer(context, builder, sig.args[0], *args[:2], args[2].type)
        builder.store(args[2], to, align=sig.args[2].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def zeros(typing, array):
    """A vector of zeros, of the kind that `array` holds."""

    def generate(context, builder, sig, args):
        return ir.Constant(context.get_value_type(sig.return_type), None)

    return Vector(array.dtype)(array), generate


@intrinsic
def scaled(typing, vector, factor):
    """``vector * factor``, which is a number or another vector."""

    def generate(context, builder, sig, args):
        return _product(builder, sig, args)

    return vector(vector, _factor(vector, factor)), generate


@intrinsic
def fused(typing, vector, factor, total):
    """``total + vector * factor``, which is a number or another vector."""

    def generate(context, builder, sig, args):
        return builder.fadd(args[2], _product(builder, sig, args), flags=FAST)

    return vector(vector, _factor(vector, factor), vector), generate


def _factor(vector: Vector, factor: Any) -> Any:
    return factor if isinstance(factor, Vector) else vector.dtype


def _product(builder: Any, sig: Any, args: Any) -> Any:
    vector, factor = args[:2]
    return builder.fmul(vector, factor if isinstance(sig.args[1], Vector) else _splat(builder, vector.type, factor), flags=FAST)


@intrinsic
def swapped(typing, vector):
    """Neighbours exchanged: real for imaginary parts."""

    def generate(context, builder, sig, args):
        order = ir.Constant(ir.VectorType(ir.IntType(32), args[0].type.count), [i ^ 1 for i in range(args[0].type.count)])
        return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), order)

    return vector(vector), generate


@intrinsic
def summed(typing, vector):
    """The sum of a vector's numbers."""

    def generate(context, builder, sig, args):
        kind = args[0].type
        name = f"llvm.vector.reduce.fadd.v{kind.count}f{sig.return_type.bitwidth}"
        add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind.element, [kind.element, kind]), name)
        return builder.call(add, [ir.Constant(kind.element, 0.0), args[0]], fastmath=FAST)

    return vector.dtype(vector), generate
