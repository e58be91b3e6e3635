"""A step traced without memory: FLOPs by hand, memory as torch's allocator gave it. See also test_traced_architectures.py."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.kernels import flash_attention_cpp
from scratchlm.model import ModelConfig, Transformer
from scratchlm.optim import build_optimizers, clip_grad_norm
from scratchlm.resources.step import CPU, Step, trace_step
from scratchlm.resources.trace import Storage, Trace, Tracer, without_memory
from scratchlm.train.loss import NextTokenLoss
from scratchlm.train.precision import autocast

TINY = ModelConfig(vocab_size=300, context_length=64, d_model=32, layers=2, heads=4)


def traced(config: ModelConfig, **options: Any) -> Step:
    given = {"precision": "fp32", "micro_batch": 2, "optim": OptimConfig(), "train": TrainConfig()} | options
    return trace_step(config, **given)


def real_batch(config: ModelConfig, rows: int) -> Batch:
    ids = torch.randint(config.vocab_size, (rows, config.context_length))
    return Batch(ids, ids.roll(-1, 1))


# ---------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_plain_model_by_hand() -> None:
    """mm of m × k and k × n is 2mkn; backward two such for each, and the loss computes its own gradients in its forward pass."""
    step = traced(TINY, train=TrainConfig(loss_kernel="reference"))
    tokens, d, ff = 2 * 64, 32, TINY.resolved_d_ff
    matrices = 2 * (4 * d * d + 3 * d * ff) + 300 * d
    scores = 2 * 4 * 64 * d  # two layers, q kᵀ and weights v, all pairs
    assert step.trace.flops("forward") == tokens * (2 * matrices + scores)
    assert step.trace.flops("backward") == tokens * (4 * matrices + scores * 5 // 2)  # scores are computed again
    chunked = traced(TINY)
    assert chunked.trace.flops("forward") + chunked.trace.flops("backward") == step.trace.flops(
        "forward"
    ) + step.trace.flops("backward")


# ---------------------------------------------------------------------------------------------------- memory


def by_the_allocator(config: ModelConfig, optim: OptimConfig, train: TrainConfig, precision: str, rows: int) -> int:
    """The most bytes that torch's CPU allocator had given out during a step, by its own reports to the profiler."""
    torch.manual_seed(0)
    model = Transformer(config, seed=0)
    loss = NextTokenLoss(model, train.loss_kernel)
    optimizers = build_optimizers(model, optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    optimizers.zero_grad()
    batch = real_batch(config, rows)
    held = [*model.parameters(), *model.buffers(), batch.inputs, batch.targets]
    held += [m.table for m in model.modules() if isinstance(getattr(m, "table", None), torch.Tensor)]
    held += [state for state in optimizers.named_state().values() if state.ndim]
    standing = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with autocast(precision, CPU):
            objective = loss(batch)
        (objective / batch.inputs.numel()).backward()
        clip_grad_norm(model.parameters(), 1e-9)
        optimizers.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return standing + most


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "bf16": {"precision": "bf16"},
    "long": {"config": {"context_length": 512}, "rows": 1},
    "large vocabulary": {"config": {"vocab_size": 8000}},
    "all logits": {"config": {"vocab_size": 3000}, "train": {"loss_kernel": "reference"}},
    "experts": {"config": {"moe": {"experts": 4, "top_k": 2}}},
    "latent attention": {"config": {"attention": "mla", "latent": {"kv_rank": 16, "rope_dim": 8}}},
    "window": {"config": {"mask": "sliding_window", "window": 32, "context_length": 256}},
    "linear attention": {"config": {"attention": "gated_delta"}},
    "muon": {"optim": {"optimizer": "muon"}},
    "sgd": {"optim": {"optimizer": "sgd"}},
    "adamw, one by one": {"optim": {"implementation": "reference"}},
    "gpt-2's choices": {"config": {"norm": "layernorm", "feedforward": "gelu_tanh", "position": "learned"}},
    "deep, bf16, many rows": {"config": {"layers": 6}, "precision": "bf16", "rows": 8},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_peak_memory_is_what_the_allocator_gave(case: dict[str, Any]) -> None:
    base = {"vocab_size": 500, "context_length": 128, "d_model": 64, "layers": 2, "heads": 4}
    config = ModelConfig(**{**base, **case.get("config", {})})
    optim, train = OptimConfig(**case.get("optim", {})), TrainConfig(**case.get("train", {}))
    precision, rows = case.get("precision", "fp32"), case.get("rows", 4)
    step = trace_step(config, optim, train, precision=precision, micro_batch=rows)
    moment, peak = step.trace.peak()
    measured = by_the_allocator(config, optim, train, precision, rows)
    assert peak == pytest.approx(measured, rel=0.03), step.trace.live_by(moment, lambda s: s.kind)


def test_kinds_of_memory() -> None:
    step = traced(TINY, precision="bf16")
    params = sum(step.params.values())
    totals: dict[str, int] = {}
    for storage in step.trace.storages:
        totals[storage.kind] = totals.get(storage.kind, 0) + storage.size
    assert totals["weights"] == totals["gradients"] == 4 * params
    assert totals["optimizer state"] == 8 * params
    assert totals["batch and tables"] >= 2 * 2 * 64 * 8
    moment, peak = step.trace.peak()
    alive = step.trace.live_by(moment, lambda s: s.kind)
    assert sum(alive.values()) == peak == step.trace.timeline()[moment]
    assert alive["weights"] == 4 * params and alive["optimizer state"] == 8 * params
    muon = traced(TINY, optim=OptimConfig(optimizer="muon"))
    states = sum(s.size for s in muon.trace.storages if s.kind == "optimizer state")
    hidden = sum(n for name, n in muon.params.items() if name.startswith("blocks") and "norm" not in name)
    assert states == 4 * hidden + 8 * (params - hidden)


def test_with_accumulation_the_gradients_are_there_from_the_start() -> None:
    once, twice = traced(TINY), traced(TINY, accumulation=4)
    params = sum(once.params.values())
    assert sum(s.size for s in twice.trace.storages if s.kind == "gradients") == 4 * params
    more = twice.trace.timeline()[0] - once.trace.timeline()[0]
    assert 4 * params <= more < 4 * params + 64  # and the sums that are logged
    assert twice.trace.flops() == once.trace.flops()


def test_modules_are_named_in_both_directions() -> None:
    step = traced(TINY)
    for phase in ("forward", "backward"):
        products = [op.module for op in step.trace.operations if op.phase == phase and op.name == "mm"]
        for layer in range(2):
            for part in ("attention.qkv", "attention.output", "feedforward.gate_up", "feedforward.down"):
                assert products.count(f"blocks.{layer}.{part}") == (1 if phase == "forward" else 2), (
                    phase,
                    layer,
                    part,
                )


def test_a_timeline_by_hand() -> None:
    """An input of 4 numbers; y = x · x lives on, its square does not outlast the sum."""
    with without_memory():
        model, x = nn.Identity(), torch.zeros(4)
        tracer = Tracer(model)
        tracer.watch(x, "batch and tables")
        with tracer:
            tracer.phase = "forward"
            y = x * x
            total = (y * y).sum()
            del total
    assert [op.name for op in tracer.trace.operations] == ["mul", "mul", "sum"]
    assert tracer.trace.timeline() == [32, 48, 52] and tracer.trace.peak() == (2, 52)
    assert y.shape == (4,)
    assert tracer.trace.live_by(0, lambda s: s.kind) == {"batch and tables": 16, "temporaries": 16}


def test_peak_of_made_up_storages() -> None:
    trace = Trace(operations=[None] * 4)  # type: ignore[list-item]
    for size, born, died in ((10, 0, None), (5, 1, 3), (7, 2, 3), (1, 3, None)):
        trace.storages.append(Storage(size, born, "forward", "", "", died))
    assert trace.timeline() == [10, 15, 22, 11] and trace.peak() == (2, 22)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_threads_take_besides_in_our_attention_is_there_while_it_runs(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attention_cpp, "is_worth_it", lambda dtype: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    step = traced(TINY, train=TrainConfig(), compiled=compiled)
    attention = [i for i, op in enumerate(step.trace.operations) if op.name.startswith("flash_attention")]
    assert len(attention) == 4
    for trace in (step.trace, step.memory):
        for i in attention:
            back = trace.operations[i].phase == "backward"
            size = 3 * flash_attention_cpp.workspace(64, 8, 8, back=back)
            beside = [s for s in trace.storages if s.size == size and (s.born, s.died) == (i, i + 1)]
            assert len(beside) == 1 and beside[0].kind == "temporaries"
    monkeypatch.setattr(flash_attention_cpp, "is_worth_it", lambda dtype: False)
    without = traced(TINY, train=TrainConfig(), compiled=compiled)
    assert not any(op.name.startswith("flash_attention") for op in without.trace.operations)
