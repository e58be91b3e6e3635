"""Compile kernels for a GPU that is not there: ``python triton_ahead.py 90 [--all | --loss | --pointwise]`` prints a JSON line per kernel.

Those of attention, small with everything in them or every candidate (``--all``); or, as they are launched, the loss's (``--loss``) or those of SwiGLU
and of the rotation (``--pointwise``).

Triton's interpreter accepts what its compiler may refuse, and knows nothing of registers. A process of its own, because the interpreter,
once chosen, replaces the compiler for the whole process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scratchlm.kernels import cross_entropy_triton as loss
from scratchlm.kernels import flash_attention_triton as forward
from scratchlm.kernels import flash_attention_triton_backward as backward
from scratchlm.kernels import rotary_triton as rotary
from scratchlm.kernels import swiglu_triton as swiglu

KERNELS = {
    "forward": (forward._forward, forward.HALF, forward.FP32),
    "keys": (backward._backward_keys, backward.KEYS_HALF, backward.KEYS_FP32),
    "queries": (backward._backward_queries, backward.QUERIES_HALF, backward.QUERIES_FP32),
}
OF_QUERIES = {"q_at", "k_at", "v_at", "out_at", "d_out_at", "d_q_at", "d_k_at", "d_v_at"}
FP32_POINTERS = {"sums_at", "delta_at"}
OPTIONS = {
    "documents_at": "*i64",
    "first_at": "*i32",
    "last_at": "*i32",
    "present_at": "*u8",
    "slopes_at": "*fp32",
    "sinks_at": "*fp32",
}
SWITCHES = ("WINDOWED", "CAPPED", "ALIBI", "PACKED", "PADDED", "RAGGED", "SUNK")


def compiled(
    kernel: Any, dtype: str, width: int, tile: tuple[int, int, int, int], everything: bool, capability: int
) -> Any:
    rows, columns, warps, stages = tile
    constants: dict[str, Any] = dict.fromkeys(SWITCHES, everything)
    constants |= dict.fromkeys(("HEAD_DIM", "VALUE_DIM", "WIDTH", "VALUE_WIDTH"), width)
    constants |= {
        "GROUP": 1,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "PRECISION": "ieee" if dtype == "*fp32" else "tf32",
    }
    signature, given, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or (name in OPTIONS and not everything):
            signature[name], given[place,] = "constexpr", constants.get(name)
        elif name in OF_QUERIES or name in FP32_POINTERS or name in OPTIONS:
            signature[name] = dtype if name in OF_QUERIES else OPTIONS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in ("scale", "cap") else "i32"
        if signature[name].startswith("*") or name.endswith(("_row", "_head", "_batch")):
            aligned[place,] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    return cubin(kernel, signature, given, aligned, options, capability)


def cubin(
    kernel: Any,
    signature: dict[str, str],
    given: dict[tuple[int], Any],
    aligned: dict[tuple[int], Any],
    options: dict[str, int],
    capability: int,
) -> Any:
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled_loss(dtype: str, capped: bool, vocab: int, capability: int) -> Any:
    """The loss's kernel as a vocabulary launches it; one that 16 divides is known to the compiler as such."""
    tiling = loss.tiling(vocab)
    options = {"num_warps": tiling.pop("num_warps")}
    constants = {"IGNORE": -100, "CAPPED": capped, "WRITES": True, **tiling}
    types = {"products_at": dtype, "targets_at": "*i64", "objective_at": "*fp32", "nats_at": "*fp32"}
    types |= dict.fromkeys(("products_row", "vocab"), "i32") | dict.fromkeys(("scale", "cap", "z_loss"), "fp32")
    signature, given, aligned = {}, {}, {}
    for place, parameter in enumerate(loss._loss_and_gradient.params):
        name = parameter.name
        signature[name] = types.get(name, "constexpr")
        if name in constants:
            given[place,] = constants[name]
        elif name.endswith("_at") or (vocab % 16 == 0 and name in ("products_row", "vocab")):
            aligned[place,] = [["tt.divisibility", 16]]
    return cubin(loss._loss_and_gradient, signature, given, aligned, options, capability)


