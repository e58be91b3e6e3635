"""What compiled blocks keep and hold, against torch's own partitioner and against a graph small enough to be done by hand."""

from __future__ import annotations

import random
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.model import ModelConfig, Transformer
from scratchlm.resources.compiled import Flow, compiled, in_blocks, kept_for_backward
from scratchlm.resources.step import CPU, Step, _as_on_cuda, trace_step
from scratchlm.resources.trace import Operation, Phase, Storage, Trace
from scratchlm.train.loss import NextTokenLoss
from scratchlm.train.precision import autocast

BASE = {"vocab_size": 500, "context_length": 256, "d_model": 64, "layers": 2, "heads": 4}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, "fp32"),
    "bf16": ({}, "bf16"),
    "three layers, bf16": ({"layers": 3, "d_model": 128}, "bf16"),
    "flash attention": ({"attention_kernel": "sdpa"}, "bf16"),
    "what the machine takes": ({"attention_kernel": "auto"}, "fp32"),
    "gpt-2's choices": ({"norm": "layernorm", "feedforward": "gelu_tanh", "position": "learned"}, "fp32"),
    "latent attention": ({"attention": "mla", "latent": {"kv_rank": 32, "rope_dim": 8}}, "bf16"),
    "few keys, norms of queries": ({"kv_heads": 2, "qk_norm": "head"}, "fp32"),
    "parallel": ({"block": "parallel"}, "bf16"),
}


def config_of(fields: dict[str, Any]) -> ModelConfig:
    """What a CPU without kernels of ours computes, unless the kernel is named."""
    return ModelConfig(**{**BASE, "attention_kernel": "blocked", **fields})


def traced(config: ModelConfig, precision: str, **options: Any) -> Step:
    return trace_step(
        config, OptimConfig(), TrainConfig(), precision=precision, micro_batch=4, compiled=True, **options
    )


