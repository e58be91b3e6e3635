"""Scanner and word table in turn without a visit to Python: a thread that holds no lock needs it back only when a text is done.

    text_loop ──► scan ──► spans ──► encode_spans ──► ids
        ▲                                │
        └──────────── again ─────────────┘        until the text ends, or one of them wants what only Python can give (room, rows, …)

Both were compiled before, by themselves, and are called by their addresses: compiled as parts of this loop, they would be
optimised again with it, once for every pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import cgutils, types

from scratchlm.tokenizer.machine_words import built_in, outer, stamp
from scratchlm.tokenizer.scanner_blocks import borrowed

# Chunks between two visits to Python, at most: some 30 ms.
_SCANS = 64


def entry(compiled: Any, arguments: tuple[Any, ...]) -> int:
    """Address of what Numba made of the function `compiled` for `arguments`, with which it is called once: they should make it do nothing."""
    compiled(*arguments)
    made = compiled.overloads[tuple(map(numba.typeof, arguments))]
    address = int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))
    assert address, f"Numba does not say where {made.fndesc.llvm_func_name} is"
    return address


@built_in
def invoke(typing: Any, address: Any, arguments: Any) -> Any:
    """What the function with this :func:`entry` returns, an int64, for a tuple of arguments: of the types that `entry` was given."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kinds = tuple(signature.args[1])
        kind = context.call_conv.get_function_type(types.int64, kinds)
        function = builder.inttoptr(given[0], kind.as_pointer())
        values = cgutils.unpack_tuple(builder, given[1])
        status, result = context.call_conv.call_function(builder, function, types.int64, kinds, values)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return types.int64(types.int64, arguments), build


def _loop(sources: int) -> Callable[..., Any]:
    def text_loop(
        scan, regions, cursor, pages, leaves, option, edge, longer,
        table, data, tail, spans, rows, ring, pairs, small, heads, bits, scratch, work, tokens, keys, whole, pool, out, marks, state,
        merge_long, first, count,
    ):  # fmt: skip
        """Goes on with ``spans[first:count]``. Returns (first, count) as they are where it stops: (0, 0) when there is no text left to
        scan, or a pre-token that only Python can end; equal after `_SCANS` chunks, so that Ctrl-C is heard."""
        regions, cursor, pages, leaves, edge = (
            borrowed(regions), borrowed(cursor), borrowed(pages), borrowed(leaves), borrowed(edge)
        )  # fmt: skip
        data, tail, spans, rows, ring = (
            borrowed(data), borrowed(tail), borrowed(spans), borrowed(rows), borrowed(ring)
        )  # fmt: skip
        pairs, small, heads, bits, scratch = (
            borrowed(pairs), borrowed(small), borrowed(heads), borrowed(bits), borrowed(scratch)
        )  # fmt: skip
        work, tokens, keys, whole, pool = (
            borrowed(work),
            borrowed(tokens),
            borrowed(keys),
            borrowed(whole),
            borrowed(pool),
        )
        out, marks, state = borrowed(out), borrowed(marks), borrowed(state)
        scans = _SCANS if sources > 0 else 0
        while True:
            if first == count:
                if scans == 0:
                    break
                scans -= 1
                first = 0
                count = invoke(scan, (data, regions, cursor, spans, pages, leaves, option, edge, longer))
                if count == 0:
                    break
            first = invoke(
                table,
                (
                    data, tail, spans, first, count, rows, ring, pairs, small, heads, bits, scratch, work, tokens, keys, whole, pool, out,
                    marks, state, merge_long,
                ),
            )  # fmt: skip
            if first < count:
                break
        return first, count

    return text_loop


text_loop = outer(_loop(stamp("scanner_blocks.py")))