def compiled_pointwise(
    kernel: Any,
    dtype: str,
    constants: dict[str, Any],
    numbers: dict[str, int],
    tiling: dict[str, int],
    capability: int,
) -> Any:
    """A kernel of SwiGLU or of the rotation as those `numbers` launch it: the compiler knows which of them 16 divides, and which are 1."""
    options = {"num_warps": tiling.pop("num_warps")}
    constants = constants | tiling
    signature, given, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        number = numbers.get(name, 0)  # strides that are not named: of a size that 16 divides
        if name in constants or number == 1:
            signature[name], given[place,] = "constexpr", constants.get(name, number)
        elif name.endswith("_at"):
            signature[name] = "*fp32" if name in ("cos_at", "sin_at") else dtype
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and number % 16 == 0:
            aligned[place,] = [["tt.divisibility", 16]]
    return cubin(kernel, signature, given, aligned, options, capability)


def pointwise(capability: int) -> Iterator[tuple[dict[str, Any], Any]]:
    for dtype, width, name in itertools.product(("*bf16", "*fp32"), (2048, 1365, 64), ("_forward", "_backward")):
        found = compiled_pointwise(
            getattr(swiglu, name), dtype, {}, {"width": width}, swiglu.tiling(width), capability
        )
        yield {"kernel": f"swiglu{name}", "dtype": dtype, "width": width}, found
    for dtype, width, interleaved, back in itertools.product(
        ("*bf16", "*fp32"), (64, 80, 128), (False, True), (False, True)
    ):
        heads = {"HEADS": 12, "KV_HEADS": 4, "HEAD_DIM": width, "INTERLEAVED": interleaved, "BACK": back}
        numbers = {"q_head": width, "k_head": width, "v_head": width, "rows": 20 * 1023}
        found = compiled_pointwise(rotary._turn, dtype, heads, numbers, rotary.tiling(width), capability)
        yield {"kernel": "turn", "dtype": dtype, "width": width, "interleaved": interleaved, "back": back}, found


def accesses(ptx: str) -> dict[str, int]:
    """How often a thread loads from and stores to global memory, by the bits of one access; and its exchanges through shared memory."""
    found: dict[str, int] = {"exchanges": len(re.findall(r"\bst\.shared", ptx))}
    for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:\.[A-Za-z_:0-9]+?)*?(\.v\d)?\.b(\d+)", ptx):
        name = f"{kind} {int(count[2:] or 1) * int(bits)}"
        found[name] = found.get(name, 0) + 1
    return found


def stack_bytes(cubin: bytes) -> int:
    """Bytes per thread that did not fit into registers."""
    return usage(cubin, "STACK")


def usage(cubin: bytes, what: str) -> int:
    """Registers (REG) or bytes of stack (STACK) per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(rf"{what}:(\d+)", said.stdout)
    assert found, said.stdout
    return int(found[1])


def jobs(every: bool) -> Iterator[tuple[str, str, int, tuple[int, int, int, int], bool]]:
    for name, (_, half, fp32) in KERNELS.items():
        if not every:
            yield name, "*bf16", 16, (16, 16, 4, 1), True
            continue
        for dtype, tiles in (("*bf16", half), ("*fp32", fp32)):
            for width, some in tiles.items():
                for tile in some:
                    yield name, dtype, width, tile, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--pointwise", action="store_true")
    options = parser.parse_args()
    if options.pointwise:
        for row, found in pointwise(options.capability):
            of_thread = {"registers": usage(found.asm["cubin"], "REG"), "stack": stack_bytes(found.asm["cubin"])}
            print(json.dumps(row | of_thread | {"accesses": accesses(found.asm["ptx"])}), flush=True)
        return
    if options.loss:
        for dtype, capped, vocab in itertools.product(("*bf16", "*fp32"), (False, True), (65, 50257, 50304)):
            found = compiled_loss(dtype, capped, vocab, options.capability)
            row = {"dtype": dtype, "capped": capped, "vocab": vocab, "shared": found.metadata.shared}
            of_thread = {"registers": usage(found.asm["cubin"], "REG"), "stack": stack_bytes(found.asm["cubin"])}
            print(json.dumps({**row, **of_thread}), flush=True)
        return
    for name, dtype, width, tile, everything in jobs(options.all):
        found = compiled(KERNELS[name][0], dtype, width, tile, everything, options.capability)
        row = {"kernel": name, "dtype": dtype, "width": width, "tile": tile, "shared": found.metadata.shared}
        print(json.dumps({**row, "stack": stack_bytes(found.asm["cubin"])}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