def kept_by_torch(config: ModelConfig, precision: str) -> int:
    """Bytes of the storages that torch's partitioner hands from the forward to the backward graph, inputs left out."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    found: dict[int, int] = {}

    def partition(joint: Any, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        joint_graph_passes(joint)  # as torch.compile does first
        pair = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        (outputs,) = next(node for node in pair[0].graph.nodes if node.op == "output").args
        for node in outputs[num_fwd_outputs:]:
            value = node.meta.get("val") if node.op != "placeholder" else None
            if isinstance(value, Tensor):
                found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return pair

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph, partition_fn=partition, decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    model = Transformer(config, seed=0)
    loss = NextTokenLoss(model)
    loss.body = torch.compile(model.body, backend=backend, fullgraph=True, dynamic=False)
    ids = torch.randint(config.vocab_size, (4, config.context_length))
    with autocast(precision, CPU):
        loss(Batch(ids, ids))
    torch._dynamo.reset()
    return sum(found.values())


QUICK = ("bf16", "flash attention", "gpt-2's choices")


@pytest.mark.parametrize(
    ("fields", "precision"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_what_is_kept_is_what_torchs_partitioner_keeps(fields: dict[str, Any], precision: str) -> None:
    config = config_of(fields)
    kept = sum(storage.size for storage in kept_for_backward(traced(config, precision).trace))
    assert kept == pytest.approx(kept_by_torch(config, precision), rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_operations_are_kept_as_torchs_partitioner_keeps_them(precision: str) -> None:
    """SwiGLU and the rotation as on CUDA, which the compiler takes whole: what comes out of them and what they read is in memory."""
    config = ModelConfig(**BASE, attention_kernel="sdpa")
    kept = kept_for_backward(traced(config, precision, device_type="cuda").trace)
    with _as_on_cuda(compiled=True):
        assert sum(storage.size for storage in kept) == pytest.approx(kept_by_torch(config, precision), rel=0.05)
    makers = [storage.maker for storage in kept if storage.module.startswith("blocks.0")]
    assert makers.count("turn_heads") == 3 and makers.count("swiglu") == 1
    assert not {"silu", "cat"} & set(makers)


def operation(
    name: str, phase: Phase, inputs: tuple[int, ...], outputs: tuple[int, ...], module: str = "blocks.0"
) -> Operation:
    flops = 1 if name == "mm" else 0
    return Operation(name, phase, module, flops, 0, 0, (), torch.float32, inputs, outputs)


def by_hand() -> Trace:
    """x ─ mul ─ silu ─ mm ─ mul ─► out; backward: the product's gradients read what silu made, silu's reads what mul made.

    ::

        storage     0    1     2      3    4    5      6     7       8
                    x    mul   silu   w    mm   mul    d_mm  d_silu  d_mul
    """
    operations = [
        operation("mul", "forward", (0,), (1,)),
        operation("silu", "forward", (1,), (2,)),
        operation("mm", "forward", (2, 3), (4,)),
        operation("mul", "forward", (4,), (5,)),
        operation("sum", "forward", (5,), (9,), "head"),
        operation("mul", "backward", (9, 4), (6,)),
        operation("mm", "backward", (6, 2), (7,)),
        operation("silu_backward", "backward", (7, 1), (8,)),
        operation("mul", "backward", (8,), (10,)),
    ]
    born = {0: 0, 3: 0, 1: 0, 2: 1, 4: 2, 5: 3, 9: 4, 6: 5, 7: 6, 8: 7, 10: 8}
    died = {1: 8, 2: 7, 4: 6, 5: 5, 6: 7, 7: 8, 8: 9}
    kinds = {0: "batch and tables", 3: "weights", 1: "activations", 2: "activations", 4: "activations"}
    storages = [
        Storage(
            100,
            born[n],
            "forward" if n <= 5 else "backward",
            "blocks.0",
            "",
            died.get(n),
            kinds.get(n, "temporaries"),
            "",
            n,
        )  # type: ignore[arg-type]
        for n in range(11)
    ]
    return Trace(operations, storages)


def test_a_graph_by_hand() -> None:
    """What mul made is not kept, x is there anyway; what silu made is: a product of the backward pass reads it."""
    trace = by_hand()
    assert [storage.number for storage in kept_for_backward(trace)] == [2, 4]
    found = {storage.number: storage for storage in compiled(trace, fused_loss=False).storages}
    assert 1 not in found, "made and used up between two products"
    assert 8 not in found, "in the backward pass as well"
    assert (found[2].died, found[4].died) == (7, 6) and found[2].kind == found[4].kind == "activations"
    assert found[5].died == 5, "it goes out, and dies when its reader lets go"
    assert found[7].died == 9, "read when what is made of it is written"
    assert compiled(trace, fused_loss=False).operations == trace.operations


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.1, 0.9))
def test_the_cut_is_the_smallest(seed: int, nodes: int, density: float) -> None:
    chance = random.Random(seed)
    ours, graph = Flow(), networkx.DiGraph()
    graph.add_nodes_from(range(nodes))
    edges = [(a, b) for a in range(nodes) for b in range(nodes) if a != b and chance.random() < density]
    capacity = {edge: float(chance.randrange(20)) for edge in edges}
    for (a, b), most in capacity.items():
        ours.add(a, b, most)
        graph.add_edge(a, b, capacity=most)
    behind = ours.behind_the_cut(0, nodes - 1)
    assert 0 not in behind and nodes - 1 in behind
    cut = sum(most for (a, b), most in capacity.items() if a not in behind and b in behind)
    assert cut == networkx.minimum_cut_value(graph, 0, nodes - 1)


def test_what_can_neither_be_kept_nor_computed_is_an_error() -> None:
    flow = Flow()
    flow.add("source", "sink", float("inf"))
    with pytest.raises(ValueError, match="neither kept nor computed"):
        flow.behind_the_cut("source", "sink")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_step_holds_less(precision: str, accumulation: int) -> None:
    step = traced(config_of({}), precision, accumulation=accumulation)
    eager = traced(config_of({}), precision, accumulation=accumulation).trace
    assert step.memory.peak()[1] < 0.9 * eager.peak()[1]
    for kind in ("weights", "gradients", "optimizer state"):
        sizes = [sum(s.size for s in trace.storages if s.kind == kind) for trace in (step.memory, eager)]
        assert sizes[0] == sizes[1] > 0
    live = step.memory.timeline()
    assert len(live) == len(step.trace.operations)
    assert abs(live[-1] - eager.timeline()[-1]) < 64, "after the step both hold the same, but for a sum"


def test_summed_gradients_come_all_at_once() -> None:
    """With accumulation the blocks' gradients are handed out together: one more copy of them is there at the end."""
    config = config_of({})
    step = traced(config, "fp32", accumulation=2)
    last = max(i for i, op in enumerate(step.trace.operations) if op.phase == "backward" and in_blocks(op.module))
    weights = 4 * sum(n for name, n in step.params.items() if name.startswith(("blocks", "norm")))
    there = sum(s.size for s in step.memory.storages if s.lives_at(last) and s.kind == "temporaries")
    assert there >= weights
