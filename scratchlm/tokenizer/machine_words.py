"""Eight bytes at a time: unaligned loads and stores, prefetch, bit counts — what Numba's own array access cannot say.

    byte  0 1 2 3 4 5 6 7 8 9 …
          ␣ t o k e n s ␣ a r e              load64(text, 1)  ──►  "tokens ␣a" as one little-endian integer
            └─────8─────┘

Offsets count bytes from the beginning of the array, whatever its type, and are not checked: each caller has to know that
the eight bytes are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from scratchlm.tokenizer.compiling import given_room

_BYTE, _LONG, _INT = ir.IntType(8), ir.IntType(64), ir.IntType(32)

U = np.uint64


built_in: Any = intrinsic  # for type checkers, who know nothing of the typing context that Numba fills in


# Functions that are never called from Python need nothing for it.
_PART: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled as a part of whatever calls it (a call that hands over arrays would count references, which is slow)."""
    return numba.njit(forceinline=True, **_PART)(function)


def part(function: Callable[..., Any]) -> Any:
    """Called by compiled functions, and inlined only where LLVM thinks it pays: every copy costs compile time."""
    return numba.njit(**_PART)(function)


def outer(function: Callable[..., Any], nogil: bool = True) -> Any:
    """Called from Python: without the interpreter's lock (`nogil`), and kept on disk where a folder for it can be written."""
    try:
        return given_room(numba.njit(cache=True, nogil=nogil)(function))
    except RuntimeError:  # no folder to keep it in can be written
        return given_room(numba.njit(nogil=nogil)(function))


def stamp(*files: str) -> int:
    """A number that changes when any of `files` (of this folder) does.

    Numba's cache looks at the file of the outer function alone. One that calls inner functions of other files keeps
    this number in its closure, which is part of the cache's key.
    """
    digest = hashlib.blake2b(digest_size=7)
    for name in (Path(__file__).name, *files):
        digest.update((Path(__file__).parent / name).read_bytes())
    return int.from_bytes(digest.digest(), "little")


def _address(context, builder, array_type, array, offset):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(data, _BYTE.as_pointer()), [offset], source_etype=_BYTE)


@built_in
def load64(typing, array, offset):
    """The 8 bytes at byte `offset` of `array` as uint64."""

    def build(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load(builder.bitcast(address, _LONG.as_pointer()), align=1)

    return types.uint64(array, types.int64), build


@built_in
def store64(typing, array, offset, value):
    """Write uint64 `value` to the 8 bytes at byte `offset` of `array`."""

    def build(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        builder.store(arguments[2], builder.bitcast(address, _LONG.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), build


@built_in
def peek64(typing, address):
    """The 8 bytes at `address` (int64) of this process, as uint64."""

    def build(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], _LONG.as_pointer()))

    return types.uint64(types.int64), build


@built_in
def peek32(typing, address):
    """The 4 bytes at `address` (int64) of this process, as uint32."""

    def build(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], _INT.as_pointer()))

    return types.uint32(types.int64), build


@built_in
def fold(typing, one, other):
    """The two halves of the 128-bit product of two uint64, one over the other by XOR: a hash in two instructions."""

    def build(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        upper = builder.trunc(builder.lshr(product, wide(64)), _LONG)
        return builder.xor(builder.trunc(product, _LONG), upper)

    return types.uint64(types.uint64, types.uint64), build


@built_in
def prefetch(typing, array, offset):
    """Ask for the cache line that holds byte `offset` of `array`."""

    def build(context, builder, signature, arguments):
        _ask_for(builder, _address(context, builder, signature.args[0], arguments[0], arguments[1]))
        return context.get_dummy_value()

    return types.void(array, types.int64), build


@built_in
def ask_for(typing, address):
    """Ask for the cache line at `address` (uint64) of this process."""

    def build(context, builder, signature, arguments):
        _ask_for(builder, builder.inttoptr(arguments[0], _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64), build


def _ask_for(builder, address):
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE.as_pointer()], kind)
    builder.call(function, [address, _INT(0), _INT(3), _INT(1)])


class _Sixteen(types.Type):
    """16 uint32 in one vector register."""

    def __init__(self) -> None:
        super().__init__("uint32x16")


_SIXTEEN, _VECTOR = _Sixteen(), ir.VectorType(_INT, 16)


@register_model(_Sixteen)
class _SixteenModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


@built_in
def load16(typing, array, offset):
    """The 16 uint32 at byte `offset` of `array` as one vector."""

    def build(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=1)

    return _SIXTEEN(array, types.int64), build


@built_in
def put(typing, vector, lane, value):
    """`vector` with uint32 `value` in its `lane`; as it is if there is none of this number."""

    def build(context, builder, signature, arguments):
        undefined, zeros = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_VECTOR, [0] * 16)

        def every(number):
            return builder.shuffle_vector(builder.insert_element(undefined, number, _INT(0)), undefined, zeros)

        lanes = ir.Constant(_VECTOR, list(range(16)))
        here = builder.icmp_unsigned("==", lanes, every(builder.trunc(arguments[1], _INT)))
        return builder.select(here, every(arguments[2]), arguments[0])

    return _SIXTEEN(vector, types.int64, types.uint32), build


@built_in
def least(typing, vector):
    """The smallest of 16 uint32."""

    def build(context, builder, signature, arguments):
        return _least(builder, arguments[0])

    return types.uint32(vector), build


def _least(builder, vector):
    kind = vector.type
    name = f"llvm.vector.reduce.umin.v{kind.count}i{kind.element.width}"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(kind.element, [kind]), name
    )
    return builder.call(function, [vector])


@built_in
def least16(typing, array, offset):
    """The smallest of the 16 uint32 at byte `offset` of `array`, in a few vector instructions."""

    def build(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        return _least(builder, builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=1))

    return types.uint32(array, types.int64), build


@built_in
def places_of(typing, array, offset, byte):
    """Which of the 64 bytes at byte `offset` of `array` are `byte`: bit i of a uint64 tells of the i-th."""

    def build(context, builder, signature, arguments):
        vector = ir.VectorType(_BYTE, 64)
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        block = builder.load(builder.bitcast(address, vector.as_pointer()), align=1)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.trunc(arguments[2], _BYTE), _INT(0))
        every = builder.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_INT, 64), [0] * 64)
        )
        return builder.bitcast(builder.icmp_unsigned("==", block, every), _LONG)

    return types.uint64(array, types.int64, types.int64), build


@built_in
def lowest_bit(typing, value):
    """Place of the lowest 1 of a uint64 that is not 0."""

    def build(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), build


@built_in
def highest_bit(typing, value):
    """Place of the highest 1 of a uint64 that is not 0."""

    def build(context, builder, signature, arguments):
        return builder.sub(_LONG(63), builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1)))

    return types.int64(types.uint64), build
