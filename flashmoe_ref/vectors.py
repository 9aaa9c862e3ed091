"""Eight floats at a time: the few vector operations of `kernels.py`, taught to Numba.

Numba turns simple loops into vector code by itself, but not loops over packed integers.
These operations are LLVM IR on vectors of eight floats, which LLVM maps to what the CPU
has: one AVX register, or two of NEON.

How weights are unpacked: eight weights fill exactly `bits` bytes, and no weight lies in
more than two of them. So one byte shuffle brings to each of eight 32-bit lanes the
bytes that hold its weight, and a mask clears the neighbours in them:

    4 bits    bytes  b0 b1 b2 b3     lanes  b0 b0 b1 b1 b2 b2 b3 b3
                                     mask   0f f0 0f f0 0f f0 0f f0

A weight is then still too large by a power of two, 1 to 128, that depends on its
position alone. Shifting it down would cost an instruction for every eight weights of
every row; dividing x by the same powers of two costs it once, and is exact
(`position_scale`). What is left is shuffle, mask, convert, multiply-add.

Follows no paper. **But:** no integer dot products, which would need x in 8 bits.
*Taught in notebooks/05.*
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from .compiled import compiled

f32, i32, u32 = np.float32, np.int32, np.uint32

CHUNK = 32  # weights that `dot32` takes: whole words, whatever the width

_I8, _I32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_FLOAT8, _INT8 = ir.VectorType(_FLOAT, 8), ir.VectorType(_I32, 8)


def position_scale(position: int, bits: int) -> float:
    """What x at this position of its eight is multiplied by: 1 to 1/128."""
    return 2.0 ** -(position * bits % 8)


class _Float8(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float8")


float8 = _Float8()


@register_model(_Float8)
class _Float8Model(models.PrimitiveModel):
    def __init__(self, manager: object, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _FLOAT8)


# Numba's type checker calls an intrinsic with the types of its arguments; the answer is
# a signature, and a function that writes the LLVM IR.


@intrinsic
def float_of_bits(_typing, bits):
    """The float32 whose bits an uint32 holds."""

    def write_ir(_context, builder, _signature, args):
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), write_ir


@intrinsic
def float_of_half(_typing, bits):
    """The float32 of the float16 whose bits an int16 holds."""

    def write_ir(_context, builder, _signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _FLOAT)

    return types.float32(types.int16), write_ir


@intrinsic
def zero8(_typing):
    """Eight zeros."""

    def write_ir(_context, _builder, _signature, _args):
        return ir.Constant(_FLOAT8, [0.0] * 8)

    return float8(), write_ir


@intrinsic
def load8(_typing, array, first):
    """Eight floats of an array from index first: float32, or bits of a 16-bit float.

    uint16 holds bfloat16 and int16 float16. NOTE: bounds are not checked.
    """

    def write_ir(context, builder, signature, args):
        array_type = signature.args[0]
        at = _pointer(context, builder, array_type, *args)
        name = array_type.dtype.name
        if name == "float32":
            return builder.load(_eight_floats(builder, at, 0), align=4)
        element = {"uint16": ir.IntType(16), "int16": ir.HalfType()}[name]
        vector = ir.VectorType(element, 8)
        raw = builder.load(builder.bitcast(at, vector.as_pointer()), align=2)
        if name == "int16":
            return builder.fpext(raw, _FLOAT8)
        # bfloat16 is the upper half of a float32
        upper = builder.shl(builder.zext(raw, _INT8), ir.Constant(_INT8, [16] * 8))
        return builder.bitcast(upper, _FLOAT8)

    return float8(array, types.intp), write_ir


@intrinsic
def add8(_typing, a, b):
    """a + b, for each of eight lanes."""

    def write_ir(_context, builder, _signature, args):
        return builder.fadd(*args)

    return float8(float8, float8), write_ir


@intrinsic
def multiply_add8(_typing, a, b, c):
    """a * b + c, for each of eight lanes."""

    def write_ir(_context, builder, _signature, args):
        return _multiply_add(builder, *args)

    return float8(float8, float8, float8), write_ir


@intrinsic
def splat8(_typing, number):
    """The same number in eight lanes."""

    def write_ir(_context, builder, _signature, args):
        return _splat(builder, args[0])

    return float8(types.float32), write_ir


@intrinsic
def sum8(_typing, vector):
    """The sum of eight lanes: 4 + 4, 2 + 2, 1 + 1."""

    def write_ir(_context, builder, _signature, args):
        (left,) = args
        for width in (4, 2, 1):
            halves = [_lanes(range(width)), _lanes(range(width, 2 * width))]
            low, high = (builder.shuffle_vector(left, left, half) for half in halves)
            left = builder.fadd(low, high)
        return builder.extract_element(left, _I32(0))

    return types.float32(float8), write_ir


@intrinsic
def store8(_typing, array, first, vector):
    """array[first : first + 8] = vector, float32. NOTE: bounds are not checked."""

    def write_ir(context, builder, signature, args):
        array, first, vector = args
        at = _pointer(context, builder, signature.args[0], array, first)
        builder.store(vector, _eight_floats(builder, at, 0), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), write_ir


@intrinsic
def store_sums4(_typing, out, at, a, b, c, d):
    """out[at : at + 4] = the sums of the lanes of four vectors.

    Neighbours are added until one is left: four sums cost little more than one by
    `sum8`. NOTE: bounds are not checked.
    """

    def write_ir(context, builder, signature, args):
        out, at, *vectors = args
        ab = _add_neighbours(builder, *vectors[:2])
        cd = _add_neighbours(builder, *vectors[2:])
        halves = _add_neighbours(builder, ab, cd)  # sums of lanes 0-3, then of 4-7
        low, high = (
            builder.shuffle_vector(halves, halves, _lanes(range(first, first + 4)))
            for first in (0, 4)
        )
        place = _pointer(context, builder, signature.args[0], out, at)
        four = ir.VectorType(_FLOAT, 4).as_pointer()
        builder.store(builder.fadd(low, high), builder.bitcast(place, four), align=4)
        return context.get_dummy_value()

    return types.void(out, types.intp, a, b, c, d), write_ir


@intrinsic
def prefetch(_typing, array, byte):
    """Ask for the cache line at a byte of an array, or past its end: it never fails."""

    def write_ir(context, builder, signature, args):
        data = _pointer(context, builder, signature.args[0], args[0], _I32(0))
        pointer = _I8.as_pointer()
        at = builder.gep(builder.bitcast(data, pointer), [args[1]])
        flags = [_I32(0), _I32(3), _I32(1)]  # to read, keep in all caches, data
        function_type = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], function_type
        )
        builder.call(function, [at, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), write_ir


@intrinsic(prefer_literal=True)
def dot32(_typing, bits, packed, first_byte, x, first, total):
    """total + the products of 32 packed weights and 32 floats, summed into 8 lanes.

    Shapes: packed (n,) uint8; x (m,) float32, multiplied by `position_scale`; bits is
    a constant. NOTE: bounds are not checked.
    """
    width = bits.literal_value

    def write_ir(context, builder, signature, args):
        _, packed, first_byte, x, first, total = args
        _, packed_type, _, x_type, _, _ = signature.args
        source = _load_packed(context, builder, packed_type, packed, first_byte, width)
        at = _pointer(context, builder, x_type, x, first)
        for eight in range(4):
            q = builder.sitofp(_unpack_eight(builder, source, eight, width), _FLOAT8)
            values = builder.load(_eight_floats(builder, at, eight), align=4)
            total = _multiply_add(builder, q, values, total)
        return total

    integer = types.intp
    return float8(bits, packed, integer, x, integer, float8), write_ir


@intrinsic(prefer_literal=True)
def decode32(_typing, bits, packed, first_byte, scale, bias, out, first):
    """Write 32 weights q * scale + bias, each operation rounded, to out[first:].

    Shapes: packed (n,) uint8, out (m,) float32. NOTE: bounds are not checked.
    """
    width = bits.literal_value

    def write_ir(context, builder, signature, args):
        _, packed, first_byte, scale, bias, out, first = args
        _, packed_type, _, _, _, out_type, _ = signature.args
        source = _load_packed(context, builder, packed_type, packed, first_byte, width)
        at = _pointer(context, builder, out_type, out, first)
        scales, biases = _splat(builder, scale), _splat(builder, bias)
        shifts = ir.Constant(_INT8, [i * width % 8 for i in range(8)])
        for eight in range(4):
            q = builder.lshr(_unpack_eight(builder, source, eight, width), shifts)
            product = builder.fmul(builder.sitofp(q, _FLOAT8), scales)
            place = _eight_floats(builder, at, eight)
            builder.store(builder.fadd(product, biases), place, align=4)
        return context.get_dummy_value()

    integer, number = types.intp, types.float32
    return types.void(bits, packed, integer, number, number, out, integer), write_ir


# ---- functions that loops over them can be vectors of --------------------------------


@compiled
def exp(x):
    """e^x to about one rounding, as plain arithmetic: loops over it become vectors.

    x = n ln 2 + r with |r| <= ln 2 / 2: e^r by its series, whose next term is below
    6e-9, and 2^n by writing n into the exponent of a float.
    """
    x = f32(-87) if x < f32(-87) else (f32(88) if x > f32(88) else x)
    n = np.floor(x * f32(1.442695041) + f32(0.5))
    # ln 2 in two parts, the first of few bits, so that n times it is exact
    r = (x - n * f32(0.693359375)) - n * f32(-2.12194440e-4)
    series = f32(1 / 5040)
    series = series * r + f32(1 / 720)
    series = series * r + f32(1 / 120)
    series = series * r + f32(1 / 24)
    series = series * r + f32(1 / 6)
    series = series * r + f32(1 / 2)
    series = series * r + f32(1)
    series = series * r + f32(1)
    return series * float_of_bits(u32((i32(n) + i32(127)) << i32(23)))


@compiled
def silu(x):
    """x * sigmoid(x)."""
    return x / (f32(1) + exp(-x))


# ---- pieces of IR --------------------------------------------------------------------


def _unpack_eight(builder, packed, eight, bits):
    """Eight integer lanes, each a weight << (position * bits % 8)."""
    n_bytes = packed.type.count
    zeros = ir.Constant(packed.type, [0] * n_bytes)
    source, masks = [], []
    for position in range(8):
        byte, shift = divmod((8 * eight + position) * bits, 8)
        second = (
            byte + 1 if shift + bits > 8 else n_bytes
        )  # n_bytes: the first of zeros
        source += [byte, second, n_bytes, n_bytes]
        masks.append(((1 << bits) - 1) << shift)
    lanes = builder.shuffle_vector(packed, zeros, _lanes(source))
    return builder.and_(builder.bitcast(lanes, _INT8), ir.Constant(_INT8, masks))


def _load_packed(context, builder, array_type, array, first_byte, bits):
    """The bytes of 32 weights, whatever the integers that the array is viewed as."""
    data = _pointer(context, builder, array_type, array, _I32(0))
    at = builder.gep(builder.bitcast(data, _I8.as_pointer()), [first_byte])
    vector = ir.VectorType(_I8, CHUNK * bits // 8)
    return builder.load(builder.bitcast(at, vector.as_pointer()), align=1)


def _eight_floats(builder, at, eight):
    place = builder.gep(at, [_I32(8 * eight)])
    return builder.bitcast(place, _FLOAT8.as_pointer())


def _add_neighbours(builder, a, b):
    """a0+a1, a2+a3, b0+b1, b2+b3, and so on for the upper halves, as AVX adds."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    pairs = (builder.shuffle_vector(a, b, _lanes(indices)) for indices in (even, odd))
    return builder.fadd(*pairs)


def _splat(builder, number):
    one = builder.insert_element(ir.Constant(_FLOAT8, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(one, one, _lanes([0] * 8))


def _multiply_add(builder, a, b, c):
    """a * b + c: one instruction, rounded once, wherever the CPU has it."""
    function_type = ir.FunctionType(_FLOAT8, [_FLOAT8] * 3)
    name = "llvm.fmuladd.v8f32"
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, [a, b, c])


def _lanes(indices):
    indices = list(indices)
    return ir.Constant(ir.VectorType(_I32, len(indices)), indices)


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])
