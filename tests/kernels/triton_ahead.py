"""Compile the attention kernels for a GPU that is not there: ``python triton_ahead.py 90 [--all]`` prints a JSON line per kernel.

Triton's interpreter accepts what its compiler may refuse, and knows nothing of registers. A process of its own, because the interpreter,
once chosen, replaces the compiler for the whole process.
"""

from __future__ import annotations

import argparse
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

from scratchlm.kernels import flash_attention_triton as forward
from scratchlm.kernels import flash_attention_triton_backward as backward

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
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def stack_bytes(cubin: bytes) -> int:
    """Bytes per thread that did not fit into registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"STACK:(\d+)", said.stdout)
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
    options = parser.parse_args()
    for name, dtype, width, tile, everything in jobs(options.all):
        found = compiled(KERNELS[name][0], dtype, width, tile, everything, options.capability)
        row = {"kernel": name, "dtype": dtype, "width": width, "tile": tile, "shared": found.metadata.shared}
        print(json.dumps({**row, "stack": stack_bytes(found.asm["cubin"])}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
