"""Steps traced for a GPU: what CUDA does in another way than a CPU, held to real tensors that do it so on a CPU, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_trace import by_the_allocator

from scratchlm.config import OptimConfig, Recipe, TrainConfig
from scratchlm.kernels import cross_entropy, rows_cpp
from scratchlm.model import ModelConfig
from scratchlm.optim import newton_schulz
from scratchlm.resources import step as steps
from scratchlm.resources.devices import find
from scratchlm.resources.estimate import estimate
from scratchlm.resources.plan import plan_of
from scratchlm.resources.step import Step, Traceable, as_run_on, trace_step
from scratchlm.resources.timing import Datasheet, Machine, product_shape

SMALL: dict[str, Any] = {"vocab_size": 500, "context_length": 128, "d_model": 64, "layers": 2, "heads": 4}


def traced(device_type: str = "cuda", model: dict[str, Any] | None = None, **options: Any) -> Step:
    given = {"precision": "bf16", "micro_batch": 4, "optim": OptimConfig(), "train": TrainConfig()} | options
    return trace_step(ModelConfig(**SMALL | (model or {})), device_type=device_type, **given)


def test_blocks_of_the_loss_on_cuda() -> None:
    rows = [
        cross_entropy.rows_for(vocab, compiled=c, device_type="cuda")
        for c in (False, True)
        for vocab in (1, 2**15, 50_257, 131_072, 2**19, 2**22)
    ]
    assert rows == 2 * [16384, 16384, 8192, 4096, 1024, 1024]


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    # In fp32: where a CPU adds bf16 to fp32 it makes a copy in fp32 first, and CUDA does not.
    "large vocabulary": {"config": {"vocab_size": 8000}, "precision": "fp32"},
    "cap, z-loss, bias": {
        "config": {"logit_soft_cap": 30.0, "head_bias": True, "vocab_size": 4000},
        "train": {"z_loss": 1e-4},
        "precision": "fp32",
    },
    "dropout": {"config": {"residual_dropout": 0.1, "embedding_dropout": 0.1}},
    "shared keys": {"config": {"kv_heads": 1, "attention_kernel": "sdpa", "vocab_size": 50}, "precision": "fp32"},
    "muon": {"optim": {"optimizer": "muon"}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_peak_memory_is_what_the_allocator_gave(case: dict[str, Any]) -> None:
    """Real tensors of a CPU under the same changes: what a hollow trace cannot know of them would show."""
    config = ModelConfig(**SMALL | {"d_model": 128} | case.get("config", {}))
    optim, train = OptimConfig(**case.get("optim", {})), TrainConfig(**case.get("train", {}))
    precision = case.get("precision", "bf16")
    step = traced(
        model=SMALL | {"d_model": 128} | case.get("config", {}), precision=precision, optim=optim, train=train
    )
    with steps._as_on_cuda(compiled=False):
        measured = by_the_allocator(config, optim, train, precision, 4)
    assert step.memory.peak()[1] == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_by_hand(compiled: bool) -> None:
    """One block of logits, which becomes its gradient; and what products of it give."""
    vocab, d, tokens, rows = 200_000, 64, 8 * 1024, 2048
    step = traced(model={"vocab_size": vocab, "context_length": 1024}, micro_batch=8, compiled=compiled)
    moment, _ = step.memory.peak()
    operation = step.memory.operations[moment]
    assert (operation.name, operation.phase) == (
        "sum",
        "forward",
    )  # a second block's losses, beside the gradient of the first
    alive = [s for s in step.memory.storages if s.lives_at(moment) and s.module == "" and s.phase == "forward"]
    x = d_x = 2 * tokens * d
    weight, d_weight, logits = 2 * vocab * d, 4 * vocab * d, 2 * rows * vocab
    assert sorted(s.size for s in alive if s.size > 16) == sorted([x, d_x, weight, d_weight, logits, 4 * rows])
    of_the_loss = [op for op in step.trace.operations if op.phase == "forward" and op.module == ""]
    assert [op.name for op in of_the_loss].count("mm") == 2 * tokens // rows
    wide = [op for op in of_the_loss if op.name == "product_"]
    assert [op.flops for op in wide] == [2 * rows * vocab * d] * (tokens // rows)


@pytest.mark.parametrize("for_peak", [False, True])
def test_on_cuda_less_is_kept(for_peak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than by torch's kernels on a CPU."""
    monkeypatch.setattr(rows_cpp, "is_worth_it", lambda dtype: False)
    changed: dict[str, Any] = SMALL | {"residual_dropout": 0.1, "attention_kernel": "sdpa"}
    prepared = [
        Traceable(ModelConfig(**changed), OptimConfig(), TrainConfig(), device_type=device)
        for device in ("cpu", "cuda")
    ]
    cpu, cuda = (p.step(precision="fp32", micro_batch=8, for_peak=for_peak).memory for p in prepared)
    numbers = 8 * 128 * 64
    kept = [
        sum(s.size for s in trace.storages if s.kind == "activations" and s.module.startswith("blocks.0"))
        for trace in (cpu, cuda)
    ]
    norms = 2 * 4 * numbers  # x / RMS(x) of both norms
    masks = 2 * 3 * numbers  # bytes, not floats
    means = 2 * 4 * numbers // 64
    gates = 4 * 3 * numbers  # silu(gate)
    # q‖k of both layers, whose rotation is one module, the projection and the output's copy, instead of q, k and v.
    heads = 4 * (2 * 2 + 3 + 1 - 3) * numbers
    assert kept[0] - kept[1] == norms + masks - means + gates + heads


