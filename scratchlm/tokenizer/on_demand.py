"""Compiled code that most texts never need, made when one does: called by its address from code compiled before.

    encode_spans ──► word of more than 64 bytes ──► address 0: stop, and let plain Python do it, for some 30 kB of such words
                                                    else:      call what is there

What is rare in text is often long in code. Compiled as a part of what calls it, it would be compiled, and optimised again with all
around it, before the first word of the first text has been encoded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types

from scratchlm.tokenizer.compiling import compiling, kept, with_room
from scratchlm.tokenizer.machine_words import built_in

_LONG = ir.IntType(64)
# What plain Python may do before: it takes some milliseconds, far less than compiling.
_PATIENCE = 1 << 15


class OnDemand:
    """A function that is compiled when there is enough for it to do.

    Args:
        what: it does, for the line that says what takes so long.
        signature: of integers and pointers to numbers, as for `numba.cfunc`.
        function: to be compiled. As with all that Numba keeps on disk, it is found again by its own file and what it encloses.
    """

    def __init__(self, what: str, signature: Any, function: Callable[..., Any]) -> None:
        self._what = what
        self._signature = signature
        self._function = function
        self._compiled: Any = None
        self._patience = _PATIENCE
        self._lock = threading.Lock()

    def address(self, work: int = 0, at_once: bool = False) -> int:
        """Where the compiled function is; 0 while `work` more bytes are better done in plain Python.

        Args:
            work: bytes that there are to do.
            at_once: compile now.
        """
        if self._compiled is None and (work or at_once):
            with self._lock:
                if self._patience == _PATIENCE and kept(self._function):  # loading takes a few milliseconds
                    at_once = True
                self._patience -= work
                if self._compiled is None and (at_once or self._patience < 0):
                    with compiling(self._what):
                        self._compiled = with_room(self._compile)
        return 0 if self._compiled is None else int(self._compiled.address)

    def _compile(self) -> Any:
        try:
            return numba.cfunc(self._signature, cache=True)(self._function)
        except RuntimeError:  # no folder to keep it in can be written
            return numba.cfunc(self._signature)(self._function)


@built_in
def call(typing: Any, address: Any, arguments: Any) -> Any:
    """What the function at `address` returns, an int64, for a tuple of int64 (numbers, and addresses of arrays)."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(_LONG, [_LONG] * signature.args[1].count)
        function = builder.inttoptr(given[0], kind.as_pointer())
        return builder.call(function, cgutils.unpack_tuple(builder, given[1]))

    return types.int64(types.int64, arguments), build


@built_in
def address_of(typing: Any, array: Any) -> Any:
    """Where the first element of `array` lies, as int64."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, given[0]).data, _LONG)

    return types.int64(array), build
