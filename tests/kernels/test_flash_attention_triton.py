"""FlashAttention-2's Triton kernels: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter runs a program per tile in Python, so `make test` takes a few small problems with everything in them, and
`make test-slow` the grid.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_cases import Case, answer, exact, largest_error
from hypothesis import HealthCheck, given, settings
from test_flash_attention import BOUNDS, cases
from triton_device import DEVICE

from scratchlm.kernels import flash_attention_op as op
from scratchlm.kernels import flash_attention_triton as kernels
from scratchlm.kernels import triton_probe
from scratchlm.kernels.flash_attention_op import fused_attention


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as bits and multiplies these as integers: products of the numbers they stand for."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def wide(builder: Any, x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return builder.cast_impl(x, tl.block_type(tl.float32, list(x.data.shape)))

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, wide(self, a), wide(self, b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def small_tiles(interpreted: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FIXED", {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1})


def held(case: Case, dtype: torch.dtype, told: list[warnings.WarningMessage]) -> None:
    found = answer(fused_attention, case, dtype, DEVICE)
    assert found.out.dtype == dtype
    assert largest_error(found, exact(case, dtype)) < BOUNDS[dtype]
    assert not [w for w in told if "attention_kernel" in str(w.message)]


FEW = [
    Case(),  # a head of the tile's width, two query heads of one key head, three tiles, the last with 5 rows
    Case(queries=33, keys=33, batch=2, kv_heads=2, head_dim=20, value_dim=9, cap=5.0, sinks=True, window=7),
    Case(queries=20, keys=49, alibi=True, window=18, scale=0.3),
    Case(queries=32, keys=32, documents=(3, 20, 9), sinks=True, alibi=True, cap=2.0),
    Case(batch=2, padding=(37, 18), window=9, heads=1),
    Case(queries=48, keys=17),
    Case(queries=2, keys=2, heads=3, kv_heads=1, head_dim=1),
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_outputs_and_gradients(case: Case, told: list[warnings.WarningMessage]) -> None:
    held(case, torch.float32, told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW[1:2], ids=str)
def test_half_precision(case: Case, dtype: torch.dtype, told: list[warnings.WarningMessage]) -> None:
    held(case, dtype, told)


def test_rows_that_read_nothing_are_zero_and_learn_nothing() -> None:
    found = answer(fused_attention, Case(batch=2, heads=1, padding=(37, 20)), torch.float32, DEVICE)
    assert not found.out[0].any() and not found.out[1, :, :20].any()
    d_q, d_k, d_v = found.gradients
    assert not d_q[0].any() and not d_k[0].any() and not d_v[0].any() and not d_q[1, :, :20].any()
    assert all(x.isfinite().all() and x.any() for x in found.gradients)


def test_minus_infinity_and_nan(told: list[warnings.WarningMessage]) -> None:
    """A score of −∞ weighs nothing, also before any other; a NaN shows in every row that reads it, and in no tile before it."""
    q, k, v, _ = Case(heads=1).tensors(torch.float32, DEVICE)
    q = q.abs() + 0.1
    k[:, :, [0, 5]] = float("-inf")
    out = fused_attention(q, k, v, None, Case().scores(device=DEVICE))
    by_tiles = op._tiled_forward(q, k, v, None, None, None, None, 0.25, None, None)[0]
    torch.testing.assert_close(out, by_tiles, rtol=1e-5, atol=1e-6)
    assert out.isfinite().all() and not out[:, :, 0].any() and out[:, :, 1:].any(dim=-1).all()
    k[:, :, 33] = float("nan")
    shown = fused_attention(q, k, v, None, Case().scores(device=DEVICE)).isnan().any(dim=-1)[0, 0]
    assert shown[33:].all() and not shown[:32].any()


def test_two_runs_agree_to_the_bit() -> None:
    first, second = (answer(fused_attention, FEW[1], torch.float16, DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_heads_that_lie_apart_in_memory() -> None:
    """As a model hands them over: views of one projection, and a gradient that is one number for all."""
    projected = torch.randn(2, 20, 4 * 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    q, k, v = projected.view(2, 20, 4, 16).transpose(1, 2).split([2, 1, 1], dim=1)
    assert not q.is_contiguous()
    fused_attention(q, k, v, None, Case().scores(device=DEVICE)).sum().backward()
    apart = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    fused_attention(*apart, None, Case().scores(device=DEVICE)).sum().backward()
    whole = torch.cat([x.grad for x in apart], dim=1).transpose(1, 2).flatten(-2)  # type: ignore[misc]
    torch.testing.assert_close(projected.grad, whole)


def test_a_machine_without_a_compiler_gets_the_tiles_and_is_told_once(
    told: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(triton_probe, "probe", fails)
    monkeypatch.setattr(kernels, "forward", None)
    case = Case(sinks=True)
    for _ in range(2):
        assert (
            largest_error(answer(fused_attention, case, torch.float32, DEVICE), exact(case, torch.float32)) < 1e-5
        )
    assert [str(w.message) for w in told] == [
        "attention_kernel = flash is computed tile by tile in torch, which is slower: triton does not run here "
        "(RuntimeError: Failed to find C compiler. Please specify via CC environment variable.)"
    ]


def ahead(*options: str) -> list[dict[str, Any]]:
    """The lines of `triton_ahead.py`, from a process in which Triton compiles."""
    script = Path(__file__).with_name("triton_ahead.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


compiles = pytest.mark.skipif(
    platform.machine() != "x86_64" or not sys.platform.startswith("linux"), reason="Triton's compiler is not here"
)


@compiles
def test_the_compiler_takes_the_kernels_with_everything_in_them() -> None:
    assert [row["kernel"] for row in ahead("90")] == ["forward", "keys", "queries"]


# --- slow -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_problem(case: Case) -> None:
    assert largest_error(answer(fused_attention, case, torch.float32, DEVICE), exact(case, torch.float32)) < 1e-5


GRID: dict[str, list[dict[str, Any]]] = {
    "length": [{"queries": n, "keys": n} for n in (1, 15, 16, 17, 48, 65)] + [{"queries": 5, "keys": 40}],
    "mask": [{}, {"window": 1}, {"window": 16}, {"documents": ()}, {"padding": (3,)}],
    "scores": [{}, {"cap": 3.0, "alibi": True, "sinks": True, "scale": 0.2}],
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128, 256])
def test_the_grid(head_dim: int, dtype: torch.dtype, told: list[warnings.WarningMessage]) -> None:
    for fields in itertools.product(*GRID.values()):
        case = Case(head_dim=head_dim)
        for change in fields:
            case = replace(case, **change)
        if "documents" in fields[1] and case.queries == case.keys:
            case = replace(case, documents=(case.keys // 3, case.keys - case.keys // 3))
        found = answer(fused_attention, case, dtype, DEVICE)
        assert found.out.dtype == dtype
        # Twice the bound: the worst of seventy, sinks and zeros among them.
        assert largest_error(found, exact(case, dtype), cancelling=True) < 2 * BOUNDS[dtype], case
        assert not [w for w in told if "attention_kernel" in str(w.message)]


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(("capability", "most"), [("90", 227), ("80", 163)])
def test_every_candidate_fits(capability: str, most: int) -> None:
    """On sm_90 nothing worth mentioning is spilled from registers; shared memory suffices, also that of small GPUs for one of each width."""
    rows = ahead(capability, "--all")
    assert len(rows) > 40
    assert all(row["shared"] <= most * 1024 for row in rows), rows
    if capability == "90":
        spilled = {(row["kernel"], row["dtype"], row["width"]) for row in rows if row["stack"] > 64}
        assert spilled <= {("queries", "*fp32", 256)}, rows
    classes = {(row["kernel"], row["dtype"], row["width"]) for row in rows}
    small = {(row["kernel"], row["dtype"], row["width"]) for row in rows if row["shared"] <= 99 * 1024}
    assert small == classes
