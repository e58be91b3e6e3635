"""One contender of ``benchmarks/train.py``: ``train_worker.py CONTENDER SHAPE THREADS``.

Says, as JSON lines, what it is and how long its first step took; then for each number on standard input the seconds of so many
steps (for the ceiling: GFLOP/s); after ``end`` its peak of resident memory.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BORN = time.perf_counter()

from train import CEILING, SHAPES, Shape  # noqa: E402


def flops_per_token(shape: Shape, matrix_params: int) -> int:
    """Of the products, forward and twice backward; attention by all pairs."""
    return 6 * matrix_params + 12 * shape.layers * shape.d_model * shape.context


def answer(what: Any) -> None:
    print(json.dumps(what), flush=True)


def peak_bytes(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    return torch.cuda.max_memory_allocated()


def turns(device: str) -> Iterator[int]:
    """The numbers of steps that are asked for, until the end."""
    for line in sys.stdin:
        if line.strip() == "end":
            answer({"peak_mb": peak_bytes(device) / 1e6})
            return
        yield int(line)


def wait_for(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def serve(step: Callable[[], Any], device: str) -> None:
    for steps in turns(device):
        if device == "cuda":  # the steps of a turn run into each other there, as they do in training
            start = time.perf_counter()
            for _ in range(steps):
                step()
            wait_for(device)
            answer([(time.perf_counter() - start) / steps])
            continue
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        answer(times)


def introduce(parameters: int, flops: int) -> None:
    answer({"parameters": parameters, "flops_per_token": flops, "first_step_seconds": time.perf_counter() - BORN})


# --- the ceiling ------------------------------------------------------------------------------------------------------


def ceiling(device: str, precision: str) -> None:
    import torch

    sizes = [(2048, 2048, 2048), (4096, 1024, 1024), (4096, 256, 1024)]
    if device == "cuda":
        sizes = [(8192, 8192, 8192), (16384, 4096, 4096)]
    repeats = 1 if device == "cpu" else 5

    def best(dtype: torch.dtype) -> float:
        speeds = []
        for rows, inner, columns in sizes:
            x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
            ways = [lambda x=x, weight=weight: x @ weight.T]
            if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
                # MKL is not the best on AMD
                ways.append(
                    lambda x=x, weight=weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
                )
            for way in ways:
                way()
                for _ in range(3):
                    wait_for(device)
                    start = time.perf_counter()
                    for _ in range(repeats):
                        way()
                    wait_for(device)
                    speeds.append(repeats * 2 * rows * inner * columns / (time.perf_counter() - start) / 1e9)
        return max(speeds)

    introduce(0, 0)
    for _ in turns(device):
        found = {"fp32": best(torch.float32)}
        if precision == "bf16":  # elsewhere torch takes half a minute for a product
            found["bf16"] = best(torch.bfloat16)
        answer([found])


# --- ours -------------------------------------------------------------------------------------------------------------


class _Over(Exception):
    pass


class GatedBatches:
    """Random batches, handed out as the driver asks for steps: from one batch to the next is a step."""

    def __init__(self, shape: Shape, introduce: Callable[[], None]) -> None:
        self.shape, self.introduce = shape, introduce
        self.turns, self.left, self.times, self.at, self.began = turns(shape.device), -1, [], 0.0, 0.0

    def next_batch(self) -> Any:
        import torch

        from scratchlm.data.loader import Batch

        if self.left == 1:
            wait_for(self.shape.device)  # the turn's last step is over when the GPU has done it
        now = time.perf_counter()
        if self.left >= 0:
            self.times.append(now - self.at)
            self.left -= 1
            if self.left <= 0:
                if self.shape.device == "cuda":  # the host runs ahead there: only the turn as a whole can be timed
                    self.times = [(now - self.began) / max(1, len(self.times))]
                answer(self.times) if self.left == 0 and self.started else self.introduce()
                self.started, self.times = True, []
                self.left = next(self.turns, 0)
                self.began = time.perf_counter()
                if not self.left:
                    raise _Over
        else:  # the first step of all
            self.left, self.started = 0, False
        ids = torch.randint(self.shape.vocab, (self.shape.batch, self.shape.context + 1))
        self.at = time.perf_counter()
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, None)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def scratchlm(shape: Shape, **options: Any) -> None:
    import torch

    from scratchlm.config import OptimConfig, TrainConfig
    from scratchlm.model import ModelConfig, Transformer
    from scratchlm.train.loop import Trainer
    from scratchlm.train.loss import NextTokenLoss

    config = ModelConfig(
        vocab_size=shape.vocab,
        context_length=shape.context,
        d_model=shape.d_model,
        layers=shape.layers,
        heads=shape.heads,
        tied_embeddings=True,
    )
    model = Transformer(config, seed=0)
    assert config.resolved_d_ff == shape.d_ff
    flops = int(model.training_flops_per_token(shape.context))
    gated = GatedBatches(shape, lambda: introduce(model.num_params(), flops))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            loss=NextTokenLoss(model),
            loader=gated,
            config=TrainConfig(
                steps=10**6, batch_size=shape.batch, checkpoint_interval=10**6, eval_interval=10**6, **options
            ),
            optim=OptimConfig(),
            folder=Path(folder),
            device=torch.device(shape.device),
            say=lambda message: print(message, file=sys.stderr),
            show_progress=False,
        )
        with contextlib.suppress(_Over):
            trainer.fit()


# --- peers ------------------------------------------------------------------------------------------------------------


def peer(
    shape: Shape,
    model: Any,
    loss_of: Callable[[Any, Any, Any], Any],
    *,
    matrix_params: int,
    autocast: bool,
    fused: bool,
) -> None:
    """A step as their users write it. `loss_of`: (model, inputs, targets) → mean loss."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None
    )

    def step() -> None:
        ids = torch.randint(shape.vocab, (shape.batch, shape.context + 1), device=shape.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(shape.device, dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    wait_for(shape.device)
    introduce(sum(p.numel() for p in model.parameters()), flops_per_token(shape, matrix_params))
    serve(step, shape.device)


def transformers(shape: Shape, variant: str, dtype: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(config).to(shape.device).train()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the tied head is the embedding
    if variant != "autocast":
        model = model.to(dtype)
    if variant != "eager":
        model = torch.compile(model, dynamic=False)

    def loss_of(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        return found

    peer(
        shape,
        model,
        loss_of,
        matrix_params=matrices,
        autocast=variant == "autocast",
        fused=variant != "eager",
    )


def nanogpt(shape: Shape, patched: bool, autocast: bool) -> None:
    import torch
    from gpt2_style import GPT

    model = GPT(shape.vocab, shape.context, shape.d_model, shape.layers, shape.heads).to(shape.device)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.wpe.weight.numel()
    peer(
        shape,
        torch.compile(model, dynamic=False),
        lambda model, inputs, targets: model(inputs, targets),
        matrix_params=matrices,
        autocast=autocast,
        fused=patched,
    )


def litgpt(shape: Shape, dtype: Any) -> None:
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        name="llama",
        block_size=shape.context,
        padded_vocab_size=shape.vocab,
        vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.d_model,
        intermediate_size=shape.d_ff,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config).to(shape.device)
    model.apply(model._init_weights)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.transformer.wte.weight.numel()
    peer(
        shape,
        torch.compile(model.to(dtype), dynamic=False),
        lambda model, inputs, targets: chunked_cross_entropy(model(inputs), targets, chunk_size=0),
        matrix_params=matrices,
        autocast=False,
        fused=True,
    )


def main() -> None:
    name, shape, threads, precision = sys.argv[1], SHAPES[sys.argv[2]], int(sys.argv[3]), sys.argv[4]
    if name.startswith("scratchlm"):
        from scratchlm.threads import before_torch

        before_torch()  # as every command of ours does before it imports torch
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if name == CEILING:
        ceiling(shape.device, precision)
    elif name.startswith("scratchlm"):
        bf16 = {"precision": "bf16", "weights": "bf16"}
        options = {"eager": {"compile": "off"}, "bf16": bf16, "graph": {**bf16, "cuda_graph": True}}
        scratchlm(shape, **{"precision": precision, **options.get(name.partition("-")[2], {})})
    elif name.startswith("transformers"):
        transformers(shape, name.partition("-")[2], dtype)
    elif name.startswith("nanogpt"):
        patched = name.endswith("patched")
        nanogpt(shape, patched, autocast=patched and precision == "bf16")
    else:
        litgpt(shape, dtype)


if __name__ == "__main__":
    main()
