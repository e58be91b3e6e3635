"""RMSNorm, SwiGLU, rotation, and a whole step of training without a compiler on a CPU: torch's kernels beside ours in C++ (`scratchlm/kernels/rows.cpp`).

    python benchmarks/rows.py --rounds 15 --out docs/results/rows

Forward and backward together, in one process, in turns; medians, and the ratio of each round. The step is that of `recipes/speedrun/shakespeare-char.toml`'s model with its
Muon, on random characters. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scratchlm.threads import before_torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="of one operation, in a round")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    before_torch()
    import torch
    from torch import Tensor

    from scratchlm.config import load_recipe
    from scratchlm.data.loader import Batch
    from scratchlm.evaluate.environment import describe_environment
    from scratchlm.files import write_json
    from scratchlm.kernels import rotary, rows_cpp
    from scratchlm.model.feedforward import SwiGLU
    from scratchlm.model.norm import RMSNorm
    from scratchlm.model.rope import half_split_pairs
    from scratchlm.model.transformer import Transformer
    from scratchlm.optim import build_optimizers
    from scratchlm.train.loss import NextTokenLoss, loss_options

    torch.manual_seed(0)
    ours = rows_cpp.runs
    if not ours(torch.float32):
        raise SystemExit("the kernels in C++ cannot be had here: is there a C++ compiler?")

    def both_ways(function: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], object]:
        x = torch.randn(*shape, requires_grad=True)
        upstream = torch.randn_like(function(x.detach()))
        return lambda: torch.autograd.grad(function(x), x, upstream)

    norm = RMSNorm(256)
    head_norm = RMSNorm(64)
    cos, sin = torch.randn(2, 256, 32)

    def turned(projected: Tensor) -> Tensor:
        if rotary.fits(projected):
            return torch.cat(rotary.turn_heads(projected, cos, sin, 4, 4, False), dim=1)
        q, k, v = projected.unflatten(-1, (12, 64)).transpose(1, 2).split(4, dim=1)
        return torch.cat([half_split_pairs(q, cos, sin), half_split_pairs(k, cos, sin), v], dim=1)

    recipe = load_recipe(Path(__file__).resolve().parents[1] / "recipes/speedrun/shakespeare-char.toml")
    model = Transformer(recipe.model.model_copy(update={"vocab_size": 257}), seed=0)
    loss, optimizers = NextTokenLoss(model, **loss_options(recipe.train)), build_optimizers(model, recipe.optim)
    ids = torch.randint(257, (recipe.train.batch_size, recipe.model.context_length))
    batch = Batch(ids, ids.roll(-1, 1))

    def step() -> None:
        (loss(batch) / ids.numel()).backward()
        optimizers.step()
        for parameter in model.parameters():
            parameter.grad = None

    cases: dict[str, Callable[[], object]] = {
        "RMSNorm, 4,096 × 256": both_ways(norm, 16, 256, 256),
        "RMSNorm of heads, 16 × 4 × 256 × 64": both_ways(lambda x: head_norm(x.transpose(1, 2)), 16, 256, 4, 64),
        "SwiGLU, 4,096 × 2 · 688": both_ways(SwiGLU.activate, 16, 256, 2 * 688),
        "q‖k‖v split and rotated, 4,096 × 12 · 64 (with a copy of all three)": both_ways(turned, 16, 256, 12 * 64),
        "a step of the Shakespeare recipe": step,
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"torch": [], "C++": []} for name in cases}
    for number in range(given.rounds + 1):  # the first does not count
        for name, case in cases.items():
            calls = 1 if case is step else given.calls
            for way, found in seconds[name].items():
                rows_cpp.runs = ours if way == "C++" else (lambda dtype: False)
                start = time.perf_counter()
                for _ in range(calls):
                    case()
                if number:
                    found.append((time.perf_counter() - start) / calls)
    rows_cpp.runs = ours
    result = {
        "benchmark": "rows",
        "command": "python benchmarks/rows.py " + " ".join(sys.argv[1:]),
        "environment": describe_environment(),
        "threads": given.threads,
        "milliseconds": {
            name: {way: 1e3 * statistics.median(found) for way, found in ways.items()}
            for name, ways in seconds.items()
        },
        "spread": {
            name: {way: [1e3 * min(found), 1e3 * max(found)] for way, found in ways.items()}
            for name, ways in seconds.items()
        },
        "times_as_fast": {
            name: statistics.median(a / b for a, b in zip(ways["torch"], ways["C++"], strict=True))
            for name, ways in seconds.items()
        },
    }
    for name, ways in result["milliseconds"].items():  # type: ignore[attr-defined]
        print(f"{name:<70} torch {ways['torch']:8.2f} ms   C++ {ways['C++']:8.2f} ms", file=sys.stderr)
    if given.out is not None:
        write_json(given.out / "rows-fp32.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
