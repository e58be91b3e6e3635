"""Estimates: sums that agree with each other and with what is known from elsewhere, and the rules for what could be saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from scratchlm.config import Recipe
from scratchlm.generate.cache import KVCache
from scratchlm.kernels import flash_attention_cpp, rows_cpp
from scratchlm.machine import find_compiler
from scratchlm.model import presets
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.transformer import Transformer
from scratchlm.resources.answer import collapsed
from scratchlm.resources.devices import find
from scratchlm.resources.estimate import (
    _line,
    estimate,
    largest_fitting,
    model_of,
    vocabulary,
)
from scratchlm.resources.step import Traceable, as_on_a_gpu, trace_step
from scratchlm.resources.timing import Datasheet

SMALL: dict[str, Any] = {"vocab_size": 400, "context_length": 64, "d_model": 48, "layers": 3, "heads": 4}


def recipe(**sections: Any) -> Recipe:
    model = SMALL | sections.pop("model", {})
    train = {"batch_size": 8, "steps": 100} | sections.pop("train", {})
    return Recipe(model=model, train=train, **sections)


def test_sums_are_those_of_the_model() -> None:
    given = recipe()
    found = estimate(given, precision="fp32")
    model = hollow(model_of(given))
    assert found.params == model.num_params() == sum(part.params for part in found.components)
    assert sum(part.forward for part in found.components) == pytest.approx(found.forward_flops)
    assert sum(part.backward for part in found.components) == pytest.approx(found.backward_flops)
    assert sum(found.memory.at_peak.values()) == found.memory.peak == max(live for _, live in found.memory.timeline)
    scores = 3 * 4 * 64 * 48 / 2  # flash attention's backward pass computes them once more
    assert found.forward_flops + found.backward_flops == pytest.approx(found.model_flops + scores)
    assert found.tokens == 100 * 8 * 64
    blocks = {part.path: part for part in found.components}
    assert blocks["blocks.*.feedforward.gate_up"].copies == 3
    assert blocks["blocks.*.feedforward.gate_up"].forward == 2 * blocks["blocks.*.feedforward.gate_up"].params
    flops = sum(group.flops for group in found.operations if group.phase != "optimizer")
    assert flops == pytest.approx((found.forward_flops + found.backward_flops) * 8 * 64)


def test_of_experts_only_those_chosen_are_active() -> None:
    given = recipe(model={"moe": {"experts": 8, "top_k": 2, "shared": 1}})
    parts = {part.path: part for part in estimate(given, precision="fp32", savings=False).components}
    up = parts["blocks.*.feedforward.up"]
    assert up.active * 4 == up.params > 0
    shared = parts["blocks.*.feedforward.shared.down"]
    assert shared.active == shared.params > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_micro_batches_need_no_second_look_at_the_optimizer(optimizer: str) -> None:
    """Where the optimizer's temporaries are the peak, too: one sequence, few tokens."""
    given = recipe(optim={"optimizer": optimizer}, model={"d_model": 96, "d_ff": 1024}, train={"batch_size": 2})
    found = estimate(given, precision="bf16", savings=False)
    peaks = {}
    for rows in (1, 2):
        step = trace_step(model_of(given), given.optim, given.train, precision="bf16", micro_batch=rows)
        peaks[rows] = step.trace.peak()[1]
    assert found.memory.peak == peaks[2]
    assert found.bytes_per_sequence == peaks[2] - peaks[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [16, 17, 64, 75])