def test_shared_keys_are_repeated_in_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_cpp, "is_worth_it", lambda dtype: False)
    kept = {}
    for precision in ("fp32", "bf16"):
        for device in ("cpu", "cuda"):
            memory = traced(device, model={"kv_heads": 1, "attention_kernel": "sdpa"}, precision=precision).memory
            first = [s for s in memory.storages if s.kind == "activations" and s.module == "blocks.0.attention"]
            kept[precision, device] = sorted(s.size for s in first)
    numbers, sums = 4 * 128 * 64, 4 * 4 * 128 * 4
    assert kept["fp32", "cuda"] == [sums, *[4 * numbers] * 4]  # queries, keys and values of every head, output
    assert kept["fp32", "cpu"] == [sums, *[4 * numbers] * 2]  # output and its copy; the rest is elsewhere
    assert kept["bf16", "cuda"] == [sums, *[2 * numbers // 4] * 2, *[2 * numbers] * 2]


def test_a_layer_of_the_model_is_few_operations_on_cuda() -> None:
    """q‖k‖v to attention, and gate‖up to the last product, are one operation each, forward and backward."""
    step = traced(model={"layers": 1, "kv_heads": 2, "attention_kernel": "sdpa"})
    numbers = 4 * 128 * 64
    ours = {op.name: op for op in step.trace.operations if op.name.startswith(("swiglu", "turn_heads"))}
    angles = 2 * 4 * 128 * 8
    assert {name: (op.phase, op.read, op.written) for name, op in ours.items()} == {
        "turn_heads": ("forward", 2 * 2 * numbers + angles, 2 * 2 * numbers),
        "swiglu": ("forward", 2 * 6 * numbers, 2 * 3 * numbers),
        "swiglu_backward": ("backward", 2 * 9 * numbers, 2 * 6 * numbers),
        "turn_heads_backward": ("backward", 2 * 2 * numbers + angles, 2 * 2 * numbers),
    }
    modules = {name: op.module for name, op in ours.items()}
    assert modules["turn_heads"] == modules["turn_heads_backward"] == "blocks.0.attention"
    assert modules["swiglu"] == modules["swiglu_backward"] == "blocks.0.feedforward"
    assert not [op for op in step.trace.operations if op.name in ("silu", "silu_backward", "cat")]


def test_experts_and_accumulation_are_traced_too() -> None:
    step = traced(model={"moe": {"experts": 4, "top_k": 2}}, accumulation=2)
    assert step.memory.peak()[1] > 0 and any(op.name == "grouped_product" for op in step.trace.operations)


def test_muon_iterates_in_bf16_wherever_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "fast_dtype", lambda _: torch.float32)
    found = {}
    for device in ("cpu", "cuda"):
        step = traced(device, optim=OptimConfig(optimizer="muon"))
        found[device] = {op.dtype for op in step.trace.operations if op.name == "bmm" and op.phase == "optimizer"}
    assert found == {"cpu": {torch.float32}, "cuda": {torch.bfloat16}}


def test_nothing_stays_changed() -> None:
    before = F.dropout, F.rms_norm, cross_entropy._loss_and_gradient, newton_schulz.fast_dtype
    with pytest.raises(ZeroDivisionError), steps._as_on_cuda(compiled=False):
        assert F.dropout is not before[0] and F.rms_norm is not before[1]
        raise ZeroDivisionError
    assert (F.dropout, F.rms_norm, cross_entropy._loss_and_gradient, newton_schulz.fast_dtype) == before
    x = torch.randn(3, 8)
    with steps._as_on_cuda(compiled=False):
        assert torch.equal(F.dropout(x, 0.0), x) and torch.equal(F.dropout(x, 0.5, training=False), x)
        assert (F.dropout(torch.ones(1000), 0.5) == 0).any()


def test_the_attention_of_the_place() -> None:
    config = ModelConfig(**SMALL, attention_dropout=0.1)
    assert as_run_on("cpu", config, 128) is config
    cuda, mps = (as_run_on(device, config, 128) for device in ("cuda", "mps"))
    assert cuda.attention_kernel == mps.attention_kernel == "sdpa"
    assert (cuda.attention_dropout, mps.attention_dropout) == (0.0, 0.1)


def test_estimates_and_plans_follow() -> None:
    given = Recipe(model=SMALL | {"vocab_size": 8000}, train={"batch_size": 8, "steps": 10})
    found = {on: estimate(given, precision="bf16", savings=False, on_cuda=on) for on in (False, True)}
    names = {on: {op.name for op in found[on].operations if op.component == "head and loss"} for on in found}
    assert names[False] & {"exp", "exp_"} and "exp" not in names[True] and "sub_" in names[True]
    for device_type, on in (("cpu", False), ("cuda", True)):
        plan = plan_of(given.model, given.optim, given.train, device_type=device_type)
        assert plan.need(8, 1, "bf16", False).peak == found[on].memory.peak


def test_deep_models_are_traced_from_shallow_ones_as_well() -> None:
    given = Recipe(model=SMALL | {"layers": 16}, train={"batch_size": 8, "steps": 10})
    found = estimate(given, precision="bf16", savings=False, on_cuda=True)
    four = Traceable(given.model, given.optim, given.train, device_type="cuda")
    config = as_run_on("cuda", given.model, 128)
    assert config.attention_kernel == "sdpa" and four.device_type == "cuda"
    half = trace_step(config, given.optim, given.train, device_type="cuda", precision="bf16", micro_batch=4)
    assert found.bytes_per_sequence == (found.memory.peak - half.memory.peak()[1]) / 4


@pytest.mark.parametrize("machine", [Datasheet(find("h100"))], ids=lambda machine: machine.name)
def test_a_product_in_fp32_of_bf16_takes_the_time_of_one_in_bf16(machine: Machine) -> None:
    step = traced(model={"vocab_size": 200_000, "context_length": 1024}, micro_batch=8)
    of_the_loss = [op for op in step.trace.operations if op.phase == "forward" and op.module == ""]
    wide, narrow = (next(op for op in of_the_loss if op.name == name) for name in ("product_", "mm"))
    assert wide.flops == narrow.flops and product_shape(wide) == (200_000, 64, 2048)
    assert machine.of(wide).seconds == pytest.approx(machine.of(narrow).seconds, rel=0.5)
    assert wide.written == 4 * 200_000 * 64 and wide.read == wide.written + 2 * 2048 * (200_000 + 64)


def test_a_second_step_of_one_model_is_as_the_first() -> None:
    """Gradients that stayed with the bf16 copies would be there already."""
    model = Traceable(ModelConfig(**SMALL), OptimConfig(), TrainConfig(weights="bf16"), device_type="cuda")
    first, second = (model.step(precision="bf16", micro_batch=4).memory for _ in range(2))
    assert first.peak()[1] == second.peak()[1]
    assert first.timeline() == second.timeline()


def test_one_pass_of_adam_reads_and_writes_what_its_kernel_does() -> None:
    """For a parameter with a gradient and a copy in bf16 14 bytes each way; what is written counts as read, too, as of any operation in place."""
    step = traced(train=TrainConfig(weights="bf16"))
    passes = [op for op in step.trace.operations if op.name == "adam_step_"]
    numbers = sum(step.params.values())
    counts = 4 * len(step.params)  # of steps, which are one more afterwards
    assert sum(op.read for op in passes) == 16 * numbers + counts + 4 * len(passes)  # the factor
    assert sum(op.written for op in passes) == 14 * numbers + counts


@pytest.mark.parametrize(
    "changes", [{"mask": "sliding_window", "window": 32}, {"attention_soft_cap": 30.0}], ids=str
)
def test_masks_and_soft_caps_keep_no_scores(changes: dict[str, Any]) -> None:
    memory = traced("cuda", model=changes, precision="bf16").trace
    names = {op.name for op in memory.operations if "attention" in op.module}
    assert {"flash_attention", "flash_attention_backward"} <= names and not names & {"bmm", "_softmax"}