def test_blocks_of_the_loss_that_are_alike_need_not_be_traced(precision: str, rows: int) -> None:
    """One block of 1,024 tokens, one and a piece, four, four and a piece; the logits decide the peak."""
    given = recipe(model={"vocab_size": 3000, "logit_soft_cap": 30.0}, train={"z_loss": 1e-4})
    prepared = Traceable(model_of(given), given.optim, given.train)
    whole, short = (
        prepared.step(precision=precision, micro_batch=rows, for_peak=short).trace for short in (False, True)
    )
    live = [
        bytes_ for bytes_, op in zip(whole.timeline(), whole.operations, strict=True) if op.phase != "optimizer"
    ]
    assert short.peak()[1] == max(live)
    assert short.operations[short.peak()[0]].module == "" or rows < 64
    products = [sum(op.name == "mm" and op.phase == "forward" for op in one.operations) for one in (whole, short)]
    assert products[0] - products[1] == 3 * max(0, math.ceil(rows / 16) - 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_largest_micro_batch_fits_and_the_next_does_not(precision: str, accumulation: int) -> None:
    given = recipe(train={"batch_size": 8, "accumulation": accumulation})
    limit = 60e6
    found = estimate(given, precision=precision, memory_bytes=limit, savings=False)
    assert found.largest_micro_batch is not None and found.largest_micro_batch > 8

    def peak(rows: int) -> int:
        step = trace_step(
            model_of(given),
            given.optim,
            given.train,
            precision=precision,
            micro_batch=rows,
            accumulation=accumulation,
        )
        return step.trace.peak()[1]

    assert peak(found.largest_micro_batch) <= limit < peak(found.largest_micro_batch + 1)
    assert estimate(given, precision=precision, memory_bytes=1e3, savings=False).largest_micro_batch == 0


@settings(max_examples=60, deadline=None)
@drawn(st.integers(1, 500), st.integers(1, 300), st.integers(0, 400), st.integers(1, 40), st.floats(0, 30_000))
def test_the_search_finds_the_last_that_fits(a: int, b: int, bend: int, rows: int, memory: float) -> None:
    """Of two lines, whichever is higher, from any two known points."""

    def peak(batch: int) -> int:
        return max(a + b * batch, bend + (b + 7) * batch)

    known = {rows: peak(rows), 2 * rows: peak(2 * rows)}
    found = largest_fitting(peak, memory, known, most=10**9, tries=40)
    assert (found == 0 or peak(found) <= memory) and peak(found + 1) > memory
    assert len(known) <= 20


def test_beyond_what_is_traced_the_line_is_followed() -> None:
    asked: list[int] = []
    found = largest_fitting(lambda rows: asked.append(rows) or 100 + 7 * rows, 1e6, {2: 114, 4: 128}, most=50)
    assert found == (1_000_000 - 100) // 7 and asked == [50]


def test_what_could_be_saved() -> None:
    given = recipe(train={"loss_kernel": "reference", "batch_size": 32}, model={"context_length": 256})
    found = estimate(given, precision="fp32")
    assert set(found.savings) == {
        "bf16 autocast",
        "half the micro-batch, twice the accumulation",
        "chunked loss",
        "checkpointing all but products",
        "checkpointing whole blocks",
        "optimizer states in 8 bits",
    }
    state = found.memory.at_peak["optimizer state"]
    saved = found.memory.peak - found.savings["optimizer states in 8 bits"]
    assert saved == pytest.approx(state * (1 - 2 / 8), rel=0.02)  # 8 bytes become a little more than 2
    assert found.savings["chunked loss"] < found.memory.peak
    momentum = estimate(recipe(optim={"optimizer": "sgd"}), precision="bf16")
    assert momentum.savings["optimizer states in 8 bits"] < momentum.memory.peak
    sgd = estimate(recipe(optim={"optimizer": "sgd", "momentum": 0, "nesterov": False}), precision="bf16")
    assert "optimizer states in 8 bits" not in sgd.savings and "bf16 autocast" not in sgd.savings


def test_checkpointing_is_traced() -> None:
    model = {"layers": 6, "context_length": 256}
    found = estimate(recipe(train={"batch_size": 16}, model=model), precision="bf16")
    some, less = (
        estimate(recipe(train={"batch_size": 16, "activation_checkpointing": how}, model=model), precision="bf16")
        for how in ("selective", "blocks")
    )
    assert some.memory.peak == found.savings["checkpointing all but products"]
    assert less.memory.peak < some.memory.peak < 0.8 * found.memory.peak
    scores = 2 * 16 * 256 * 256 * 6 * 4 * 12 / (16 * 256)  # of the products in attention alone, q times k
    assert found.forward_flops == some.forward_flops
    assert 0 < some.backward_flops - found.backward_flops <= 2 * scores, (
        "scores and mixtures once more, no linear layer"
    )
    assert less.memory.peak == found.savings["checkpointing whole blocks"] < 0.8 * found.memory.peak
    assert "checkpointing whole blocks" not in less.savings
    assert less.forward_flops == found.forward_flops
    again = less.backward_flops - found.backward_flops
    assert 0.5 * found.forward_flops < again < found.forward_flops, "the blocks once more, the head not"


def test_compiled_blocks_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than torch's kernels, one by one; our own keep little more."""
    given = recipe(train={"batch_size": 8}, model={"context_length": 256, "attention_kernel": "sdpa"})
    ours = estimate(given, precision="bf16", savings=False)
    monkeypatch.setattr(rows_cpp, "is_worth_it", lambda dtype: False)
    eager, fused = (estimate(given, precision="bf16", compiled=on, savings=False) for on in (False, True))
    assert fused.memory.peak < eager.memory.peak
    kept = [sum(part.kept for part in found.components) for found in (eager, fused, ours)]
    assert kept[1] < 0.8 * kept[0]
    assert kept[1] < kept[2] < 0.9 * kept[0] or find_compiler() is None
    assert fused.bytes_per_sequence < eager.bytes_per_sequence and fused.params == eager.params


def test_auto_is_what_a_run_would_begin_with() -> None:
    auto = recipe(train={"micro_batch": "auto", "batch_size": 12})
    peaks = {
        rows: estimate(
            recipe(train={"micro_batch": rows, "batch_size": 12}), precision="fp32", savings=False
        ).memory.peak
        for rows in (3, 4)
    }
    for rows, limit in ((4, peaks[4] / 0.9 + 1), (3, peaks[4] / 0.9 - 1)):
        found = estimate(auto, precision="fp32", memory_bytes=limit, savings=False)
        assert (found.micro_batch, found.accumulation) == (rows, 12 // rows) and found.memory.peak == peaks[rows]
    assert estimate(auto, precision="fp32", savings=False).micro_batch == 12, (
        "of a device without known memory: the batch"
    )


def test_time_and_money_follow_from_a_device() -> None:
    given, h100 = recipe(), Datasheet(find("h100"))
    found = estimate(given, precision="bf16", machine=h100, price_per_hour=3.6, savings=False)
    time = found.time
    assert time is not None and time.machine == "NVIDIA H100 SXM"
    assert time.step == pytest.approx(sum(time.by_phase.values()))
    assert time.tokens_per_second == pytest.approx(8 * 64 / time.step)
    assert time.model_flops_per_second == pytest.approx(found.model_flops * time.tokens_per_second)
    assert time.total == pytest.approx(100 * time.step) and time.price == pytest.approx(0.001 * time.total)
    parts = estimate(
        recipe(train={"accumulation": 4}), precision="bf16", machine=h100, price_per_hour=None, savings=False
    )
    assert parts.micro_batch == 2 and parts.time is not None and parts.time.price is None
    assert parts.time.step == pytest.approx(
        4 * (parts.time.by_phase["forward"] + parts.time.by_phase["backward"]) + parts.time.by_phase["optimizer"]
    )


def test_a_batch_that_grows_is_fewer_tokens_and_less_time() -> None:
    h100 = Datasheet(find("h100"))
    grows = {"batch_warmup_steps": 60, "batch_warmup_start": 2}
    whole, growing = (
        estimate(recipe(train=train), precision="bf16", machine=h100, savings=False) for train in ({}, grows)
    )
    assert whole.tokens == 100 * 8 * 64 and growing.tokens == (20 * (2 + 4 + 6) + 40 * 8) * 64
    assert whole.time is not None and growing.time is not None and whole.time.step == growing.time.step
    once = whole.time.by_phase["optimizer"]
    share = growing.tokens / whole.tokens
    assert growing.time.total == pytest.approx(share * (whole.time.total - 100 * once) + 100 * once)


def test_an_mfu_on_a_large_model_is_what_the_assumptions_say() -> None:
    """A large dense model is bound by its products: between the attention's share of the peak and the products' own."""
    given = Recipe(model=presets.load("llama-3.2-1b").model_copy(update={"layers": 2}), train={"batch_size": 4})
    h100 = Datasheet(find("h100"))
    found = estimate(given, precision="bf16", machine=h100, micro_batch=4, compiled=True, savings=False)
    assert found.time is not None
    assert 0.2 < found.time.model_flops_per_second / h100.device.peak("bf16") < 0.7


def _attention(length: int, *, compiled: bool, precision: str = "fp32", kind: str = "cpu") -> set[str]:
    """Names of the operations of attention in an estimate."""
    machine = Datasheet(find("h100").model_copy(update={"kind": kind}))
    options: dict[str, Any] = {"precision": precision, "machine": machine, "compiled": compiled, "savings": False}
    found = estimate(recipe(model={"context_length": length}), on_cuda=kind == "cuda", **options)
    return {operation.name for operation in found.operations if "attention" in operation.component}


def test_inside_a_compiler_a_cpu_takes_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_cpp, "is_worth_it", lambda dtype: False)
    assert "bmm" in _attention(512, compiled=True)
    for names in (_attention(2048, compiled=True), _attention(512, compiled=False)):
        assert "bmm" not in names and any("scaled_dot_product" in name for name in names)


def test_where_our_kernels_run_an_estimate_has_them_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an estimate builds nothing")

    monkeypatch.setattr(flash_attention_cpp.cpp_here, "built", refuse)
    monkeypatch.setattr(flash_attention_cpp, "library", refuse)
    monkeypatch.setattr(flash_attention_cpp, "is_worth_it", lambda dtype: dtype == torch.float32)
    for compiled in (True, False):
        names = _attention(64, compiled=compiled)
        assert {"flash_attention", "flash_attention_backward"} <= names and "bmm" not in names
    assert "flash_attention" not in _attention(64, compiled=False, precision="bf16")
    assert "flash_attention" not in _attention(64, compiled=False, kind="cuda")


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "sdpa"),
        ({"context_length": 512}, "auto"),  # is the same on both
        ({"mask": ["causal", "sliding_window"], "window": 8}, "auto"),
        ({"attention_soft_cap": 30.0}, "auto"),
        ({"attention_kernel": "reference"}, "reference"),
        ({"kernels": "reference"}, "auto"),
    ],
)
def test_on_a_gpu_short_sequences_in_bf16_take_torchs_attention(changes: dict[str, Any], kernel: str) -> None:
    config = model_of(recipe(model=changes))
    assert as_on_a_gpu(config, config.context_length).attention_kernel == kernel


def test_the_estimate_follows_what_the_place_takes() -> None:
    """In bf16 a CPU computes the scores of 64 tokens by products, a GPU by one kernel."""
    names = {}
    for kind, on_cuda in (("cpu", False), ("cuda", True)):
        machine = Datasheet(find("h100").model_copy(update={"kind": kind}))
        found = estimate(recipe(), precision="bf16", machine=machine, savings=False, on_cuda=on_cuda)
        names[kind] = {operation.name for operation in found.operations if "attention" in operation.component}
    assert any("scaled_dot_product" in name for name in names["cuda"])
    assert "bmm" in names["cpu"] and not any("scaled_dot_product" in name for name in names["cpu"])


def test_dropout_inside_attention_keeps_scores_unless_it_is_fused() -> None:
    given = recipe(model={"attention_dropout": 0.1, "context_length": 256})
    plain, fused = (estimate(given, precision="fp32", savings=False, on_cuda=f) for f in (False, True))
    assert plain.memory.peak > fused.memory.peak + 3 * 8 * 4 * 256 * 256 * 4  # a layer's scores, at least


def test_vocabulary_and_names() -> None:
    assert vocabulary(recipe()) == 400
    assert vocabulary(Recipe(model={**SMALL, "vocab_size": 0}, tokenizer={"vocab_size": 777})) == 777
    assert collapsed("blocks.11.attention.qkv") == "blocks.*.attention.qkv" and collapsed("") == "head and loss"
    assert collapsed("predictions.0.block.attention") == "predictions.*.block.attention"


@pytest.mark.parametrize("changes", [{}, {"logit_soft_cap": 5.0}])
def test_the_loss_of_a_cpu_with_a_compiler_is_in_place(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over a block of logits, and no second block beside it; with a soft cap, which that kernel lacks, as without a compiler."""
    given = recipe(model={"vocab_size": 5000, **changes}, train={"batch_size": 16})
    names, peaks = [], []
    for compiler in ("c++", None):
        monkeypatch.setattr(flash_attention_cpp.cpp_here, "compiler", lambda compiler=compiler: compiler)
        found = estimate(given, precision="fp32", savings=False)
        names.append({operation.name for operation in found.operations if operation.component == "head and loss"})
        peaks.append(found.memory.peak)
    assert ("exp_" in names[0]) == (not changes) and "exp_" not in names[1] and "exp" in names[1]
    assert peaks[1] > peaks[0] + 1000 * 5000 * 4 or changes


@pytest.mark.parametrize(
    ("model", "rows", "memory"),
    [({"context_length": 32}, 1, 4e8), ({}, 8, 4e8), ({"context_length": 32}, 8, 3e6), ({}, 8, 1e3)],
)
def test_the_line_of_bytes_agrees_with_the_most_that_fit(model: dict[str, Any], rows: int, memory: float) -> None:
    given = recipe(model=model, train={"batch_size": rows})
    found = estimate(given, precision="fp32", memory_bytes=memory, savings=False)
    assert found.fixed_bytes + rows * found.bytes_per_sequence == pytest.approx(found.memory.peak)
    assert found.fixed_bytes >= 0 < found.bytes_per_sequence
    if found.largest_micro_batch:
        line = found.fixed_bytes + found.largest_micro_batch * found.bytes_per_sequence
        assert line <= memory * 1.02 and line + 2 * found.bytes_per_sequence > 0.98 * memory


def test_attention_that_grows_faster_than_its_batch_has_no_negative_part() -> None:
    assert _line({4: 100, 2: 40}, 4, None) == (0.0, 25.0)


def test_a_cache_is_no_longer_than_the_context() -> None:
    windows = {"mask": ["sliding_window", "causal"], "window": 24, "layers": 2, "context_length": 32}
    given = recipe(model=windows)
    found = estimate(given, precision="fp32", savings=False)
    cache, model = KVCache(model_of(given), 1, 32), Transformer(model_of(given), seed=0)
    with torch.no_grad():
        model(torch.zeros(1, 32, dtype=torch.int64), cache=cache)
    held = sum(t.numel() * t.itemsize for layer in cache._slots for t in layer.values())
    assert found.cache_bytes_per_token * 32 + found.cache_bytes_bounded == held
